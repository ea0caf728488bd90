"""How many sandboxes may be warm: as many as memory allows.

Theory of operation. What a warm sandbox takes is measured, one sandbox after the other, since it differs by language
and driver. Half of the memory that is available, with what sandboxes have of it now, is theirs; the rest is for the
programs that run in them, and for whoever else is on this machine. It is worked out anew all the time: where others
need memory, idle sandboxes go.
"""

from __future__ import annotations

import contextlib
import resource
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from era.core.ports import Sandbox

FIRST = 32
"""Before anything has been measured."""

_LEAST, _MOST = 8, 4096
_SHARE = 0.5
_MEASURED = 16
"""Measurements of which the mean is taken."""

_DESCRIPTORS = 16
"""Open files of the service for one sandbox, at most."""


class WarmLimit:
    """Measures sandboxes, and says how many may be warm."""

    def __init__(self) -> None:
        self._measured: deque[int] = deque(maxlen=_MEASURED)
        self._next = 0

    def measure(self, sandboxes: Sequence[Sandbox]) -> None:
        """Measure another one of these idle sandboxes."""
        if sandboxes:
            self._next = (self._next + 1) % len(sandboxes)
            if size := sandboxes[self._next].memory_bytes():
                self._measured.append(size)

    def limit(self, count: int) -> int:
        """How many there may be, where there are `count` now."""
        if not self._measured:
            return FIRST
        each = sum(self._measured) / len(self._measured)
        by_memory = int(_SHARE * (available_memory() + count * each) / each)
        by_descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _DESCRIPTORS
        return max(_LEAST, min(by_memory, by_descriptors, _MOST))


def available_memory() -> int:
    """Bytes that this process and its descendants can still have: of the machine (proc_meminfo(5)), and of the control
    groups that it is in."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
    available = fields["MemAvailable"]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            root, limit, usage, cache = (
                "/sys/fs/cgroup/memory",
                "limit_in_bytes",
                "usage_in_bytes",
                "total_inactive_file",
            )
        elif not controllers:
            root, limit, usage, cache = "/sys/fs/cgroup", "max", "current", "inactive_file"
        else:
            continue
        group = Path(root + path)
        for directory in (group, *group.parents):
            if not directory.is_relative_to(root):
                break
            with contextlib.suppress(OSError, ValueError):  # no such group here, or "max": it has no limit
                left = int((directory / f"memory.{limit}").read_text())
                left -= int((directory / f"memory.{usage}").read_text())
                held = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
                available = min(available, left + int(held.get(cache, 0)))
    return max(available, 0)
