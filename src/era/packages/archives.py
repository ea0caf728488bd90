"""Archives of package sets, for the blob store: a tar whose SHA-256 is the set's digest.

Equal content gives an equal archive, whoever made it, when and where: entries are sorted and have no times and no
owners, and of their modes only whether they are executable. Bytecode isn't included; it is compiled again where the
archive is unpacked.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import tarfile
from collections.abc import Buffer, Iterator
from pathlib import Path

from era.core.models import JsonObject

LOCK = "lock.json"
"""The first entry: the lock, which lists the packages (core/setup/locks.py)."""

_CHUNK = 1 << 20
_BUFFER = 64 << 10


class Damaged(Exception):
    """The blob of this digest isn't such an archive."""


def pack(directory: Path, file: Path) -> str:
    """Archive a directory, which has been through trees.check and trees.own, as `file`. Returns its SHA-256 in hex.
    Raises OSError."""
    with file.open("xb", buffering=0) as opened:
        hashed = _Hashed(opened)
        with tarfile.open(fileobj=hashed, mode="w|", format=tarfile.PAX_FORMAT, bufsize=_BUFFER) as archive:
            for name in (LOCK, *_names(directory)):
                path = directory / name
                entry = tarfile.TarInfo(name)
                status = path.lstat()
                if stat.S_ISLNK(status.st_mode):
                    entry.type, entry.linkname = tarfile.SYMTYPE, os.readlink(path)
                    archive.addfile(entry)
                elif stat.S_ISDIR(status.st_mode):
                    entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                    archive.addfile(entry)
                else:
                    entry.size, entry.mode = status.st_size, status.st_mode & 0o777
                    with path.open("rb") as content:
                        archive.addfile(entry, content)
    return hashed.digest()


def unpack(fd: int, digest: str, directory: Path) -> None:
    """Unpack the archive of this digest from `fd` into `directory`. Raises Damaged, before anything is written, if the
    content has another digest; OSError."""
    if _digest(fd) != digest:
        raise Damaged(digest)
    os.lseek(fd, 0, os.SEEK_SET)
    with open(fd, "rb", closefd=False) as file, tarfile.open(fileobj=file, mode="r|", bufsize=_BUFFER) as archive:
        archive.extractall(directory, filter="data")


def lock_in(fd: int) -> JsonObject:
    """The lock in an archive. Raises Damaged, OSError."""
    try:
        with open(fd, "rb", closefd=False) as file, tarfile.open(fileobj=file, mode="r|") as archive:
            first = archive.next()
            content = archive.extractfile(first) if first is not None and first.name == LOCK else None
            if content is None:
                raise Damaged("an archive without a lock")
            lock: JsonObject = json.loads(content.read())
            return lock
    except (tarfile.TarError, ValueError) as error:
        raise Damaged("an archive that can't be read") from error


def _names(directory: Path) -> list[str]:
    """The paths of everything below a directory but the lock, each directory before its content."""
    paths = (
        os.path.relpath(os.path.join(where, name), directory)
        for where, directories, files in os.walk(directory)
        for name in (*directories, *files)
    )
    return sorted(path for path in paths if path != LOCK)


def _digest(fd: int) -> str:
    hasher = hashlib.sha256()
    for piece in _pieces(fd):
        hasher.update(piece)
    return hasher.hexdigest()


def _pieces(fd: int) -> Iterator[bytes]:
    os.lseek(fd, 0, os.SEEK_SET)
    while piece := os.read(fd, _CHUNK):
        yield piece


class _Hashed(io.RawIOBase):
    """A file that is written once, from begin to end, and hashed meanwhile."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._hasher = hashlib.sha256()

    def write(self, content: Buffer, /) -> int:
        self._hasher.update(content)
        view = memoryview(content)
        while view:
            view = view[self._file.write(view) :]
        return memoryview(content).nbytes

    def digest(self) -> str:
        return self._hasher.hexdigest()
