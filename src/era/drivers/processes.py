"""Processes of a sandbox as the host's /proc shows them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

_BLOCK = 512  # what st_blocks counts


def below(pid: int) -> list[int]:
    """`pid` and all its descendants."""
    found, pending = [], [pid]
    while pending:
        found.append(pid := pending.pop())
        with contextlib.suppress(OSError):  # it has ended
            for task in Path(f"/proc/{pid}/task").iterdir():
                pending += map(int, (task / "children").read_text().split())
    return found


def unnamed_bytes(pids: Iterable[int], device: int) -> int:
    """Bytes on disk of the files on `device` that these processes hold open and that have no name any more."""
    blocks: dict[int, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # closed meanwhile
                    status = entry.stat()
                    if status.st_nlink == 0 and status.st_dev == device:
                        blocks[status.st_ino] = status.st_blocks
    return sum(blocks.values()) * _BLOCK
