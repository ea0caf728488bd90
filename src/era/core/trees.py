"""Looking at a working directory, and putting what is new of it into a batch of blobs.

Theory of operation. `Scan.look` walks the directory and reads no file: it applies the bounds and marks what is known
from the look before (same inode, size, times and mode) with its digest. `store` then visits only what has none.

A file that looks the same may have changed all the same:
  - One whose ctime is as young as the look could be written once more within the clock's tick (git calls this racy).
    It isn't *settled*: next time it is read again. We take a tick to be 50 ms at most; kernels have 1 to 10.
  - tmpfs doesn't touch a file's times when it is written through a memory map. There nothing is taken for known.

The directory is written by hostile code, which is dead by the time we look (nothing changes while we do). So a name
may be anything, but it stays what it is: every name is opened relative to its directory's descriptor, one component
at a time, never through a link and never waiting, and what was opened is checked to be what was seen.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from era.core.models import STATE_FILE
from era.core.ports import SnapshotRefused

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_TICK_NS = 50_000_000
_TMPFS_MAGIC = 0x01021994
_CHUNK = 1 << 20


class BlobBatch(Protocol):
    """Puts that become durable together."""

    def put(self, content: bytes) -> str:
        """The digest of `content`."""
        ...

    def put_file(self, fd: int, size: int) -> str:
        """The digest of the next `size` bytes of `fd`, or fewer where it ends before."""
        ...


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a working directory may hold and still be kept."""

    entries: int = 200_000
    total_bytes: int = 4 << 30
    depth: int = 128


class Seen(NamedTuple):
    """What tells one state of a file from another without reading it."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    mode: int


@dataclass(slots=True)
class File:
    seen: Seen
    settled: bool
    """Whether any later change will show."""

    digest: str | None = None


class Link(NamedTuple):
    target: str
    mtime_ns: int


@dataclass(slots=True)
class Tree:
    """A directory, its entries by name. `digest` is None as long as it isn't known to be stored."""

    mode: int = 0o700
    files: dict[str, File] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)
    trees: dict[str, Tree] = field(default_factory=dict)
    digest: str | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.files or self.links or self.trees)

    def is_known(self, known: Tree) -> bool:
        """Whether nothing in this tree is new or gone since it was `known`."""
        return (
            self.links == known.links
            and self.files.keys() == known.files.keys()
            and self.trees.keys() == known.trees.keys()
            and all(file.digest is not None for file in self.files.values())
            and all(
                tree.digest is not None and tree.mode == known.trees[name].mode for name, tree in self.trees.items()
            )
        )

    def encoded(self) -> bytes:
        """The tree object: one form for one content."""
        entries: list[tuple[Any, ...]] = [
            ("file", portable(name), file.digest, file.seen.size, file.seen.mode & 0o777, file.seen.mtime_ns)
            for name, file in self.files.items()
        ]
        entries += [("link", portable(name), link.target, link.mtime_ns) for name, link in self.links.items()]
        entries += [("dir", portable(name), tree.digest, tree.mode) for name, tree in self.trees.items()]
        entries.sort(key=lambda entry: raw(entry[1]))
        return json.dumps(entries, separators=(",", ":")).encode()


class MoreThanAGlance(Exception):
    """The tree has more entries than were to be looked at."""


class Scan:
    """One look at a working directory, counting as it goes."""

    def __init__(self, bounds: Bounds, glance: int | None = None) -> None:
        self._bounds = bounds
        self._glance = glance
        self._entries = 0
        self._started = time.time_ns()
        self.file_count = 0
        self.total_bytes = 0

    def look(self, root: int, known: Tree | None) -> Tree:
        """What is there. Trees and files that are known have a digest. Raises SnapshotRefused, MoreThanAGlance."""
        return self._look(root, None if known is None or _is_tmpfs(root) else known, 0)

    def _look(self, fd: int, known: Tree | None, depth: int) -> Tree:
        if depth > self._bounds.depth:
            raise SnapshotRefused(f"the working directory is nested deeper than {self._bounds.depth} directories")
        tree = Tree()
        children: list[tuple[str, int]] = []
        with os.scandir(fd) as entries:
            for entry in entries:
                name = entry.name
                if depth == 0 and name == STATE_FILE:
                    continue
                self._count_entry()
                status = entry.stat(follow_symlinks=False)
                kind = stat.S_IFMT(status.st_mode)
                if kind == stat.S_IFREG:
                    self._count_file(status.st_size)
                    tree.files[name] = self._file(seen(status), known.files.get(name) if known else None)
                elif kind == stat.S_IFLNK:
                    self._count_file(status.st_size)
                    tree.links[name] = Link(portable(os.readlink(name, dir_fd=fd)), status.st_mtime_ns)
                elif kind == stat.S_IFDIR:
                    children.append((name, status.st_mode))
                # Pipes, sockets and devices aren't kept.
        for name, mode in children:
            with _opened(fd, name, mode) as child:
                below = self._look(child, known.trees.get(name) if known else None, depth + 1)
            below.mode = mode & 0o777
            tree.trees[name] = below
        if known is not None and known.digest is not None and tree.is_known(known):
            tree.digest = known.digest
        return tree

    def _file(self, now: Seen, known: File | None) -> File:
        file = File(now, settled=now.ctime_ns < self._started - _TICK_NS)
        if known is not None and known.settled and known.seen == now:
            file.digest = known.digest
        return file

    def _count_entry(self) -> None:
        self._entries += 1
        if self._glance is not None and self._entries > self._glance:
            raise MoreThanAGlance
        if self._entries > self._bounds.entries:
            raise SnapshotRefused(f"the working directory holds more than {self._bounds.entries} files and directories")

    def _count_file(self, size: int) -> None:
        self.file_count += 1
        self.total_bytes += size
        if self.total_bytes > self._bounds.total_bytes:
            raise SnapshotRefused(f"the working directory holds more than {self._bounds.total_bytes} bytes")


def store(fd: int, tree: Tree, known: Tree | None, batch: BlobBatch) -> None:
    """Put whatever of `tree`, the directory open as `fd`, has no digest yet, and give it one."""
    for name, file in tree.files.items():
        if file.digest is None:
            with _opened(fd, name, file.seen.mode) as content:
                file.digest = _store_file(content, file, known.files.get(name) if known else None, batch)
    for name, child in tree.trees.items():
        if child.digest is None:
            with _opened(fd, name, stat.S_IFDIR | child.mode) as below:
                store(below, child, known.trees.get(name) if known else None, batch)
    tree.digest = batch.put(tree.encoded())


def _store_file(fd: int, file: File, known: File | None, batch: BlobBatch) -> str:
    if os.fstat(fd).st_ino != file.seen.inode:
        raise SnapshotRefused("the working directory changed while it was being kept")
    if known is not None and known.digest is not None and known.seen == file.seen:
        # Not settled when it was last seen, but most likely the same: find out without writing a copy.
        if _digest(fd) == known.digest:
            return known.digest
        os.lseek(fd, 0, os.SEEK_SET)
    return batch.put_file(fd, file.seen.size)


def _digest(fd: int) -> str:
    hasher = hashlib.sha256()
    while piece := os.read(fd, _CHUNK):
        hasher.update(piece)
    return hasher.hexdigest()


def seen(status: os.stat_result) -> Seen:
    return Seen(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_mode)


def raw(name: str) -> bytes:
    """The bytes of a name as tree objects have it."""
    return name.encode("utf-8", "surrogateescape")


def portable(name: str) -> str:
    """A name as Python has it here, whatever this process's locale, as tree objects have it."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def native(name: str) -> str:
    """The reverse of `portable`."""
    return os.fsdecode(raw(name))


@contextmanager
def closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def opened_root(workspace: Path) -> Iterator[int]:
    """The working directory itself, whose path is the host's own and whose mode isn't kept."""
    mode = os.lstat(workspace).st_mode
    if _is_shut(mode):
        os.chmod(workspace, stat.S_IMODE(mode) | 0o700)
    with closing(os.open(workspace, DIRECTORY)) as fd:
        yield fd


@contextmanager
def _opened(parent: int, name: str, mode: int) -> Iterator[int]:
    """The file or directory that was seen with `mode` under this name, opened to read even if its mode forbids it."""
    shut = _is_shut(mode)
    if shut:
        _change_mode(parent, name, mode | 0o500)
    try:
        with closing(os.open(name, DIRECTORY if stat.S_ISDIR(mode) else _FILE, dir_fd=parent)) as fd:
            if stat.S_IFMT(os.fstat(fd).st_mode) != stat.S_IFMT(mode):
                raise SnapshotRefused("the working directory changed while it was being kept")
            yield fd
    finally:
        if shut:
            _change_mode(parent, name, mode)


def _is_shut(mode: int) -> bool:
    """Whether the owner of a file or directory of this mode, unless root, must change it in order to read."""
    needed = 0o500 if stat.S_ISDIR(mode) else 0o400
    return mode & needed != needed and os.geteuid() != 0


def _change_mode(parent: int, name: str, mode: int) -> None:
    # chmod(2) follows links and fchmod(2) needs a file that could be opened. A path descriptor is neither a problem.
    with closing(os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)) as fd:
        if stat.S_IFMT(os.fstat(fd).st_mode) != stat.S_IFMT(mode):
            raise SnapshotRefused("the working directory changed while it was being kept")
        os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(mode))


_libc = ctypes.CDLL(None, use_errno=True)


def _is_tmpfs(fd: int) -> bool:
    status = ctypes.create_string_buffer(256)  # struct statfs, which begins with the type as a long
    if _libc.fstatfs(fd, status) != 0:
        raise OSError(ctypes.get_errno(), "fstatfs failed")
    return ctypes.c_long.from_buffer(status).value == _TMPFS_MAGIC
