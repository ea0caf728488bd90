"""Having a whole sandbox stand still for a moment, by the freezer of its control group."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

from era.core.concurrency.outages import FOR_NOW, note_outage
from era.drivers.cgroups import Group
from era.drivers.processes import UnseenIsFine

_SECONDS = 0.25
"""Within which everything must have come to a stand. What can't be stopped at once is a process in a system call that
no signal interrupts, such as one that waits for a slow disk, or for our answer about a connect."""

_LOOKS_AT_ONCE = 4
"""Where a processor is free, everything stands still within a tenth of a millisecond. A sleep of the event loop takes a
whole one at least."""

_FIRST_LOOK, _LAST_LOOK = 0.0005, 0.004
"""Seconds between two looks at whether it stands still: each time half as much again. On a busy machine processes take
tens of milliseconds to be stopped, and more looks would only take processor time from them."""

_THAW_AGAIN = 0.1
"""Seconds until it is let go on once more where that failed for now: such as for want of descriptors."""

_LONG = 1.0
"""Seconds of standing still that keep what is inside from getting on. Most looks take some milliseconds."""


class Freezer:
    """Freezes one control group."""

    def __init__(self, group: Group | None) -> None:
        self._group = group
        self._turn = asyncio.Lock()
        self._thawing: asyncio.TimerHandle | None = None
        self._since: float | None = None
        """When the block under way began, by the monotonic clock."""

        self._long_seconds = 0.0
        """What the long ones before it took."""

    @contextlib.asynccontextmanager
    async def frozen(self) -> AsyncIterator[bool | None]:
        """See ports.Sandbox. Blocks of several callers come one after the other. Raises OSError where it can't be
        frozen only for now."""
        if self._group is None:
            yield None
            return
        async with self._turn:
            self._since = time.monotonic()
            try:
                yield await self._freeze(self._group) if await self._prepare() else None
            finally:
                self.thaw()  # without waiting for anything, so that nobody can cancel it
                self._long_seconds, self._since = self._stood_still(), None

    def progress(self, cpu_seconds: Callable[[], float]) -> Callable[[], float]:
        """For stall_timeout, what grows as the group gets on, given the processor time that it has used: also while it
        stands still for us, since it isn't to blame for that."""
        return lambda: cpu_seconds() + self._stood_still()

    def _stood_still(self) -> float:
        """For how many seconds it has, for long each time."""
        now = 0.0 if self._since is None else time.monotonic() - self._since
        return self._long_seconds + (now if now >= _LONG else 0.0)

    async def _prepare(self) -> bool:
        """Have it so that it can be frozen. Returns whether it can. Raises OSError where it can't only for now."""
        group = self._group
        if group is None or group.can_freeze:
            return group is not None
        with UnseenIsFine():
            return await asyncio.to_thread(group.prepare_freezer)
        return False

    async def _freeze(self, group: Group) -> bool:
        """Freeze it. False where that takes too long, or it is gone; then it isn't frozen. Raises OSError where that
        fails only for now."""
        deadline, pause = time.monotonic() + _SECONDS, _FIRST_LOOK
        if self._thawing is not None:  # or it would go on amid this block
            self._thawing.cancel()
        with UnseenIsFine():
            group.set_frozen(frozen=True)
            for _ in range(_LOOKS_AT_ONCE):
                if group.is_frozen():
                    return True
                await asyncio.sleep(0)
            while not group.is_frozen():
                if time.monotonic() > deadline:
                    self.thaw()
                    return False
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, _LAST_LOOK)
            return True
        return False

    def thaw(self) -> None:
        """Let it go on, whoever has frozen it. Where that fails for now, it is done a moment later."""
        if self._thawing is not None:
            self._thawing.cancel()
        if self._group is not None and self._group.can_freeze:
            try:
                self._group.set_frozen(frozen=False)
            except OSError as error:
                if error.errno in FOR_NOW:  # else it is gone
                    note_outage("sandbox_not_thawed", error)
                    self._thawing = asyncio.get_running_loop().call_later(_THAW_AGAIN, self.thaw)
