"""The end of a run whose supervisor doesn't say, after the deadline, how it ended.

A supervisor has what its sandbox gets of the processors. So from the deadline on its sandbox doesn't stand back, and
where all processors are taken it may need longer than END_SECONDS: what gets next to nothing isn't dead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from era.core.concurrency.outages import note_outage
from era.core.concurrency.stall_timeout import MOST_SECONDS
from era.drivers.watching import Watching

END_SECONDS = 15.0
"""After a run's deadline, within which its supervisor must have said how it ended: not counting seconds in which the
sandbox didn't get the processors that it wanted, but for MOST_SECONDS."""

_LOOK = 1.0
"""Seconds between two looks at what the sandbox gets, after the deadline."""

_LITTLE = 0.2
"""A sandbox that wants a processor and gets less than this much of one doesn't get on."""


class Watchdog:
    """Calls `abort` where the supervisor of one run says nothing; `cancel` it once it has. Made as the program is
    sent."""

    def __init__(self, timeout: float, watching: Watching, abort: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout, self._watching, self._abort = timeout, watching, abort
        self._has_begun = False
        self._give_up_at = self._give_up_surely_at = 0.0
        self._timer = self._loop.call_later(timeout, self._come_due)

    def begin(self) -> None:
        """The program begins only now, and its time with it."""
        self._has_begun = True
        self._give_up_at = 0.0
        self._timer.cancel()
        self._timer = self._loop.call_later(self._timeout, self._come_due)

    def bring_forward(self) -> None:
        """The run is to end: its deadline is now, or when it begins."""
        self._timeout = 0.0
        if self._has_begun and not self._give_up_at:
            self.begin()

    def cancel(self) -> None:
        self._timer.cancel()

    def _come_due(self) -> None:
        """The deadline is over."""
        now = self._loop.time()
        self._give_up_at, self._give_up_surely_at = now + END_SECONDS, now + MOST_SECONDS
        self._look(None)

    def _look(self, before: tuple[float, float] | None) -> None:
        """Give up or look again. `before` is when the last look was, and the sandbox's processor time then."""
        now = self._loop.time()
        self._watching.come_forward()  # each time, as it may have failed
        seen = None
        try:
            seen = now, self._watching.cpu_seconds()
            gets_little = before is not None and seen[1] - before[1] < _LITTLE * (now - before[0])
            if gets_little and self._watching.wants_processor():
                self._give_up_at = min(now + END_SECONDS, self._give_up_surely_at)
        except OSError as error:
            note_outage("processor_time_not_followed", error)
        if now < self._give_up_at:
            self._timer = self._loop.call_later(_LOOK, self._look, seen)
        else:
            self._abort()
