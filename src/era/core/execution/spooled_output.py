"""What a run writes to stdout or stderr: kept without filling the memory, and read while it grows and afterwards.

The first bytes stay in memory, so nothing that is short ever touches a disk. What is longer goes to a temporary file
without a name, a piece at a time and on a thread. So whatever programs print, a run holds little of it in memory, and
whoever reads it as little.
"""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from era.core.trees.blob_store import BlobBatch

MEMORY_BYTES = 256 << 10
"""Of each stream, how much is in memory at most. What is shorter is in memory as a whole."""

PIECE = 64 << 10
"""Bytes of a piece that is read."""


class SpooledOutput:
    """What a run has written to one stream so far. Close it, or have it collected."""

    def __init__(self, directory: Path | None = None) -> None:
        """`directory` is where temporary files go."""
        self._directory = directory
        self._fd = -1
        self._close: Callable[[], object] = lambda: None
        self._state = 0, bytearray()
        """How many bytes are in the file, and what comes after those. It is one object, since threads replace it."""

        self._writing = False
        self._shared = False

    @classmethod
    def of_file(cls, fd: int) -> SpooledOutput:
        """The content of a file, which this takes over."""
        made = cls()
        made._take(fd)
        made._state = os.fstat(fd).st_size, bytearray()
        return made

    @property
    def size(self) -> int:
        in_file, buffer = self._state
        return in_file + len(buffer)

    async def append(self, data: bytes) -> None:
        """Add what was written. Raises OSError where the disk fails. Only one call may be under way."""
        buffer = self._state[1]
        buffer += data
        if len(buffer) > MEMORY_BYTES:
            self._writing = True
            await asyncio.to_thread(self._write)
            self._writing = False

    async def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`, which have been written by now. Raises OSError where the disk fails."""
        in_file, buffer = self._state
        from_file = b""
        while start < min(end, in_file):
            piece = await asyncio.to_thread(os.pread, self._fd, min(end, in_file) - start, start)
            if not piece:
                raise OSError(errno.EIO, "what was written is gone")
            from_file += piece
            start += len(piece)
        return from_file + buffer[start - in_file : max(end - in_file, 0)]

    async def pieces(self, start: int, end: int) -> AsyncIterator[bytes]:
        """The same in pieces."""
        for at in range(start, end, PIECE):
            yield await self.read(at, min(at + PIECE, end))

    async def whole(self) -> bytes:
        """All of it. Only for what is small."""
        return await self.read(0, self.size)

    def so_far(self) -> SpooledOutput:
        """A copy of what has been written by now, which stays as it is and has a life of its own."""
        copy = SpooledOutput()
        in_file, buffer = self._state
        if in_file:
            copy._take(os.dup(self._fd))
        copy._state = in_file, buffer[:]
        return copy

    def another(self) -> SpooledOutput:
        """A new one with its temporary file in the same place."""
        return SpooledOutput(self._directory)

    def put(self, batch: BlobBatch) -> str:
        """Put all of it into a batch of the blob store, once nothing is appended any more. Returns the digest. Blocks;
        raises OSError."""
        if self._fd < 0:
            return batch.put(bytes(self._state[1]))
        self._write()
        os.lseek(self._fd, 0, os.SEEK_SET)
        return batch.put_file(self._fd, self.size)

    def share(self) -> None:
        """Somebody reads this besides the one who closes it: it goes with the last who knows it."""
        self._shared = True

    def close(self) -> None:
        if not self._writing and not self._shared:  # while a thread writes it has the file still
            self._close()

    def _take(self, fd: int) -> None:
        self._fd = fd
        self._close = weakref.finalize(self, os.close, fd)  # which frees 16 MiB in 1 to 3 ms

    def _write(self) -> None:
        """Write the buffer to the file. Blocks; raises OSError."""
        if self._fd < 0:
            with tempfile.TemporaryFile(dir=self._directory, buffering=0) as file:
                self._take(os.dup(file.fileno()))
        at, buffer = self._state
        view = memoryview(buffer)
        while view:
            count = os.pwrite(self._fd, view, at)
            at, view = at + count, view[count:]
        self._state = at, bytearray()
