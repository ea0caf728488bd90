"""core.stall_timeout: what uses processor time is waited for, what stands still is not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from era.core.concurrency import stall_timeout as stall_timeouts
from era.core.concurrency.stall_timeout import stall_timeout


def used_since(seconds: float, until: float = 1e9) -> Callable[[], float]:
    """A count of processor time that grows, as time does, for `until` seconds."""
    return lambda: min(time.monotonic() - seconds, until)


async def test_what_gets_on_is_waited_for() -> None:
    async with stall_timeout(used_since(time.monotonic()), 2):
        await asyncio.sleep(4)


@pytest.mark.parametrize("until", [0.0, 3.0])
async def test_what_stands_still_is_not(until: float) -> None:
    """Neither what never did anything nor what has stopped."""
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        async with stall_timeout(used_since(begun, until), 2):
            await asyncio.sleep(60)
    assert until + 1.75 < time.monotonic() - begun < 30


async def test_nothing_is_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall_timeouts, "MOST_SECONDS", 1.0)
    with pytest.raises(TimeoutError):
        async with stall_timeout(used_since(time.monotonic()), 0.4):
            await asyncio.sleep(60)


async def test_errors_are_passed_on() -> None:
    with pytest.raises(ValueError, match="mine"):
        async with stall_timeout(lambda: 0.0, 0.4):
            raise ValueError("mine")
