"""A disk quota for the working directory of a run: a run that exceeds it is ended.

Theory of operation. The kernel bounds a single file (RLIMIT_FSIZE), but not a directory: project quotas are rare, and
an ordinary user can't have one. So the directory is measured while a program runs, but only when it can have exceeded
its limits. It can't have taken more than what the whole file system has lost since the last measurement, and statvfs(2)
tells that in microseconds. As long as this is within what the session has left, nothing else is done. Most runs end
before the first such check.

While others free space, the file system loses less than the session takes; so a long run is measured every second or
so in any case. And a file that was removed but is still open or mapped takes space without being there to be measured:
the sandbox is asked about those, too. A descriptor in a socket's queue is nowhere to be found; nor can an ordinary
user's service look into directories whose mode forbids it. So a run that has any of these, while the file system has
lost what nothing else explains and what may be over the limit, is ended as well.

The bound is therefore not sharp. A program can exceed it by what it writes in one TICK, and by more where measuring a
large tree takes longer: measuring may take a tenth of the time at most. What is *kept* is bounded sharply, by the scan
of the directory after the run.
"""

from __future__ import annotations

import asyncio
import os
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace

from era.core.concurrency.outages import note_outage
from era.core.limits import bounds
from era.core.models import Snapshot
from era.core.ports import Sandbox
from era.core.program import Ended, Limits, Output, Program
from era.core.totals import allocated_bytes
from era.core.trees import trees
from era.core.trees.tree_objects import PACKAGES, on_disk

TICK = 0.05
"""Seconds between two checks of the file system's free space."""

_FIRST = 0.1
_SHARE = 10
"""A measurement is followed by a pause of at least this many times its duration."""

_REGULARLY, _REGULAR_SHARE = 1.0, 50
"""The pause before a routine measurement, one that free space gives no reason for: seconds, and times the duration."""

_OFTEN, _SOON = 3, 0.25
"""A run is ended when so many looks in a row find what they can't measure; the pause between those in seconds."""


class Full(Exception):
    """The working directory exceeds its limits; the message says which."""


async def bounded(sandbox: Sandbox, program: Program, before: Snapshot) -> AsyncIterator[Output | Ended]:
    """Run a program within the sandbox's disk limits, and pass on its events.

    `before` is what the working directory holds at the start. If it exceeds the limits, the run is killed; its `Ended`
    then has the cause `disk_full`, and `disk_problem` says which limit it was.
    """
    allowance = Allowance(sandbox, before, sandbox.kill_run)
    allowance.start()
    try:
        async with aclosing(sandbox.run(program)) as events:  # type: ignore[type-var]  # drivers return generators
            async for event in events:
                yield allowance.with_cause(event) if isinstance(event, Ended) else event
    finally:
        allowance.stop()


class Allowance:
    """Watches the disk usage of one run, or of processes beside runs, in a task that starts after _FIRST seconds. It
    can be stopped and started again: what was lost meanwhile counts, too."""

    def __init__(
        self, sandbox: Sandbox, before: Snapshot, end: Callable[[], Awaitable[None]], tick: float = TICK
    ) -> None:
        """`end` ends what exceeds the limits. `tick` is the time between two checks, in seconds."""
        self._sandbox = sandbox
        self._end = end
        self._tick = tick
        self._bytes = self._before = before.total_bytes
        self._entries = self._entries_before = before.file_count
        self.problem: str | None = None
        """Which limit was exceeded, if any."""

        self._free = self._free_before = os.statvfs(sandbox.workspace)
        self._hidden = 0
        """How many looks in a row found what they can't measure, and bytes that nothing explains."""

        self._due_at = time.monotonic() + _REGULARLY
        self._not_before = 0.0
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self.problem = None
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_FIRST, self._begin)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._task is not None and self.problem is None:  # or it is just about to end what exceeds them
            self._task.cancel()
        self._task = None

    def with_cause(self, ended: Ended) -> Ended:
        """`ended`, with the cause `disk_full` if the run was killed for that."""
        if self.problem is None:
            return ended
        return replace(ended, cause="disk_full", disk_problem=self.problem)

    def _begin(self) -> None:
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        """Check every tick, until the limits are exceeded."""
        while True:
            if await self.check():
                return
            await asyncio.sleep(self._tick)

    async def check(self, *, surely: bool = False) -> bool:
        """Measure if that is called for, or in any case. End what exceeds the limits, and return whether anything
        does."""
        try:
            if surely or self._may_be_over():
                await asyncio.to_thread(self._measure)
        except Full as full:
            self.problem = str(full)
            await self._end()
            return True
        except OSError as error:
            note_outage("disk_not_measured", error)
        return False

    def _may_be_over(self) -> bool:
        """Whether a measurement is called for: the limits may be exceeded, or it is time for a routine one."""
        free, at = os.statvfs(self._sandbox.workspace), time.monotonic()
        if at < self._not_before:
            return False
        lost = (self._free.f_bfree - free.f_bfree) * free.f_frsize
        gone = self._free.f_ffree - free.f_ffree
        limits = self._sandbox.limits
        if self._bytes + lost > limits.disk_bytes or self._entries + gone > limits.files:
            return True
        return bool(lost or gone or self._hidden) and at > self._due_at

    def _measure(self) -> None:
        """Measure the working directory, and note when to measure again. Raises Full."""
        began, free, limits = time.monotonic(), os.statvfs(self._sandbox.workspace), self._sandbox.limits
        with trees.opened_root(self._sandbox.workspace) as root:
            usage = _Usage(root, limits)
            if self._sandbox.may_have_packages():
                usage.add_packages(root)
            device = os.fstat(root).st_dev
            unnamed = self._sandbox.unnamed_bytes(device)
        usage.check(unnamed)
        self._bytes, self._entries = usage.bytes + unnamed, usage.entries
        ended = time.monotonic()
        self._free, self._not_before = free, ended + _SHARE * (ended - began)
        self._due_at = ended + max(_REGULARLY, _REGULAR_SHARE * (ended - began))
        self._check_hidden(free, device, is_closed=usage.is_closed)

    def _check_hidden(self, free: os.statvfs_result, device: int, *, is_closed: bool) -> None:
        """Raises Full where what can't be measured may be over the limit, since the file system has lost as much since
        the run began. Others take space too, but hardly any program has such files for long. `is_closed`: there are
        directories that can't be looked into."""
        limits = self._sandbox.limits
        lost = (self._free_before.f_bfree - free.f_bfree) * free.f_frsize
        unexplained = lost - max(0, self._bytes - self._before)
        if is_closed:  # some of what was there before may be in them
            gone = self._free_before.f_ffree - free.f_ffree
            unexplained_entries = gone - max(0, self._entries - self._entries_before)
            may_be_over = max(self._bytes, self._before) + unexplained > limits.disk_bytes
            may_be_over |= max(self._entries, self._entries_before) + unexplained_entries > limits.files
        else:
            may_be_over = self._bytes + unexplained > limits.disk_bytes
        if not may_be_over or not (is_closed or self._sandbox.hides_files(device)):
            self._hidden = 0
            return
        self._hidden += 1
        self._due_at = time.monotonic() + _SOON
        if self._hidden == _OFTEN:
            where = "closed directories" if is_closed else "sockets' queues, in calls that wait, or only in maps"
            raise Full(f"it has files that can't be measured, since they are in {where}")


class _Usage:
    """Counts bytes and entries of a directory that is being written to. Raises Full as soon as there are too many."""

    def __init__(self, root: int, limits: Limits) -> None:
        self.bytes = self.entries = 0
        self.is_closed = False
        """Whether there are directories that can't be looked into."""

        self._limits = limits
        self._linked: set[int] = set()
        self._directories: int | None = None
        """Of packages, as long as there is nothing but these: then they aren't kept, and so don't count (trees.py)."""

        self._add(root, 0)

    def add_packages(self, root: int) -> None:
        """Count the directory of packages, too. Raises Full."""
        self._directories = 0
        self._add_below(root, on_disk(PACKAGES), 0)

    def _add(self, fd: int, depth: int) -> None:
        """Count everything below the directory open as `fd`. Files with several names are counted once.
        Raises Full."""
        if depth > bounds(self._limits).depth:
            raise Full(f"the working directory is nested deeper than {bounds(self._limits).depth} directories")
        with os.scandir(fd) as entries:
            for entry in entries:
                self._count(entry)
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                except PermissionError:  # the directory may be listed, and no more
                    self.is_closed = True
                    continue
                if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
                    if status.st_ino in self._linked:
                        continue
                    self._linked.add(status.st_ino)
                self.bytes += allocated_bytes(status)
                self.check(0)
                if stat.S_ISDIR(status.st_mode):
                    self._add_below(fd, entry.name, depth)

    def _count(self, entry: os.DirEntry[str]) -> None:
        """Count an entry. Raises Full."""
        if self._directories is not None and entry.is_dir(follow_symlinks=False):
            self._directories += 1
            if self._directories <= self._limits.files:
                return
        self.entries += 1 + (self._directories or 0)
        self._directories = None

    def _add_below(self, fd: int, name: str, depth: int) -> None:
        """Count everything below a subdirectory. Raises Full."""
        try:
            child = os.open(name, trees.DIRECTORY, dir_fd=fd)
        except PermissionError:
            self.is_closed = True
            return
        except OSError:
            return  # it is gone by now, or no directory any more
        with trees.closing(child):
            self._add(child, depth + 1)

    def check(self, more: int) -> None:
        """Raises Full if the usage, and `more` bytes beside it, exceed the limits."""
        limits = self._limits
        if self.bytes + more > limits.disk_bytes:
            raise Full(f"the working directory outgrew {limits.disk_bytes >> 20} MiB")
        if self.entries > limits.files:
            raise Full(f"the working directory outgrew {limits.files} files and directories")
