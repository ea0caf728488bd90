"""What is written, made to last."""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)


def sync(path: str | os.PathLike[str]) -> None:
    """A file or directory. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file_system(path: str | os.PathLike[str]) -> None:
    """All of the file system that this is on, by syncfs(2), which Python lacks. Raises OSError, also for writes that
    failed earlier, since Linux 5.8."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd) != 0:
            raise OSError(ctypes.get_errno(), "the disk could not be synced")
    finally:
        os.close(fd)
