"""Blobs that lie elsewhere, kept on the local disk while there is room: whatever was used longest ago goes first.

Nothing here must last, so nothing is synced, and a new process starts with an empty directory. What is in the cache was
checked when it came, and its files never change, so it needs no check again.
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
    """A file on its way into the cache."""

    def __init__(self, fd: int, path: str) -> None:
        self.fd = fd
        self.path = path
        self.size = 0

    def clear(self) -> None:
        os.ftruncate(self.fd, 0)
        os.lseek(self.fd, 0, os.SEEK_SET)
        self.size = 0

    def write(self, content: bytes) -> None:
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
        Path(self._directory).mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in os.listdir(self._directory):
            os.unlink(f"{self._directory}/{leftover}")

    def clear(self) -> None:
        """Let go of everything."""
        with self._lock:
            for digest in self._sizes:
                os.unlink(f"{self._directory}/{digest}")
            self._sizes.clear()
            self._total = 0

    def __contains__(self, digest: str) -> bool:
        with self._lock:
            return digest in self._sizes

    def find(self, digest: str) -> int | None:
        """A descriptor to read from, the caller's to close; None if it isn't here."""
        with self._lock:
            if digest not in self._sizes:
                return None
            self._sizes.move_to_end(digest)
            return os.open(f"{self._directory}/{digest}", os.O_RDONLY | os.O_CLOEXEC)

    @contextmanager
    def incoming(self) -> Iterator[Incoming]:
        """A new file, without a name afterwards unless it was handed to `keep`."""
        path = f"{self._directory}/incoming.{next(self._numbers)}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            yield Incoming(fd, path)
        finally:
            os.close(fd)
            with suppress(FileNotFoundError):
                os.unlink(path)

    def keep(self, digest: str, new: Incoming) -> None:
        """Take a complete file in, unless it is larger than a quarter of the cache."""
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
