"""An LRU cache on the local disk for the blobs of `s3_blobs`.

Nothing here must last, so nothing is synced, and a new process starts with an empty directory. A blob's digest is
checked before it enters the cache, and its file never changes, so it isn't checked again.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path


class Incoming:
    """A file that is being written and may enter the cache."""

    def __init__(self, fd: int, path: str) -> None:
        self.fd = fd
        self.path = path
        self.size = 0

    def clear(self) -> None:
        """Discard what was written, to begin again."""
        os.ftruncate(self.fd, 0)
        os.lseek(self.fd, 0, os.SEEK_SET)
        self.size = 0

    def write(self, content: bytes) -> None:
        """Append `content`. Raises OSError."""
        self.size += len(content)
        view = memoryview(content)
        while view:
            view = view[os.write(self.fd, view) :]


class BlobCache:
    """At most `limit` bytes of blobs in `directory`, which belongs to one process. `open` before anything."""

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory = os.fspath(directory)
        self._limit = limit
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._total = 0
        self._numbers = count()

    def open(self) -> None:
        """Make the directory, or empty it."""
        Path(self._directory).mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in os.listdir(self._directory):
            os.unlink(f"{self._directory}/{leftover}")

    def clear(self) -> None:
        """Remove every blob."""
        with self._lock:
            for digest in self._sizes:
                os.unlink(f"{self._directory}/{digest}")
            self._sizes.clear()
            self._total = 0

    def __contains__(self, digest: str) -> bool:
        with self._lock:
            return digest in self._sizes

    def find(self, digest: str) -> int | None:
        """A descriptor to read a blob from, which the caller closes; None if it isn't cached. It becomes the most
        recently used blob."""
        with self._lock:
            if digest not in self._sizes:
                return None
            self._sizes.move_to_end(digest)
            return os.open(f"{self._directory}/{digest}", os.O_RDONLY | os.O_CLOEXEC)

    @contextmanager
    def incoming(self) -> Iterator[Incoming]:
        """A new file to write a blob to, removed after the block unless it was handed to `keep`. Raises OSError."""
        path = f"{self._directory}/incoming.{next(self._numbers)}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            yield Incoming(fd, path)
        finally:
            os.close(fd)
            with suppress(FileNotFoundError):
                os.unlink(path)

    def keep(self, digest: str, new: Incoming) -> None:
        """Add a complete file as the blob `digest`, and remove the least recently used blobs until all fit. A file that
        is larger than a quarter of the cache isn't added: it would drive out too many others."""
        if new.size > self._limit // 4:
            return
        with self._lock:
            os.rename(new.path, f"{self._directory}/{digest}")
            self._total += new.size - self._sizes.pop(digest, 0)
            self._sizes[digest] = new.size
            while self._total > self._limit:
                oldest, size = self._sizes.popitem(last=False)
                os.unlink(f"{self._directory}/{oldest}")
                self._total -= size
