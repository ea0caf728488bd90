"""What the file system of a working directory can be relied on for."""

from __future__ import annotations

import ctypes

_TMPFS_MAGIC = 0x01021994
_TIMES_TELL_OF_MAPS = (0xEF53, 0x58465342, 0x9123683E, 0xF2F52010)  # ext4, XFS, Btrfs, F2FS

_libc = ctypes.CDLL(None, use_errno=True)


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
