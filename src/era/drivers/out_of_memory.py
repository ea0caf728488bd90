"""Whether what has ended in a sandbox was killed for want of memory."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from era.core.program import Ended
from era.drivers.cgroups import Group
from era.drivers.memory import MemoryWatch

_SANDBOX_DIED = "The sandbox was out of memory, and died with its program; data and files stay as they were."


class OutOfMemory:
    """What the kernel counts of one sandbox, where that has a control group. A run and a process that end one after
    the other are told apart by who asks first."""

    def __init__(self) -> None:
        self.group: Group | None = None
        self._kills = 0
        """Processes that the kernel had killed when this was asked last."""

        self._killed_by_us = 0
        """Processes beside runs that were killed since then where no group bounds memory."""

    def note(self) -> None:
        """We have killed a process beside runs for want of memory."""
        self._killed_by_us += 1

    def has_killed(self) -> bool:
        """Whether any was killed since this was asked last."""
        if self._killed_by_us:
            self._killed_by_us -= 1
            return True
        if self.group is not None:
            with contextlib.suppress(OSError):
                before, self._kills = self._kills, self.group.out_of_memory_kills()
                return self._kills > before
        return False

    def classify(self, ended: Ended, memory: MemoryWatch | None) -> Ended:
        """The same end of a run, with the cause `oom` if it was for want of memory: `memory` has ended it, or the
        kernel."""
        if memory is not None and memory.exceeded and ended.cause == "killed":
            return replace(ended, cause="oom")
        if ended.exit_code != 0 and self.has_killed():
            if not ended.sandbox_alive:
                return replace(ended, cause="oom", state_problem=_SANDBOX_DIED)
            if ended.cause in ("exit", "signal", "killed"):
                return replace(ended, cause="oom")
        return ended
