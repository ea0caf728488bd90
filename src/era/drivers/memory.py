"""Memory of a sandbox: measured, bounded where no control group does it, and out-of-memory kills recognized.

Theory of operation. The kernel bounds the private memory of each process (RLIMIT_DATA), but neither that of all
together nor shared memory: maps that are shared, and files in memory (memfd_create(2)). So while a program runs, what
its sandbox takes is measured every INTERVAL, and rarer where measuring takes much processor time. Most runs end before
the first time.

What is swapped out counts, and so do page tables: to read a byte in each 2 MiB of a large private map, which takes no
other memory, takes a page of those.

Pages that processes share count once: those of a process by its proportional share (PSS), those of a file in memory by
the file. A file is found by descriptors and, where the service may look at what is mapped (as root with
CAP_SYS_ADMIN), by maps. Elsewhere a map counts with the pages that the processes have in their page tables. So what is
not found is shared memory of which nobody has a descriptor and that was taken out of all page tables.

The bound isn't sharp: a program can exceed it by what it takes in one INTERVAL.

*Sockets.* Data that waits in sockets counts in no control group: the kernel charges what a TCP connection holds to a
control group only once it was accepted, and answers in netlink sockets to none (both versions of control groups, as of
Linux 6.18). A program may have hundreds of thousands of either, of some hundred KiB each, or some of as many MiB as
`net.core.rmem_max` lets it ask for. proc(5) tells of them by network namespace, and each sandbox has one of its own;
with gVisor it has those of the sentry.

Most sandboxes have few sockets, and how many is quickly told. To list connections the kernel looks through the whole
machine's, which takes milliseconds, so that is done often for those with many sockets only. It tells how many bytes
wait, not what holds them: that is estimated, and small pieces hold several times of that.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import structlog

from era.core.concurrency.outages import note_outage
from era.core.program import Ended
from era.drivers import processes
from era.drivers.cgroups import Group

log = structlog.get_logger()

INTERVAL = 0.05
"""Seconds between two measurements."""

GROUP_INTERVAL = 0.02
"""The same where a control group counts the memory, which is quick."""

LATE_GROWTH = 64 << 20
"""Bytes that a run may take while memory of the run before isn't given back yet. gVisor gives back by and by what a
program has taken, so that isn't the fault of the run after it."""

SUPERVISOR_BYTES = 32 << 20
"""What the processes of a sandbox take that belong to no program, generously."""

_GONE = (errno.ENOENT, errno.ESRCH, errno.ENODEV)
"""What is raised where there is no such sandbox any more; ENODEV by files of its control group."""

_FIRST = 0.1
_SHARE = 10
"""A measurement is followed by a pause of at least this many times the processor time that it took."""

_OWN, _SHARED = (b"RssAnon", b"VmSwap", b"VmPTE"), (b"RssFile", b"RssShmem")
_SIZE = re.compile(rb"^(" + b"|".join(_OWN + _SHARED) + rb"):\s+(\d+) kB$", re.MULTILINE)
_MAP = re.compile(rb"[0-9a-f]+-[0-9a-f]+ \S+ [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) (\d+)")


class MemoryWatch:
    """Ends a run, or processes beside it, once the sandbox takes more than `most` bytes of memory. `start` it, and
    `stop` it at the end."""

    interval = INTERVAL
    first = _FIRST

    def __init__(
        self,
        most: int,
        used: Callable[[], int],
        kill: Callable[[], Awaitable[bool]],
        *,
        first: float | None = None,
        gives_back_late: Callable[[], bool] = lambda: False,
    ) -> None:
        """`used` measures what the sandbox takes, in bytes, on a thread. `kill` ends what takes the memory, and says
        whether it was the run. `first` is the seconds before the first measurement: 0 with `gives_back_late`, where
        what is there at first may have been left by what has ended (see LATE_GROWTH)."""
        self.exceeded = False
        """Whether the run was ended."""

        self._most = most
        self._used = used
        self._kill = kill
        self._first = self.first if first is None else first
        self._gives_back_late = gives_back_late
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def may_go_on(self) -> bool:
        """Whether it measures, and would do that for the next run as for this one."""
        return self._timer is not None and not (self._gives_back_late() or (self._task and self._task.done()))

    def start(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._first, self._follow_soon)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _follow_soon(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._follow())

    async def _follow(self) -> None:
        """Measure until the run has ended or takes too much."""
        lowest: int | None = None
        while True:
            took = 0.0
            try:
                used, took = await self._measure()
                lowest = used if lowest is None else min(lowest, used)
                if used > (max(self._most, lowest + LATE_GROWTH) if self._gives_back_late() else self._most):
                    if await self._kill():
                        self.exceeded = True
                        return
                    lowest = used  # nor is it the run's fault what processes took that were ended
            except KeyError:  # the sandbox is gone
                return
            except OSError as error:
                if error.errno in _GONE:
                    return
                note_outage("memory_not_measured", error)  # such as EMFILE, after which the bound is to hold again
            await asyncio.sleep(max(self.interval, _SHARE * took))

    async def _measure(self) -> tuple[int, float]:
        """What is taken, in bytes, and the seconds of a processor that it took to find out. On a busy machine that's
        far less than what passes meanwhile, in which the sandbox is to be looked at no more rarely."""
        return await asyncio.to_thread(self._measure_here)

    def _measure_here(self) -> tuple[int, float]:
        began = time.thread_time()
        return self._used(), time.thread_time() - began


class GroupWatch(MemoryWatch):
    """The same for a sandbox whose memory a control group bounds, too, but whose end would be that of the sandbox.

    The kernel kills what it likes of the group, and with gVisor's sentry everything would be gone: the output's end,
    the data, what the run has taken. So the group has a reserve, and the run is ended before that is used up.
    """

    interval = first = GROUP_INTERVAL

    async def _measure(self) -> tuple[int, float]:
        return self._measure_here()


def of_processes(pids: Iterable[int], most: int) -> int:
    """Bytes of memory that these processes take, or a bound of them where that isn't above `most`: it is quickly had,
    from what each has, as if they shared nothing, and their files in memory."""
    pids = list(pids)
    bound = sum(own + shared for own, shared in _resident(pids)) + sum(_files(pids).values())
    return bound if bound <= most else used(pids)


def of_gvisor(pids: Iterable[int]) -> int:
    """Bytes of memory that the processes of a gVisor sandbox take: what each has for itself, and the files in memory,
    of which one is the memory of all programs. gVisor keeps descriptors of them, so no maps have to be read, which
    takes longest of all when a program takes much."""
    pids = list(pids)
    return sum(own for own, _ in _resident(pids)) + sum(_files(pids).values())


def _resident(pids: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Bytes of each of these processes that are its own, and those in its memory that belong to a file or are
    shared."""
    for pid in pids:
        with processes.UnseenIsFine():  # it has ended
            sizes = _sizes(pid)
            yield sum(sizes[name] for name in _OWN), sum(sizes[name] for name in _SHARED)


def _sizes(pid: int) -> dict[bytes, int]:
    """What proc_pid_status(5) says of a process's memory, in bytes. Raises OSError where it has ended."""
    sizes = dict.fromkeys((*_OWN, *_SHARED), 0)
    for name, size in _SIZE.findall(processes.told(pid, "status", _SIZE)):
        sizes[name] = int(size) << 10
    return sizes


def used(pids: Iterable[int]) -> int:
    """Bytes of memory that these processes take: private memory, their page tables, and files in memory that have no
    name."""
    private, files, mapped = 0, _files(pids), dict[int, int]()
    for pid in pids:
        with processes.UnseenIsFine():  # it has ended
            rollup = processes.told(pid, "smaps_rollup")
            private += sum(int(size) << 10 for size in re.findall(rb"^(?:Pss_Anon|SwapPss): +(\d+)", rollup, re.M))
            private += _sizes(pid)[b"VmPTE"]
            for inode, size in _mapped(processes.told(pid, "smaps")):
                mapped[inode] = mapped.get(inode, 0) + size
    return private + sum(max(files.get(inode, 0), mapped.get(inode, 0)) for inode in files.keys() | mapped.keys())


def _files(pids: Iterable[int]) -> dict[int, int]:
    """The bytes in each file in memory that these processes have open or, as far as that may be seen, mapped."""
    return processes.unnamed(pids, _DEVICE)


def _mapped(smaps: bytes) -> list[tuple[int, int]]:
    """The files in memory that /proc/PID/smaps has, and the bytes of each that are in the process's page tables, those
    that it shares with others in proportion."""
    found = list[tuple[int, int]]()
    inode: int | None = None
    for line in smaps.splitlines():
        if line.startswith(b"Pss:") and inode is not None:
            found.append((inode, int(line.split()[1]) << 10))
        elif match := _MAP.match(line):
            device = os.makedev(int(match[1], 16), int(match[2], 16))
            inode = int(match[3]) if device == _DEVICE else None
    return found


def _device() -> int:
    """The device of files in memory that have no name."""
    fd = os.memfd_create("era")
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


_DEVICE = _device()


_MANY = 64
"""With more sockets than that, connections are listed at each look."""

_RARELY = 5.0
"""Seconds between two lists of connections of others."""

_SHARE_OF_MEMORY = 4
"""A sandbox may have a quarter of its memory in these besides."""

_CONNECTION_BYTES = 4 << 10
_SMALL_PIECES, _MOST_OF_SMALL_PIECES = 16, 128 << 10
"""What a connection takes that waits to be accepted, and what its bytes take besides as they may have come in small
pieces: so many times of them, up to so much."""

_PER_BYTE = 2
_OPEN = ("01", "08")
"""Established, or closed by the other side. Connections in these states that nobody has yet have the inode 0."""

_USED = re.compile(r"sockets: used (\d+)")

type Kill = Callable[[Callable[[int], int]], Awaitable[bool]]
"""What ends the process that has most, by a function of its pid. See MemoryWatch."""


class SocketWatch(MemoryWatch):
    """Ends a run, or processes beside it, once the sandbox has too much unread that counts nowhere."""

    interval = first = 0.25

    def __init__(self, pid: int, memory_bytes: int, kill: Kill) -> None:
        """`pid` is the sandbox's PID 1, which has its network namespace."""
        most = memory_bytes // _SHARE_OF_MEMORY
        super().__init__(most, self._unread, lambda: kill(sockets_of))
        self._pid = pid
        self._few = max(4, min(_MANY, most // (4 * _largest_buffer())))
        self._sockets = 0
        self._waiting = 0
        self._listed_at = 0.0

    async def _measure(self) -> tuple[int, float]:
        self._sockets = _sockets(self._pid)
        return (0, 0.0) if self._sockets <= self._few else await super()._measure()

    def _unread(self) -> int:
        now = time.monotonic()
        if self._sockets > _MANY or now > self._listed_at + _RARELY:
            self._listed_at, self._waiting = now, _waiting(self._pid)
        return self._waiting + _PER_BYTE * sum(int(row[4]) for row in _rows(self._pid, "netlink"))


class Watches:
    """Some watches as one."""

    def __init__(self, *watches: MemoryWatch | None) -> None:
        self._watches = [watch for watch in watches if watch is not None]

    @property
    def exceeded(self) -> bool:
        """See MemoryWatch, as the others."""
        return any(watch.exceeded for watch in self._watches)

    @property
    def may_go_on(self) -> bool:
        return all(watch.may_go_on for watch in self._watches)

    def start(self) -> None:
        for watch in self._watches:
            watch.start()

    def stop(self) -> None:
        for watch in self._watches:
            watch.stop()


def sockets_of(pid: int) -> int:
    """How many sockets a process has open; 0 where that isn't told."""
    found = 0
    with processes.UnseenIsFine():  # it has ended
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with processes.UnseenIsFine():  # it was closed
                found += str(descriptor.readlink()).startswith("socket:")
    return found


def _sockets(pid: int) -> int:
    """How many sockets there are in a process's network namespace. Raises OSError where it has ended."""
    try:
        found = _USED.match(Path(f"/proc/{pid}/net/sockstat").read_text())
    except FileNotFoundError:
        if Path(f"/proc/{pid}").exists():
            return 0  # a kernel that doesn't tell
        raise
    return 0 if found is None else int(found[1])


def _waiting(pid: int) -> int:
    """The bytes that connections take which wait to be accepted, estimated."""
    rows = (row for name in ("tcp", "tcp6") for row in _rows(pid, name))
    unread = [int(row[4].partition(":")[2], 16) for row in rows if row[3] in _OPEN and row[9] == "0"]
    pieces = sum(min(_SMALL_PIECES * each, _MOST_OF_SMALL_PIECES) for each in unread)
    return _CONNECTION_BYTES * len(unread) + _PER_BYTE * sum(unread) + pieces


def _rows(pid: int, name: str) -> Iterator[list[str]]:
    """A table of proc_pid_net(5) without its head; none where the kernel has no such protocol."""
    try:
        with open(f"/proc/{pid}/net/{name}") as file:
            next(file, None)
            yield from map(str.split, file)
    except FileNotFoundError:
        return


@cache
def _largest_buffer() -> int:
    """The bytes of a buffer that a program may ask for, as the kernel counts them."""
    try:
        return int(Path("/proc/sys/net/core/rmem_max").read_text())
    except OSError:
        return 4 << 20


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
