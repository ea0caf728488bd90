"""Admission: a few runs at a time for each processor, the others in order.

Theory of operation. More runs than processors can do at a time gain nothing: each takes longer, and all end late. So a
run begins when it has a *slot*, and slots are given out in fair order (places.py). A run has its slot only as long as
it works: one that waits, for a connection, a clock or a lock, uses no processor, and one that has had a whole slice of
processor time stands back behind all others anyway (drivers/time_slice.py). Either gives its slot to the next and goes
on without one. So a hundred runs that sleep, or that serve public URLs, keep nobody from beginning, and a long one
delays a short one by no more than its slice.

What is measured is processor time, not age: on a busy machine every run is old.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from era.core.places import Places
from era.core.ports import SLICE, Sandbox

_SLOTS_PER_PROCESSOR = 2
"""One that runs, and one whose run is being begun or committed meanwhile."""

_LOOK = 0.05
"""Seconds between two looks at what a run does with its slot. Most end before the first."""

_WORKS = 0.1
"""A run works as long as it uses so much of a processor."""

_MAKING = 1.0
"""Seconds for which a run keeps its slot while its sandbox is being made."""


class Slot:
    """A run's right to use a processor."""

    def __init__(self, slots: Places, owner: str) -> None:
        self._slots = slots
        self._owner = owner
        self._held = False
        self._taken_at = 0.0
        self._sandbox: Sandbox | None = None
        self._end: float | None = None
        """The sandbox's processor time at which this run's slice ends; None before the first look at it."""

        self._used = self._looked_at = 0.0
        """The sandbox's processor time at the last look, and when that was."""

        self._timer: asyncio.TimerHandle | None = None

    async def take(self) -> None:
        """Wait for a slot. Raises TooBusy."""
        await self._slots.take(self._owner)
        self._held = True
        self._taken_at = time.monotonic()
        self._look_later()

    def give_back(self) -> None:
        """Go on without the slot. May be called twice."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._held:
            self._held = False
            self._slots.give_back()

    def use(self, sandbox: Sandbox) -> None:
        """The run has this sandbox from now on."""
        self._sandbox = sandbox
        self._end = None

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_LOOK, self._look)

    def _look(self) -> None:
        """Give the slot back unless the run works and is short so far."""
        now = time.monotonic()
        if self._sandbox is None:
            gives_way = now > self._taken_at + _MAKING
        else:
            used = self._sandbox.cpu_seconds()
            if self._end is None:
                self._end, gives_way = used + SLICE, False
            else:
                gives_way = used >= self._end or used - self._used < _WORKS * (now - self._looked_at)
            self._used, self._looked_at = used, now
        if gives_way:
            self.give_back()
        else:
            self._look_later()


class Admission:
    """Gives runs their slots. There is one of these a service."""

    def __init__(self, processors: int | None = None) -> None:
        """`processors` are those that this process may use, if not given."""
        processors = processors or len(os.sched_getaffinity(0))
        self._slots = Places(
            processors * _SLOTS_PER_PROCESSOR, hint="Send it again after as many seconds as Retry-After says."
        )

    @property
    def places(self) -> Places:
        """The slots, to be looked at."""
        return self._slots

    @asynccontextmanager
    async def admitted(self, owner: str) -> AsyncIterator[Slot]:
        """Wait for a slot, for a run of this owner's, and have it within the block for as long as the run needs it.
        Raises TooBusy."""
        slot = Slot(self._slots, owner)
        await slot.take()
        try:
            yield slot
        finally:
            slot.give_back()
