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


def sync_file_system(where: str | os.PathLike[str] | int) -> None:
    """Flush the whole file system that a path or a descriptor is on, by syncfs(2), which Python lacks.

    Raises OSError; since Linux 5.8 also for what could not be written since the descriptor was opened. With a path that
    is now: of earlier failures the kernel tells only what it hasn't told anybody yet.
    """
    fd = where if isinstance(where, int) else os.open(where, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd) != 0:
            raise OSError(ctypes.get_errno(), "the disk could not be synced")
    finally:
        if fd != where:
            os.close(fd)
