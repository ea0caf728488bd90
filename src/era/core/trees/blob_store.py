"""What keeps content by its digest, as snapshots, outputs and stored values need it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol


class BlobBatch(Protocol):
    """Blobs that become durable together. Raises OSError."""

    def put(self, content: bytes) -> str:
        """Put `content`. Returns its digest."""
        ...

    def put_file(self, fd: int, size: int) -> str:
        """Put the next `size` bytes of `fd`, or fewer if it ends before. Returns their digest."""
        ...

    def put_spooled(self, path: str, digest: str) -> None:
        """Put the file at `path`, which has this digest and won't be changed any more."""
        ...


@dataclass(slots=True)
class CountingBatch:
    """A batch that counts the bytes that are put into it."""

    _batch: BlobBatch
    total: int = 0

    def put(self, content: bytes) -> str:
        self.total += len(content)
        return self._batch.put(content)

    def put_file(self, fd: int, size: int) -> str:
        self.total += size
        return self._batch.put_file(fd, size)

    def put_spooled(self, path: str, digest: str) -> None:
        self.total += os.path.getsize(path)
        self._batch.put_spooled(path, digest)


class Hold(Protocol):
    """What keeps content. Its methods block. `release` may be called at any time."""

    def everything(self) -> None: ...

    def only(self, digests: Iterable[str]) -> None: ...

    def release(self) -> None: ...


class BlobStore(Protocol):
    """Content by its SHA-256 in hexadecimal; store/blobs/blobs.py and store/blobs/s3_blobs.py implement it.

    Methods block, and are called from several threads. Failures are OSErrors, whose `strerror` is shown to clients.
    """

    @property
    def last_put(self) -> float:
        """When a batch last ended, committed or not, in seconds since 1970; or else when the store was made."""
        ...

    @property
    def written_bytes(self) -> int:
        """How many bytes of the disk this process has written."""
        ...

    def time(self) -> float:
        """Now, in seconds since 1970, by the clock to which times here refer."""
        ...

    def batch(self) -> AbstractContextManager[BlobBatch]:
        """A batch, whose content is durable once the block has ended without an exception."""
        ...

    def naming(self) -> AbstractContextManager[None]:
        """A block that puts content and commits the row that names it: no such content is swept before its end."""
        ...

    def unnamed_since(self) -> float | None:
        """What was put before this time, in seconds since 1970, is named by a row now or never will be. None where that
        isn't known, since other processes put content, too."""
        ...

    def is_crowded(self, garbage: int) -> bool:
        """Whether so many bytes of garbage may fill the disk."""
        ...

    def get(self, digest: str) -> bytes:
        """The whole content of a blob."""
        ...

    def open_blob(self, digest: str) -> int:
        """A descriptor that reads a blob from its start; the caller must close it."""
        ...

    def renew(self, digest: str) -> bool:
        """Whether there is such a blob; then it counts as put now."""
        ...

    def hold(self) -> Hold | None:
        """What can keep content, whoever else may sweep. None where content is kept by `renew`."""
        ...

    def expect(self, digests: Iterable[str]) -> None:
        """A hint that these are about to be read, so that a remote store can fetch them together."""
        ...

    def sweep(self, keep: set[str], older_than: float) -> int:
        """Delete blobs that aren't in `keep` and were last put before `older_than` (seconds since 1970).

        Returns how many were deleted.
        """
        ...
