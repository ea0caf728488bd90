"""Following what a sandbox uses, while a program runs in it or processes are beside runs.

A run has a slice of processor time. Once that is used up, its priority falls below the runs of all other sandboxes.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from era.core.concurrency.outages import note_outage
from era.core.ports import SLICE
from era.drivers.cgroups import Group
from era.drivers.memory import Watches


class Watching:
    """Has the processor time and the memory of one sandbox followed, for the run under way, else for processes."""

    def __init__(
        self,
        memory_watch: Callable[[], Watches],
        cpu_seconds: Callable[[], float],
        wants_processor: Callable[[], bool],
    ) -> None:
        """`memory_watch` makes what watches the memory. The others are those of ports.Sandbox."""
        self.cpu_seconds, self.wants_processor = cpu_seconds, wants_processor
        self.slice: TimeSlice | None = None
        """None without a cgroup."""

        self._memory_watch = memory_watch
        self._memory: Watches | None = None
        self.runs = False
        """Whether a run is under way."""

        self.has_processes = False
        """Whether there are processes beside runs."""

    def begin_run(self) -> Watches:
        """A run begins. Returns what watches its memory."""
        self.runs = True
        return self._begin()

    def end_run(self) -> None:
        self.runs = False
        self._go_on()

    def begin_anew(self) -> None:
        """Somebody waits for what runs, as for a short run."""
        if self.slice is not None:
            self.slice.begin_anew()

    def come_forward(self) -> None:
        """The run under way, if there is one, is to end: from now on it doesn't stand back, nor does its supervisor,
        which is to end it."""
        if self.runs and self.slice is not None:
            self.slice.end()

    def set_processes(self, there: bool) -> None:
        """There are processes beside runs from now on, or none any more."""
        self.has_processes = there
        if not self.runs:
            self._go_on()

    def stop(self) -> None:
        self.runs = self.has_processes = False
        self._go_on()

    def _go_on(self) -> None:
        if self.has_processes:
            self._begin()
        else:
            self._end()

    def _begin(self) -> Watches:
        # Else runs that are shorter than it takes to measure would let processes beside them take what they like.
        memory = self._memory if self.has_processes else None
        goes_on = memory is not None and memory.may_go_on
        self._end(memory=not goes_on)
        if self.slice is not None:
            self.slice.begin(lasting=not self.runs)
        if memory is None or not goes_on:
            memory = self._memory = self._memory_watch()
            memory.start()
        return memory

    def _end(self, *, memory: bool = True) -> None:
        if self.slice is not None:
            self.slice.end()
        if memory and self._memory is not None:
            self._memory.stop()
            self._memory = None


_LOOK, _LOOK_AT_MOST = 0.1, 1.0
"""Seconds between two looks at the processor time of a run: at first, and once it has long used little. Most runs end
before the first, which costs them nothing then."""


class TimeSlice:
    """The slice of the run under way in one sandbox."""

    def __init__(self, group: Group, cpu_seconds: Callable[[], float]) -> None:
        """`cpu_seconds` is what the sandbox has used of processors so far."""
        self._group = group
        self._cpu_seconds = cpu_seconds
        self._stands_back = False
        """Whether what runs has idle priority: it gets a processor only while no other sandbox wants it."""

        self._end = math.inf
        """The processor time of the sandbox at which the run stands back; infinite until the next look."""

        self._lasting = False
        self._timer: asyncio.TimerHandle | None = None
        """Set while a program runs that doesn't stand back, or that may come forward again; and while what has ended
        still stands back."""

    def begin(self, *, lasting: bool = False) -> None:
        """Look now and then whether the run has used its slice. Called again only after `end`. With `lasting` it is
        processes that last, and get a new slice whenever they have used little for a while."""
        self._lasting = lasting
        self._end = math.inf
        self._look_in(_LOOK, 0.0)

    def begin_anew(self) -> None:
        """Somebody waits for the run, as for a short one."""
        self._end = math.inf
        if self._stands_back:
            self.end()
            self.begin(lasting=self._lasting)

    def end(self) -> None:
        """Back to the usual priority: where that fails for now, soon."""
        self._cancel()
        if self._stands_back:
            self._set_idle(False)
        if self._stands_back:
            self._timer = asyncio.get_running_loop().call_later(_LOOK, self.end)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_in(self, seconds: float, used: float) -> None:
        self._cancel()  # what was left to `end`
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look, seconds, used)

    def _look(self, seconds: float, used_before: float) -> None:
        """Stand back if the slice is used up; else look again, later if little was used in the last `seconds`."""
        self._timer = None
        try:
            used = self._cpu_seconds()
        except OSError as error:  # such as EMFILE; of a group that is gone nothing is raised
            note_outage("processor_time_not_followed", error)
            self._look_in(seconds, used_before)
            return
        little = used - used_before < _LOOK * seconds
        if self._lasting and little:
            self._end = used + SLICE
        is_over = used >= self._end
        if is_over != self._stands_back:
            self._set_idle(is_over)
        if is_over:
            if self._lasting or not self._stands_back:
                self._look_in(_LOOK_AT_MOST, used)
            return
        if self._end == math.inf:  # it begins with the first look
            self._end = used + SLICE
        self._look_in(min(2 * seconds, _LOOK_AT_MOST) if little else _LOOK, used)

    def _set_idle(self, idle: bool) -> None:
        """Where this fails, it is tried again at the next look."""
        try:
            self._group.set_idle_priority(idle=idle)
        except OSError as error:
            note_outage("priority_not_set", error)
        else:
            self._stands_back = idle
