"""The spool: temporary files for uploads on their way into the blob store, so that memory stays flat.

The digest of content is known only when all of it has arrived. Until then it lies in a file of the spool's directory;
then the blob store takes the file over. Small content never becomes a file.

The number of large uploads at a time is bounded, since each takes memory, a descriptor and disk bandwidth. One too many
is refused at once instead of being kept waiting. An upload that waits for its session's turn isn't counted.

Owners share the number (core/concurrency/shares.py): an upload may take any time as long as it moves, so one owner
could have all of them for as long as he likes. Uploads by links (api/routes/links.py) are of the session's owner.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from era.core.concurrency.shares import Shares
from era.core.concurrency.tasks import Threads, to_its_end
from era.core.trees.blob_store import BlobBatch
from era.errors import TooManyUploads, Unavailable

SMALL = 64 << 10
"""Content of fewer bytes than this stays in memory."""

_PIECE = 1 << 20
_MOST_UPLOADS = 64
"""Large uploads at a time."""

_MOST_BUFFERED = 64 << 20
"""Bytes of uploads that are kept in memory until they are a piece, together. Beyond that they go to their files as soon
as they aren't small: there may be thousands of them, at any pace."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A complete upload. The content is in `content` if it is small, else in the file at `path`."""

    digest: str
    size: int
    content: bytes | None = field(default=None, repr=False)
    path: str = ""

    def put(self, batch: BlobBatch) -> None:
        """Put the content into a batch of the blob store."""
        if self.content is not None:
            batch.put(self.content)
        else:
            batch.put_spooled(self.path, self.digest)


class Slots:
    """A number of large uploads that may be under way at a time, shared by owners: one alone has half of them, rounded
    up. Unlike a semaphore it refuses instead of waiting."""

    def __init__(self, how_many: int = _MOST_UPLOADS) -> None:
        # One of a share is never taken. So there is one more, else a single slot would be nobody's.
        self._shares: Shares[str] = Shares(how_many + 1)

    @contextmanager
    def take(self, owner: str) -> Iterator[None]:
        """Take a slot for the block. Raises TooManyUploads where none is left for this owner."""
        if not self._shares.take(owner):
            own = self._shares.held(owner)
            whose, count = ("this owner", own) if own else ("all owners", self._shares.taken)
            raise TooManyUploads(f"{count} large uploads of {whose} are under way already.")
        try:
            yield
        finally:
            self._shares.give_back(owner)


class Spool:
    """Temporary files in a directory that only this process uses, on the blob store's file system if that is local.

    Call `open` first.
    """

    def __init__(self, directory: Path, slots: Slots) -> None:
        self._directory = directory
        self._slots = slots
        self._numbers = count()
        self._buffered = 0
        """Bytes of all uploads that are in memory while more of them is awaited."""

    def open(self) -> None:
        """Make the directory, and remove files that a killed process has left."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        for leftover in self._directory.iterdir():
            leftover.unlink()

    @asynccontextmanager
    async def receive(
        self, pieces: AsyncIterator[bytes], owner: str, threads: Threads, *, small: int = SMALL
    ) -> AsyncIterator[Upload]:
        """Receive all of `pieces` as an Upload of this owner's, which exists within the block.

        Content of fewer than `small` bytes stays in memory. Raises Unavailable where the disk fails, TooManyUploads.
        """
        buffer, counted, is_large = bytearray(), 0, False
        async with self._file_on(threads) as file:
            with ExitStack() as slot:
                try:
                    async for piece in pieces:
                        buffer += piece
                        self._buffered += len(buffer) - counted
                        counted = len(buffer)
                        if not is_large and file.size + counted >= _PIECE:
                            slot.enter_context(self._slots.take(owner))
                            is_large = True
                        if counted >= _PIECE or (counted >= max(small, SMALL) and self._buffered > _MOST_BUFFERED):
                            await _write(threads, file, bytes(buffer))
                            buffer.clear()
                            self._buffered -= counted
                            counted = 0
                finally:
                    self._buffered -= counted
            if file.size == 0 and len(buffer) < small:
                yield Upload(hashlib.sha256(buffer).hexdigest(), len(buffer), bytes(buffer))
                return
            await _write(threads, file, bytes(buffer))
            buffer.clear()
            yield file.finish()

    @contextmanager
    def store(self, pieces: Iterable[bytes]) -> Iterator[Upload]:
        """The same for content that needn't be waited for. Blocks, and raises OSError."""
        with self._file() as file:
            for piece in pieces:
                file.write(piece)
            yield file.finish()

    @contextmanager
    def _file(self) -> Iterator[_File]:
        """A new temporary file, removed after the block unless the blob store has taken it over."""
        file = self._new_file()
        try:
            yield file
        finally:
            file.remove()

    @asynccontextmanager
    async def _file_on(self, threads: Threads) -> AsyncIterator[_File]:
        """The same, for a file that is written and removed on these threads."""
        file = self._new_file()
        try:
            yield file
        finally:
            if file.exists:
                await threads.free(file.remove)

    def _new_file(self) -> _File:
        return _File(f"{self._directory}/{next(self._numbers)}")


async def _write(threads: Threads, file: _File, content: bytes) -> None:
    """Write to a file on a thread. Raises Unavailable where the disk fails. Where this is cancelled, the thread has
    done with the file before that is closed and removed."""
    try:
        await to_its_end(threads(file.write, content))
    except OSError as error:
        raise Unavailable(f"The body could not be kept: {error.strerror}.") from error


class _File:
    """A file that is written sequentially and hashed. It is created with the first write."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.size = 0
        self.exists = False
        """Whether it was created. The blob store may have taken it over since."""

        self._fd = -1
        self._hasher = hashlib.sha256()

    def write(self, content: bytes) -> None:
        if self._fd < 0:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self.exists = True
        self._hasher.update(content)
        view = memoryview(content)
        while view:
            view = view[os.write(self._fd, view) :]
        self.size += len(content)

    def finish(self) -> Upload:
        """What was written. The file stays open, or the kernel might forget that it couldn't be written."""
        return Upload(self._hasher.hexdigest(), self.size, path=self.path)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        self.close()
        with suppress(FileNotFoundError):
            os.unlink(self.path)


async def bounded(pieces: AsyncIterator[bytes], check: Callable[[int], None]) -> AsyncIterator[bytes]:
    """`pieces`, with `check` called before each with the total size up to its end; it raises to refuse."""
    total = 0
    async for piece in pieces:
        total += len(piece)
        check(total)
        yield piece
