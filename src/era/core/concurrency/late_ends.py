"""Ends of runs and processes, and uses, that are still to be put on record, since the database is away.

Until an end is on record its row says `running`: who looks is told so, its idempotency key is taken, and its session
never expires. So it is tried for as long as the service lives. The next start records ends that are left as lost.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

import structlog

FIRST_DELAY = 1.0
"""Seconds from the first failure to the second attempt; each delay is `_FACTOR` times the last, up to `_MAX_DELAY`."""

_FACTOR = 4.0
_MAX_DELAY = 900.0
_MOST_FACTORS = 10
"""More than lead to the longest delay; thousands would be too much for a float."""


def delay(tries: int) -> float:
    """Seconds from the last failure to the next attempt, after `tries` failures."""
    return min(FIRST_DELAY * _FACTOR ** min(tries - 1, _MOST_FACTORS), _MAX_DELAY)


log = structlog.get_logger()

_LONGEST_PAUSE = 5.0
"""Seconds between two tries, at most."""


class LateEnds:
    """Records ends as soon as it can: one after the other, so that a database that is away isn't asked by all."""

    def __init__(self) -> None:
        self._attempts: deque[Callable[[], Awaitable[bool]]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._is_stopped = False

    def add(self, attempt: Callable[[], Awaitable[bool]]) -> None:
        """Call `attempt`, which has failed before, until it says that it needn't be called again."""
        if self._is_stopped:
            return
        self._attempts.append(attempt)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._record())

    async def _record(self) -> None:
        failures = 1
        while self._attempts:
            await asyncio.sleep(min(delay(failures), _LONGEST_PAUSE) if failures else 0)
            attempt = self._attempts.popleft()
            try:
                is_over = await attempt()
            except Exception:
                log.exception("end_not_recorded")
                continue
            failures = 0 if is_over else failures + 1
            if not is_over:
                self._attempts.append(attempt)  # behind the others: it may be about this one

    async def stop(self) -> None:
        """Leave those that aren't recorded, or come later, to the next start."""
        self._is_stopped = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
