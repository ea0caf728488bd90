"""What lies unread in sockets and counts nowhere, by the host's /proc.

Theory of operation. The kernel charges what a TCP connection holds to a control group only once it was accepted, and
answers in netlink sockets to none (both versions of control groups, as of Linux 6.18). A program may have hundreds of
thousands of either, of some hundred KiB each, or some of as many MiB as `net.core.rmem_max` lets it ask for. proc(5)
tells of them by network namespace, and each sandbox has one of its own; with gVisor it has those of the sentry.

Most sandboxes have few sockets, and how many is quickly told. To list connections the kernel looks through the whole
machine's, which takes milliseconds, so that is done often for those with many sockets only. It tells how many bytes
wait, not what holds them: that is estimated, and small pieces hold several times of that.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import cache
from pathlib import Path

from era.drivers import processes
from era.drivers.memory import MemoryWatch

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
