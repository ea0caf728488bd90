"""Processor time: what a call costs the machine, whoever waits for it. Of a busy machine it tells more than a clock."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from pathlib import Path

TICK = 1 / os.sysconf("SC_CLK_TCK")


def used_below(pid: int) -> float:
    """Seconds of processor time that a process and all that it has started have used, down to those that have ended."""
    return sum(_ticks_below(pid).values()) * TICK


def pids_below(pid: int) -> set[int]:
    """A process, and all that it has started."""
    return set(_ticks_below(pid))


def _ticks_below(pid: int) -> dict[int, int]:
    times: dict[int, int] = {}
    children: dict[int, list[int]] = defaultdict(list)
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        try:
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        process = int(directory.name)
        times[process] = sum(map(int, fields[11:15]))  # of its own, and of children that it has waited for
        children[int(fields[1])].append(process)
    found, left = {}, [pid]
    while left:
        process = left.pop()
        found[process] = times.get(process, 0)
        left += children[process]
    return found


def used_by_others() -> float:
    """The same for all that this process has started, without itself: services, and programs on the host."""
    return used_below(os.getpid()) - time.process_time()
