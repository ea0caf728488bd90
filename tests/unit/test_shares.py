"""Fair shares of a bounded number."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from era.core.concurrency.shares import Shares
from era.network.descriptors import MAX_DESCRIPTORS, RunDescriptors


def greedy(shares: Shares[str], holder: str) -> int:
    taken = 0
    while shares.take(holder):
        taken += 1
    return taken


def test_one_holder_gets_half_and_the_next_gets_some() -> None:
    shares: Shares[str] = Shares(100)
    assert greedy(shares, "one") == 50
    assert greedy(shares, "two") == 25
    shares.give_back("one", 50)
    assert greedy(shares, "three") == 37
    assert shares.taken == 62


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 40), st.booleans()), max_size=60))
def test_nobody_ever_has_the_last(steps: list[tuple[str, int, bool]]) -> None:
    shares: Shares[str] = Shares(100)
    held = dict.fromkeys("abcd", 0)
    for holder, count, gives in steps:
        if gives:
            count = min(count, held[holder])
            shares.give_back(holder, count)
            held[holder] -= count
        elif shares.take(holder, count):
            held[holder] += count
            assert held[holder] <= 100 - sum(held.values())
        assert shares.taken == sum(held.values())
        assert shares.taken < 100
    assert set(shares._held) == {holder for holder, count in held.items() if count}


def test_a_run_leaves_some_to_the_next_of_its_owner_and_to_others() -> None:
    shares: Shares[str] = Shares(900)
    runs = [RunDescriptors(shares, "me") for _ in range(3)]
    got = [sum(run.take_free() for _ in range(1000)) for run in runs]
    assert got == [225, 113, 56]
    assert RunDescriptors(shares, "you").take_free(100)


def test_a_run_has_a_bound_of_its_own() -> None:
    run = RunDescriptors(Shares(1 << 20), "me")
    assert run.take_free(MAX_DESCRIPTORS)
    assert not run.take_free()
    with pytest.raises(OSError, match="too many") as refused:
        run.take()
    assert refused.value.errno == errno.ENOBUFS


def test_what_was_idle_longest_makes_room() -> None:
    run = RunDescriptors(Shares(12), "me")
    closed: list[str] = []
    uses: dict[str, Callable[[], None]] = {}

    def opened(name: str) -> None:
        def close() -> None:
            closed.append(name)
            run.ended(close)
            run.give_back()

        run.take()
        run.used(close)
        uses[name] = lambda: run.used(close)

    for name in "abc":
        opened(name)
    uses["a"]()
    opened("d")
    opened("e")
    assert closed == ["b", "c"]
