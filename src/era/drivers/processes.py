"""The processes of a sandbox, by the host's /proc."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

_BLOCK = 512  # bytes, the unit of st_blocks


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
