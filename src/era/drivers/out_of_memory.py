"""Whether what has ended in a sandbox was killed for want of memory."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from era.core.program import Ended
from era.drivers.cgroups import Group
from era.drivers.socket_memory import Watches

_SANDBOX_DIED = "The sandbox was out of memory, and died with its program; data and files stay as they were."


class OutOfMemory:
    """What the kernel counts of one sandbox, where that has a control group. Kills count for what was there when they
    happened: a run isn't blamed for one before it. A run and a process that were there both, and end one after the
    other, are told apart by who asks first."""

    def __init__(self) -> None:
        self.group: Group | None = None
        self._told = 0
        """Processes that the kernel had killed when this was asked last."""

        self._before_run = 0
        """Those that it had killed when the run under way began."""

        self._killed_by_us = set[int]()
        """Processes beside runs, by their pids inside, that were killed where no group bounds memory."""

    def begin_run(self) -> None:
        """A run begins."""
        self._before_run = self._kills()

    def begin_processes(self) -> None:
        """There may be processes beside runs from now on."""
        self._told = self._kills()

    def will_kill(self, pid: int) -> None:
        """We are about to kill a process beside runs for want of memory. On any thread."""
        self._killed_by_us.add(pid)

    def has_killed(self, pid: int) -> bool:
        """Whether this process beside runs was killed for want of memory, which SIGKILL has ended: by us, or by the
        kernel, which has killed more than what this has told of."""
        if pid in self._killed_by_us:
            self._killed_by_us.remove(pid)
            return True
        return self._has_more_than(self._told)

    def classify(self, ended: Ended, memory: Watches) -> Ended:
        """The same end of a run, with the cause `oom` if it was for want of memory: `memory` has ended it, or the
        kernel."""
        if memory.exceeded and ended.cause == "killed":
            return replace(ended, cause="oom")
        if ended.exit_code != 0 and self._has_more_than(max(self._told, self._before_run)):
            if not ended.sandbox_alive:
                return replace(ended, cause="oom", state_problem=_SANDBOX_DIED)
            if ended.cause in ("exit", "signal", "killed"):
                return replace(ended, cause="oom")
        return ended

    def _has_more_than(self, before: int) -> bool:
        self._told = self._kills()
        return self._told > before

    def _kills(self) -> int:
        """How many processes the kernel has killed: what was known before where it can't be asked any more."""
        if self.group is not None:
            with contextlib.suppress(OSError):
                return self.group.out_of_memory_kills()
        return self._told
