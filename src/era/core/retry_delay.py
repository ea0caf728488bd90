"""When what has failed is tried again: deliveries of inboxes, notices of webhooks, and records of what has ended."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable

FIRST_DELAY = 1.0
"""Seconds from the first failure to the second attempt; each delay is `_FACTOR` times the last, up to `_MAX_DELAY`."""

_FACTOR = 4.0
_MAX_DELAY = 900.0

_LONGEST_PAUSE = 5.0
"""Seconds between two tries of what must be recorded, at most."""


def delay(tries: int) -> float:
    """Seconds from the last failure to the next attempt, after `tries` failures."""
    return float(min(FIRST_DELAY * _FACTOR ** (tries - 1), _MAX_DELAY))


async def until_recorded(attempt: Callable[[], Awaitable[bool]]) -> None:
    """Call `attempt` until it says that it needn't be called again, as long as that takes: what is tried must happen,
    and somebody may be waiting for the database to be back."""
    for tries in itertools.count(1):
        if await attempt():
            return
        await asyncio.sleep(min(delay(tries), _LONGEST_PAUSE))
