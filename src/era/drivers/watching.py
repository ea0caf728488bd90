"""Following what a sandbox uses, while a program runs in it or processes are beside runs."""

from __future__ import annotations

from collections.abc import Callable

from era.drivers.socket_memory import Watches
from era.drivers.time_slice import TimeSlice


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
