"""Differences of data: what they take is bounded, however the data was made to differ."""

from __future__ import annotations

import copy
import json
import time
import tracemalloc
from collections.abc import Sequence
from typing import Any

import pytest

from era.core.trees import diffs
from era.core.trees.diffs import DataChange, data_changes

_KEY = "k" * 20_000


def applied(changes: Sequence[DataChange], data: Any) -> Any:
    """The data after the changes, as RFC 6902 has it."""
    root = [copy.deepcopy(data)]
    for change in changes:
        names = [name.replace("~1", "/").replace("~0", "~") for name in change.path.split("/")[1:]]
        at: Any = root
        key: Any = 0
        for name in names:
            at = at[key]
            key = int(name) if isinstance(at, list) else name
        if change.op == "remove":
            del at[key]
        elif isinstance(at, list) and change.op == "add":
            at.insert(key, change.new)
        else:
            at[key] = change.new
    return root[0]


PAIRS: dict[str, tuple[Any, Any, int]] = {
    "few": ({"a": [1, {"b/~": 2}, 3], "c": 1}, {"a": [True, {"b/~": 3}], "d": []}, 5),
    "a list that grows": ({"a": [1]}, {"a": [1, [2], 3]}, 2),
    "many in one value": ({"a": [0] * 300_000, "b": 1}, {"a": [1] * 300_000, "b": 2}, 2),
    "many keys": ({str(n): 0 for n in range(50_000)}, {str(n): 1 for n in range(50_000)}, 1),
    "below a long key": ({_KEY: [0] * 9_000}, {_KEY: [1] * 9_000}, 1),
    "many values, few of which differ": ({"a": [[0]] * 99_999, "b": 1}, {"a": [[0]] * 99_998 + [[1]], "b": 1}, 1),
    "the same but for the order of keys": ({"a": {"b": [0] * 99_999, "c": 1}}, {"a": {"c": 1, "b": [0] * 99_999}}, 0),
    "equal numbers of other types": ({"a": [[1] * 20_000]}, {"a": [[1.0] * 20_000]}, 1),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_changes_turn_the_old_data_into_the_new(kind: str) -> None:
    old, new, count = PAIRS[kind]
    changes = data_changes(old, new)
    assert len(changes) == count
    assert json.dumps(applied(changes, old), sort_keys=True) == json.dumps(new, sort_keys=True)
    assert sum(len(change.path) for change in changes) <= 1 << 20


@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
def test_long_keys_take_no_memory_for_each_value_below(weakened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if weakened:
        monkeypatch.setattr(diffs, "_MOST_PATH_CHARACTERS", 1 << 40)
    old, new, _ = PAIRS["below a long key"]
    tracemalloc.start()
    try:
        data_changes(old, new)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (peak > 100 << 20) is weakened


def test_equal_values_below_a_long_key_take_no_time_for_it() -> None:
    key = "k" * 500_000
    began = time.thread_time()
    assert len(data_changes({key: [0] * 200_000 + [0]}, {key: [0] * 200_000 + [1]})) == 1
    assert time.thread_time() - began < 2, "its path would be written 200,000 times"


@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
def test_so_many_values_are_compared_at_most(weakened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Python, that is: a MiB of lists in lists took a processor for more than a second."""
    if weakened:
        monkeypatch.setattr(diffs, "_MOST_VALUES", 1 << 40)
    data: Any = {"a": [[[[[]]]] for _ in range(95_000)]}
    calls, compare = 0, diffs._Comparison.compare

    def counting(self: diffs._Comparison, old: Any, new: Any) -> None:
        nonlocal calls
        calls += 1
        compare(self, old, new)

    monkeypatch.setattr(diffs._Comparison, "compare", counting)
    assert data_changes(data, copy.deepcopy(data)) == []
    assert (calls > 150_000) is weakened
