"""Sparse files: where a file has data, and where it has holes that read as zeros and take no disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator


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
