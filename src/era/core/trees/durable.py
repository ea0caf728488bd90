"""Flushing files and file systems to disk, and what the file system of a working directory can be relied on for."""

from __future__ import annotations

import ctypes
import os

_TMPFS_MAGIC = 0x01021994
_TIMES_TELL_OF_MAPS = (0xEF53, 0x58465342, 0x9123683E, 0xF2F52010)  # ext4, XFS, Btrfs, F2FS

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


def is_tmpfs(fd: int) -> bool:
    """Whether a file is on tmpfs. Raises OSError."""
    return _file_system(fd) == _TMPFS_MAGIC


def times_tell_of_maps(fd: int) -> bool:
    """Whether a file is on a file system of which it is known that the first write through a new map changes a file's
    times. Raises OSError."""
    return _file_system(fd) in _TIMES_TELL_OF_MAPS


def _file_system(fd: int) -> int:
    """The type of the file system that a file is on, by fstatfs(2), which Python lacks. Raises OSError."""
    status = ctypes.create_string_buffer(256)  # struct statfs, which begins with the type as a long
    if _libc.fstatfs(fd, status) != 0:
        raise OSError(ctypes.get_errno(), "fstatfs failed")
    return ctypes.c_long.from_buffer(status).value
