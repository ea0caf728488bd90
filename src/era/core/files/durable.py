"""Flushing files and file systems to disk."""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)


def sync(path: str | os.PathLike[str]) -> None:
    """Flush a file or directory to disk, by fsync(2). Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file_system(path: str | os.PathLike[str]) -> None:
    """Flush the whole file system that `path` is on, by syncfs(2), which Python lacks.

    Raises OSError; since Linux 5.8 also for writes that failed earlier.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd) != 0:
            raise OSError(ctypes.get_errno(), "the disk could not be synced")
    finally:
        os.close(fd)
