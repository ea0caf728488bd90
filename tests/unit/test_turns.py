"""core.Turns: one at a time, in order, with a bound."""

from __future__ import annotations

import asyncio

import pytest

from era.core.concurrency.turns import Turns
from era.errors import RunUnderWay, TooManyWaiting


async def test_turns_come_in_the_order_of_arrival() -> None:
    turns, order, at_once = Turns(), [], 0

    async def take(number: int) -> None:
        nonlocal at_once
        async with turns.take("s"):
            at_once += 1
            assert at_once == 1
            await asyncio.sleep(0)
            order.append(number)
            at_once -= 1

    await asyncio.gather(*(take(number) for number in range(20)))
    assert order == list(range(20))


async def test_who_gives_up_waiting_holds_up_nobody() -> None:
    turns = Turns()
    async with turns.take("s"):
        waiting = [asyncio.create_task(_take(turns)) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.sleep(0)
        assert turns.taken("s")
    await asyncio.gather(*waiting[1:])
    assert waiting[0].cancelled()
    assert not turns.taken("s")


async def test_patience_has_an_end() -> None:
    turns = Turns()
    async with turns.take("s", long=True):
        for patience in (0, 0.01):
            with pytest.raises(RunUnderWay):
                async with turns.take("s", patience=patience):
                    pass
        with pytest.raises(RunUnderWay):
            turns.check_free("s")
        waiting = asyncio.create_task(_take(turns))
        await asyncio.sleep(0)
    await waiting  # whoever gave up left no gap in the queue
    async with turns.take("s"):  # a short turn is waited for even without patience
        short = asyncio.create_task(_take(turns, patience=0))
        await asyncio.sleep(0)
        assert not short.done()
    await short
    assert not turns.taken("s")


async def test_the_bound_is_of_those_who_wait() -> None:
    turns = Turns(max_waiting=2)
    async with turns.take("s"):
        waiting = [asyncio.create_task(_take(turns)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(TooManyWaiting):
            await _take(turns)
        unbounded = asyncio.create_task(_take(turns, bounded=False))
        await _take(turns, "another")
        await asyncio.sleep(0)
    await asyncio.gather(*waiting, unbounded)


async def test_a_turn_that_ends_in_an_error_is_given_back() -> None:
    turns = Turns()
    with pytest.raises(ZeroDivisionError):
        async with turns.take("s"):
            raise ZeroDivisionError
    assert not turns.taken("s")
    await _take(turns)


async def test_who_yields_is_told_of_each_who_waits() -> None:
    turns, told = Turns(), []
    async with turns.take("s"):
        with turns.yielding("s", lambda: told.append("wanted")):
            assert told == []
            waiting = asyncio.create_task(_take(turns))
            await asyncio.sleep(0)
            assert told == ["wanted"]
        await _take(turns, "another")
        later = asyncio.create_task(_take(turns))
        await asyncio.sleep(0)
        assert told == ["wanted"], "it does not yield any more"
    await asyncio.gather(waiting, later)


async def test_who_yields_is_told_of_those_who_waited_before() -> None:
    turns, told = Turns(), []
    async with turns.take("s"):
        waiting = asyncio.create_task(_take(turns))
        await asyncio.sleep(0)
        with turns.yielding("s", lambda: told.append("wanted")):
            assert told == ["wanted"]
    await waiting


async def _take(turns: Turns, name: str = "s", *, bounded: bool = True, patience: float | None = None) -> None:
    async with turns.take(name, bounded=bounded, patience=patience):
        pass
