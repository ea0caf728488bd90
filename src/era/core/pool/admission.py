"""Admission: a few runs at a time for each processor, the others in order.

Theory of operation. More runs than processors can do at a time gain nothing: each takes longer, and all end late. So a
run begins when it has a *slot*, and slots are given in turn (fair_limiter.py). A run has its slot only as long as it
works: one that waits, for a connection, a clock or a lock, uses no processor, and one that has had a whole slice
of processor time stands back behind all others anyway (drivers/watching.py). Either gives its slot to the next and
goes on without one. So a hundred runs that sleep, or that serve public URLs, keep nobody from beginning, and a long one
delays a short one by no more than its slice.

What is measured is processor time, not age: on a busy machine every run is old. There a run may also get next to no
processor time, however much it wants. So one that has used little works nevertheless if any of its threads could run at
that moment.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

from era.core.concurrency.fair_limiter import FairLimiter, Release
from era.core.concurrency.outages import note_outage
from era.core.ports import SLICE, Sandbox

_SLOTS_PER_PROCESSOR = 2
"""One that runs, and one whose run is being begun or committed meanwhile."""

_LOOK = 0.05
"""Seconds between two looks at what a run does with its slot. Most end before the first."""

_LOOK_LATER = 1.0
"""Seconds after which a run is looked at again where that has failed."""

_WORKS = 0.1
"""A run works as long as it uses so much of a processor, or would use one that it doesn't get."""

_MAKING = 1.0
"""Seconds for which a run keeps its slot while its sandbox is being made."""


class Slot:
    """A run's right to use a processor."""

    def __init__(self, slots: FairLimiter, owner: str, session: Hashable) -> None:
        self._slots = slots
        self._owner, self._session = owner, session
        self._release: Release | None = None
        self._taken_at = 0.0
        self._sandbox: Sandbox | None = None
        self._end: float | None = None
        """The sandbox's processor time at which this run's slice ends; None before the first look at it."""

        self._used = self._looked_at = 0.0
        """The sandbox's processor time at the last look, and when that was."""

        self._timer: asyncio.TimerHandle | None = None

    async def take(self) -> None:
        """Wait for a slot. Raises TooBusy. Whoever calls this calls `give_back` in any case."""
        self._release = await self._slots.take(self._owner, self._session)
        self._taken_at = time.monotonic()
        self._look_in(_LOOK)

    def give_back(self) -> None:
        """Go on without the slot. May be called twice."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._release is not None:
            self._release()
            self._release = None

    def use(self, sandbox: Sandbox) -> None:
        """The run has this sandbox from now on."""
        self._sandbox = sandbox
        self._end = None

    def _look_in(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        """Give the slot back unless the run works and is short so far."""
        try:
            works, is_short = self._seen()
        except OSError as error:  # such as EMFILE, which says nothing about the run
            note_outage("run_not_looked_at", error)
            self._look_in(_LOOK_LATER)
            return
        if works and is_short:
            self._look_in(_LOOK)
        else:
            self.give_back()

    def _seen(self) -> tuple[bool, bool]:
        """Whether the run works, and whether it is short so far. Raises OSError."""
        now = time.monotonic()
        if self._sandbox is None:
            return now <= self._taken_at + _MAKING, True
        used = self._sandbox.cpu_seconds()
        if self._end is None:
            self._end, works = used + SLICE, True
        else:
            much = _WORKS * (now - self._looked_at)
            works = used - self._used >= much or self._sandbox.wants_processor()
        self._used, self._looked_at = used, now
        return works, used < self._end


class Admission:
    """Gives runs their slots. There is one of these a service."""

    def __init__(self, processors: int | None = None) -> None:
        """`processors` are those that this process may use, if not given."""
        processors = processors or len(os.sched_getaffinity(0))
        slots = processors * _SLOTS_PER_PROCESSOR
        self.places = FairLimiter(slots, hint="Send it again after as many seconds as Retry-After says.")
        """The slots."""

    @asynccontextmanager
    async def admitted(self, owner: str, session: Hashable = None) -> AsyncIterator[Slot]:
        """Wait for a slot, for a run of this owner's (in a session of this key), and have it within the block for as
        long as the run needs it. Raises TooBusy."""
        slot = Slot(self.places, owner, object() if session is None else session)
        try:
            await slot.take()
            yield slot
        finally:
            slot.give_back()
