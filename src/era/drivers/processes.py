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


def unnamed(pids: Iterable[int], device: int) -> dict[int, int]:
    """The deleted files on `device` that these processes have open or mapped: the bytes that each takes, by inode.

    The kernel shows files that are only mapped to a service with CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE; others have
    none of them here.
    """
    found: dict[int, int] = {}
    for pid in pids:
        for kind in ("fd", "map_files"):
            with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/{kind}") as entries:
                for entry in entries:
                    try:
                        status = entry.stat()
                    except PermissionError:
                        break  # all of them are closed to us
                    except OSError:
                        continue  # it was closed meanwhile
                    if status.st_nlink == 0 and status.st_dev == device:
                        found[status.st_ino] = status.st_blocks * _BLOCK
    return found
