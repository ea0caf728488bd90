"""Results of cells that were made to take more of the service than their bytes."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from era.core import jsontext
from era.core.live.kernel_frames import RESULTS_BYTES, CellResults, KernelBroken, parse
from tests.soaking import soak_the_rest


def shown(text: str = "", **more: Any) -> bytes:
    return json.dumps({"data": {"text/plain": text}, "metadata": {}, **more}).encode()


def test_an_update_counts_as_often_as_it_is_shown() -> None:
    results = CellResults()
    for _ in range(1000):
        results.add(shown(display_id="same"))
    results.add(shown("x" * 3000, display_id="same", update=True))
    assert (results.truncated, results.results[7]["data"]) == (False, {"text/plain": "x" * 3000})
    results.add(shown("x" * 3000, display_id="same", update=True))
    assert (results.truncated, len(results.results)) == (True, 1000)
    assert len(json.dumps(results.results)) < RESULTS_BYTES


def test_updates_find_what_they_change_at_once() -> None:
    results = CellResults()
    for number in range(9000):
        results.add(shown(display_id=str(number)))
    began = time.thread_time()
    for _ in range(20_000):
        results.add(shown("new", display_id="8999", update=True))
    assert time.thread_time() - began < 2, "each would look at all results"
    assert [each["data"]["text/plain"] for each in results.results[-2:]] == ["", "new"]
    for nobody in (None, "nobody's", ["8999"]):
        results.add(shown("lost", display_id=nobody, update=True))
    assert "lost" not in json.dumps(results.results)


@pytest.mark.parametrize("weakened", soak_the_rest([False, True], 1), ids=["", "weakened"])
def test_many_values_are_left_out(weakened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if weakened:
        monkeypatch.setattr(jsontext, "has_too_many_parts", lambda _: False)
    many = b'{"metadata":{},"data":{"a":[' + b"[]," * 1_300_000 + b"0]}}"
    results = CellResults()
    results.add(many)
    assert (results.truncated, bool(results.results)) == (not weakened, weakened)
    if not weakened:
        with pytest.raises(KernelBroken):
            parse(many)


def test_results_of_long_integers_are_left_out() -> None:
    """To read them would hold up others; the interpreter goes on."""
    results = CellResults()
    many = b",".join([b"9" * 3990] * 65)
    results.add(b'{"data": {"a": [' + many + b']}, "metadata": {}}')
    results.add(b'{"data": {"text/plain": "1"}, "metadata": {}}')
    assert results.truncated
    assert [result["data"] for result in results.results] == [{"text/plain": "1"}]
    with pytest.raises(KernelBroken, match="too long"):
        parse(b'{"ended": [' + many + b"]}")


@pytest.mark.parametrize("depth", [70, 300_000])
def test_results_that_are_nested_too_deeply_are_left_out(depth: int) -> None:
    """An interpreter whose cell shows such JSON goes on."""
    results = CellResults()
    deep = b"[" * depth + b"]" * depth
    results.add(b'{"data": {"application/json": ' + deep + b'}, "metadata": {}}')
    results.add(shown("1"))
    assert results.truncated
    assert [result["data"] for result in results.results] == [{"text/plain": "1"}]
    with pytest.raises(KernelBroken, match="too deeply"):
        parse(b'{"error": ' + deep + b"}")
