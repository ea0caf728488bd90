"""The processes of a sandbox, by the host's /proc."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

_BLOCK = 512  # bytes, the unit of st_blocks
_TICKS = os.sysconf("SC_CLK_TCK")


def below(pid: int) -> list[int]:
    """`pid` and the pids of all its descendants."""
    pids, pending = [], [pid]
    while pending:
        pids.append(pid := pending.pop())
        with contextlib.suppress(OSError):  # it has ended
            for task in Path(f"/proc/{pid}/task").iterdir():
                pending += map(int, (task / "children").read_text().split())
    return pids


def unnamed_bytes(pids: Iterable[int], device: int) -> int:
    """Bytes on disk of deleted files on `device` that these processes still hold open."""
    blocks: dict[int, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # closed meanwhile
                    status = entry.stat()
                    if status.st_nlink == 0 and status.st_dev == device:
                        blocks[status.st_ino] = status.st_blocks
    return sum(blocks.values()) * _BLOCK


def cpu_seconds(pids: Iterable[int]) -> float:
    """Processor time that these processes have used, with that of their children that have ended (proc_pid_stat(5))."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
    return ticks / _TICKS


def memory_bytes(pids: Iterable[int]) -> int:
    """Memory of these processes that isn't that of files (proc_pid_status(5)). What they share by fork counts for
    each, what they share otherwise once."""
    anonymous = shared = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            sizes = {line[0]: int(line[1]) << 10 for line in lines if line[0] in ("RssAnon:", "RssShmem:")}
            anonymous += sizes.get("RssAnon:", 0)
            shared = max(shared, sizes.get("RssShmem:", 0))
    return anonymous + shared
