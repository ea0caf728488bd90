"""What lies unread in sockets and counts in no control group, by the host's /proc.

Theory of operation. The kernel charges what a TCP connection holds to a group only once it was accepted, and answers in
netlink sockets to none (both versions of control groups, as of Linux 6.18). A program may have hundreds of thousands of
either, of some hundred KiB each. proc(5) tells of both by network namespace, and each sandbox has one of its own. To
list connections the kernel looks through the whole machine's, which takes milliseconds, so that is done for sandboxes
with many sockets only; how many there are is known at once.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from era.drivers.memory import MemoryWatch

FEW = 64
"""So many sockets of a sandbox aren't looked at."""

_SHARE_OF_MEMORY = 4
"""A sandbox may have a quarter of its memory in these besides."""

_CONNECTION_BYTES = 16 << 10
"""What a connection that waits to be accepted takes at least. A server may be slow to accept some hundred."""

_PER_BYTE = 2
"""What is held takes about twice of what it is: the kernel counts the bytes, or the buffers without their edges."""

_OPEN = ("01", "08")
"""Established, or closed by the other side. Connections in these states that nobody has yet have the inode 0."""

_USED = re.compile(r"sockets: used (\d+)")


class SocketWatch(MemoryWatch):
    """Ends a run, or processes beside it, once the sandbox has too much unread that its group doesn't count."""

    interval = first = 0.1

    @classmethod
    def of(cls, pid: int, memory_bytes: int, kill: Callable[[], Awaitable[bool]]) -> SocketWatch:
        """That of the sandbox whose PID 1 this is, and which may have so much memory. See MemoryWatch for `kill`."""
        return cls(memory_bytes // _SHARE_OF_MEMORY, lambda: unread_bytes(pid), kill)


def unread_bytes(pid: int) -> int:
    """The bytes that lie unread and uncounted in the network namespace of a process, estimated; 0 where that has few
    sockets. Raises OSError where it has ended."""
    found = _USED.match(_told(pid, "sockstat"))
    if found is None or int(found[1]) <= FEW:
        return 0
    netlink = sum(int(row[4]) for row in _rows(pid, "netlink"))
    rows = (row for name in ("tcp", "tcp6") for row in _rows(pid, name))
    waiting = [int(row[4].partition(":")[2], 16) for row in rows if row[3] in _OPEN and row[9] == "0"]
    return _PER_BYTE * (netlink + sum(waiting)) + _CONNECTION_BYTES * len(waiting)


def _rows(pid: int, name: str) -> Iterator[list[str]]:
    """A table of proc_pid_net(5) without its head; none where the kernel has no such protocol."""
    try:
        return map(str.split, _told(pid, name).splitlines()[1:])
    except FileNotFoundError:
        return iter(())


def _told(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/net/{name}").read_text()
