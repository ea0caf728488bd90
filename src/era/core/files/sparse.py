"""Sparse files: where a file has data, and where it has holes that read as zeros and take no disk."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator

_FICLONE = 0x40049409  # linux/fs.h
_WORTH_SHARING = 1 << 16


def extents(fd: int, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """The bytes of the file open as `fd` from `start` up to `end`, both offsets in bytes, as (offset, length, is_data).

    The extents come in order, without gaps, and end where the file does. A file system that knows nothing of holes has
    one extent of data, as lseek(2) has it. The descriptor's own position moves.
    """
    end = min(end, os.fstat(fd).st_size)
    while start < end:
        try:
            data = min(os.lseek(fd, start, os.SEEK_DATA), end)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = end  # the rest is a hole
        if data > start:
            yield start, data - start, False
        if data < end:
            hole = min(os.lseek(fd, data, os.SEEK_HOLE), end)
            yield data, hole - data, True
            data = hole
        start = data


def copy(content: int, fd: int, size: int) -> None:
    """Copy `size` bytes, all that the file open as `content` has, into the empty file open as `fd`. They share blocks
    where the file system can do that (ioctl_ficlone(2)), until one of them is written to; else holes stay holes. Raises
    OSError."""
    if _shared(content, fd, size):
        return
    for offset, length, is_data in extents(content, 0, size):
        if is_data:
            os.lseek(fd, offset, os.SEEK_SET)
            while length > 0 and (sent := os.sendfile(fd, content, offset, length)):
                offset, length = offset + sent, length - sent
    os.ftruncate(fd, size)


def copy_changing(content: int, fd: int, status: os.stat_result) -> None:
    """The same for a file that may change meanwhile, whose `status` was this: the copy ends where the file does by
    then. Where that had no holes, the copy has none either: what is cut off while it is read would look like one.
    Raises OSError."""
    size = status.st_size
    if status.st_blocks * 512 < size:
        copy(content, fd, size)
        return
    if _shared(content, fd, size):
        return
    offset = 0
    while offset < size and (sent := os.sendfile(fd, content, offset, size - offset)):
        offset += sent


def _shared(content: int, fd: int, size: int) -> bool:
    """Have the empty file `fd` share the blocks of another one, if it is large enough for that and the file system can.
    Returns whether it does."""
    if size < _WORTH_SHARING:
        return False
    try:
        fcntl.ioctl(fd, _FICLONE, content)
    except OSError:
        return False  # this file system can't, or these are two
    return True
