"""A timeout for what a sandbox is starting, which begins anew whenever the sandbox has used some processor time.

A bound in seconds alone would bound what else the machine does: at load 20 a start that takes a second of processor
time takes half a minute. What has used no processor for a while isn't slow but stands still.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from era.core.concurrency.outages import note_outage

START_SECONDS = 20.0
MOST_SECONDS = 300.0
"""However much processor time it uses: a program beside it may use some for ever, to keep a caller waiting."""

_CHECKS = 4
"""How often within a timeout the processor time is read."""

_LEAST = 0.01
"""Seconds of processor time that count as progress. Nothing finer is counted everywhere."""


@asynccontextmanager
async def stall_timeout(
    cpu_seconds: Callable[[], float], seconds: float = START_SECONDS, most: float | None = None
) -> AsyncIterator[None]:
    """Raises TimeoutError out of the block once it has gone on for `seconds` without any processor time being used, or
    for `most` in all (MOST_SECONDS unless given). `cpu_seconds` says how much the sandbox has used so far."""
    loop = asyncio.get_running_loop()
    last = loop.time() + (MOST_SECONDS if most is None else most)
    checking: asyncio.TimerHandle
    async with asyncio.timeout(seconds) as bound:

        def check(before: float | None) -> None:
            """`before` is what had been used at the last check. What was used before the first isn't known."""
            nonlocal checking
            try:
                used = cpu_seconds()
            except OSError as error:  # such as EMFILE: what was used isn't known, as before the first check
                note_outage("processor_time_not_followed", error)
                checking = loop.call_later(seconds / _CHECKS, check, None)
                return
            if (before is None or used - before >= _LEAST) and not bound.expired():
                bound.reschedule(min(loop.time() + seconds, last))
            checking = loop.call_later(seconds / _CHECKS, check, used)

        # The first check, a moment after the beginning, which costs nothing where all is over before.
        checking = loop.call_later(min(0.1, seconds / _CHECKS), check, None)
        try:
            yield
        finally:
            checking.cancel()
