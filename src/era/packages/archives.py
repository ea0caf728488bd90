"""A package set as one file, for the blob store: a tar whose SHA-256 is the package set's name.

It is the same for equal content, whoever made it, when and where: entries in order, no times, no owners, modes that say
who may execute and nothing else. Bytecode isn't in it; that is compiled again where it is unpacked.
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
"""The first entry: what is in it."""

_CHUNK = 1 << 20
_BUFFER = 64 << 10


class Damaged(Exception):
    """The content isn't the one that goes by this name."""


def pack(directory: Path, file: Path) -> str:
    """Write a directory, which was checked and made fit to be shared (trees.py), to `file`; its SHA-256."""
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
    """Make `directory` what was packed under this name. Raises Damaged, before anything is written, where the content
    is another one; OSError."""
    if _digest(fd) != digest:
        raise Damaged(digest)
    os.lseek(fd, 0, os.SEEK_SET)
    with open(fd, "rb", closefd=False) as file, tarfile.open(fileobj=file, mode="r|", bufsize=_BUFFER) as archive:
        archive.extractall(directory, filter="data")


def lock_in(fd: int) -> JsonObject:
    """What is in an archive. Raises Damaged, OSError."""
    try:
        with open(fd, "rb", closefd=False) as file, tarfile.open(fileobj=file, mode="r|") as archive:
            first = archive.next()
            content = archive.extractfile(first) if first is not None and first.name == LOCK else None
            if content is None:
                raise Damaged("an archive without a lock")
            found: JsonObject = json.loads(content.read())
            return found
    except (tarfile.TarError, ValueError) as error:
        raise Damaged("an archive that can't be read") from error


def _names(directory: Path) -> list[str]:
    """Everything below it but the lock, each directory before what is in it."""
    found = (
        os.path.relpath(os.path.join(where, name), directory)
        for where, directories, files in os.walk(directory)
        for name in (*directories, *files)
    )
    return sorted(name for name in found if name != LOCK)


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
    """Where an archive is written to, once and front to back, and hashed meanwhile."""

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
