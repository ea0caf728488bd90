"""How long is waited for what a sandbox is starting: as long as it gets on.

A bound in seconds alone would bound what else the machine does: at load 20 a start that takes a second of processor
time takes half a minute. What has used no processor for a while isn't slow but stands still.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

START_SECONDS = 20.0
MOST_SECONDS = 300.0
"""However much it gets on: what can be had to go on for ever has somebody waiting for ever."""

_LOOKS = 4
_LEAST = 0.01
"""Seconds of processor time. Nothing finer is counted everywhere."""


@asynccontextmanager
async def while_it_works(cpu_seconds: Callable[[], float], seconds: float = START_SECONDS) -> AsyncIterator[None]:
    """Raises TimeoutError in what is below it once that has gone on for `seconds` in which `cpu_seconds`, which says
    how much has been used so far, hasn't grown."""
    loop = asyncio.get_running_loop()
    last = loop.time() + MOST_SECONDS
    looking: asyncio.TimerHandle
    async with asyncio.timeout(seconds) as bound:

        def look(before: float) -> None:
            nonlocal looking
            used = cpu_seconds()
            if used - before >= _LEAST and not bound.expired():
                bound.reschedule(min(loop.time() + seconds, last))
            looking = loop.call_later(seconds / _LOOKS, look, used)

        # The first look, a moment after the beginning, which costs nothing where all is over before.
        looking = loop.call_later(min(0.1, seconds / _LOOKS), lambda: look(cpu_seconds()))
        try:
            yield
        finally:
            looking.cancel()
