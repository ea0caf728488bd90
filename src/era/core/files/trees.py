"""Looking at a working directory, and putting what is new of it into a batch of blobs.

Theory of operation. `Scan.look` walks the directory and reads no file: it applies the bounds and marks what is known
from the look before (same inode, size, times and mode) with its digest. `store` then visits only what has none.

A file that looks the same may have changed all the same:
  - One whose ctime is as young as the look could be written once more within the clock's tick (git calls this racy).
    It isn't *settled*: next time it is read again. We take a tick to be 50 ms at most; kernels have 1 to 10.
  - tmpfs doesn't touch a file's times when it is written through a memory map. There nothing is taken for known.

Where the directory is watched (see watch.py) a look goes only to what was touched, and the rest stays as it was known.

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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from era.core.files.watch import Touched, Watch
from era.core.models import STATE_FILE

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
UPLOADED = (1,)
"""What ends the entry of a file that a client has put. Others have nothing there."""

_TICK_NS = 50_000_000
_TMPFS_MAGIC = 0x01021994
_CHUNK = 1 << 20


class SnapshotRefused(Exception):
    """The working directory can't be kept: the message says which bound it broke."""


class WorkspaceFull(SnapshotRefused):
    """There are more files in it, or more bytes, than the session may have."""


class BlobBatch(Protocol):
    """Puts that become durable together."""

    def put(self, content: bytes) -> str:
        """The digest of `content`."""
        ...

    def put_file(self, fd: int, size: int) -> str:
        """The digest of the next `size` bytes of `fd`, or fewer where it ends before."""
        ...

    def put_spooled(self, path: str, digest: str) -> None:
        """Put the content of the file at `path`, of which the digest is known and nothing will ever be changed."""
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

    @property
    def kept(self) -> tuple[int, int]:
        """What a tree object says of it besides its content: mode and time."""
        return self.mode & 0o777, self.mtime_ns


@dataclass(slots=True)
class File:
    seen: Seen
    settled: bool
    """Whether any later change will show."""

    digest: str | None = None
    uploaded: bool = False
    """Put by a client and not touched by a run since."""


class Link(NamedTuple):
    target: str
    mtime_ns: int


class Totals(NamedTuple):
    """What a directory holds, all the way down."""

    entries: int = 0
    files: int = 0
    total_bytes: int = 0

    def plus(self, other: Totals) -> Totals:
        return Totals(self.entries + other.entries, self.files + other.files, self.total_bytes + other.total_bytes)

    def minus(self, other: Totals) -> Totals:
        return Totals(self.entries - other.entries, self.files - other.files, self.total_bytes - other.total_bytes)


@dataclass(slots=True)
class Tree:
    """A directory, its entries by name. `digest` is None as long as it isn't known to be stored."""

    mode: int = 0o700
    files: dict[str, File] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)
    trees: dict[str, Tree] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)
    """Pipes, sockets and devices: counted, but not kept."""

    digest: str | None = None
    totals: Totals = field(default_factory=Totals)

    def held(self, name: str) -> Totals:
        """What the entry of this name, if there is one, adds to the totals."""
        if name in self.files:
            return Totals(1, 1, self.files[name].seen.size)
        if name in self.links:
            return Totals(1, 1, len(raw(self.links[name].target)))
        if name in self.trees:
            return Totals(1).plus(self.trees[name].totals)
        return Totals(1) if name in self.others else Totals()

    def sum_up(self) -> None:
        """Set `totals` from the entries."""
        totals = Totals()
        for name in (*self.files, *self.links, *self.trees, *self.others):
            totals = totals.plus(self.held(name))
        self.totals = totals

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
            ("file", portable(name), file.digest, file.seen.size, *file.seen.kept, *UPLOADED[: file.uploaded])
            for name, file in self.files.items()
        ]
        entries += [("link", portable(name), link.target, link.mtime_ns) for name, link in self.links.items()]
        entries += [("dir", portable(name), tree.digest, tree.mode) for name, tree in self.trees.items()]
        return encode(entries)


class MoreThanAGlance(Exception):
    """The tree has more entries than were to be looked at."""


class MustLookEverywhere(Exception):
    """Something was changed in a way that touched places don't tell of."""


class Scan:
    """One look at a working directory."""

    def __init__(self, bounds: Bounds, *, glance: int | None = None, watch: Watch | None = None) -> None:
        self._bounds = bounds
        self._glance = glance
        self._watch = watch
        self._again = False
        self._seen_so_far = Totals()
        self._started = time.time_ns()

    def look(self, root: int, known: Tree | None) -> Tree:
        """What is there. Trees and files that are known have a digest. Raises SnapshotRefused, MoreThanAGlance."""
        return self._look(root, None if known is None or is_tmpfs(root) else known, ())

    def look_again(self, root: int, known: Tree, touched: Touched) -> Tree:
        """What is there, where all but `touched` is as it was `known`: that very tree if nothing changed.

        Raises SnapshotRefused, MustLookEverywhere.
        """
        self._again = True
        tree = self._look_again(root, known, touched, ())
        self._check(tree.totals)
        return tree

    def _look(self, fd: int, known: Tree | None, path: tuple[str, ...]) -> Tree:
        if len(path) > self._bounds.depth:
            raise SnapshotRefused(f"the working directory is nested deeper than {self._bounds.depth} directories")
        if self._watch is not None:
            self._watch.add(fd, path)
        tree = Tree()
        children: list[tuple[str, int]] = []
        with os.scandir(fd) as entries:
            for entry in entries:
                name = entry.name
                if not path and name == STATE_FILE:
                    continue
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    children.append((name, status.st_mode))
                    self._count(Totals(1))
                else:
                    self._put(tree, fd, name, status, known, path)
                    self._count(tree.held(name))
        for name, mode in children:
            tree.trees[name] = self._look_into(fd, name, mode, known, path)
        tree.sum_up()
        if known is not None and known.digest is not None and tree.is_known(known):
            tree.digest = known.digest
        return tree

    def _look_into(self, fd: int, name: str, mode: int, known: Tree | None, path: tuple[str, ...]) -> Tree:
        with _opened(fd, name, mode) as child:
            below = self._look(child, known.trees.get(name) if known else None, (*path, name))
        below.mode = mode & 0o777
        return below

    def _look_again(self, fd: int, known: Tree, touched: Touched, path: tuple[str, ...]) -> Tree:
        tree = replace(
            known,
            files=dict(known.files),
            links=dict(known.links),
            trees=dict(known.trees),
            others=set(known.others),
            digest=None,
        )
        for name in touched.names | touched.below.keys():
            if not path and name == STATE_FILE:
                continue
            try:
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                status = None
            before = tree.held(name)
            was = known.trees.get(name)
            tree.others.discard(name)
            for kind in (tree.files, tree.links, tree.trees):
                kind.pop(name, None)
            if status is not None and stat.S_ISDIR(status.st_mode):
                if was is None or name in touched.new:
                    tree.trees[name] = self._look_into(fd, name, status.st_mode, known, path)
                else:
                    tree.trees[name] = self._look_again_into(fd, name, status.st_mode, was, touched, path)
            elif status is not None:
                self._put(tree, fd, name, status, known, path)
            tree.totals = tree.totals.minus(before).plus(tree.held(name))
        unchanged = known.digest is not None and tree.is_known(known) and tree.others == known.others
        return known if unchanged else tree

    def _look_again_into(
        self, fd: int, name: str, mode: int, was: Tree, touched: Touched, path: tuple[str, ...]
    ) -> Tree:
        below = was
        if name in touched.below:
            with _opened(fd, name, mode) as child:
                below = self._look_again(child, was, touched.below[name], (*path, name))
        if below.mode != mode & 0o777:
            below = replace(below, mode=mode & 0o777)
        return below

    def _put(
        self, tree: Tree, fd: int, name: str, status: os.stat_result, known: Tree | None, path: tuple[str, ...]
    ) -> None:
        """Enter what is no directory."""
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFREG:
            tree.files[name] = self._file(seen(status), known.files.get(name) if known else None)
            if self._watch is not None and self._watch.note_links(path, name, status.st_nlink) and self._again:
                raise MustLookEverywhere
        elif kind == stat.S_IFLNK:
            tree.links[name] = Link(portable(os.readlink(name, dir_fd=fd)), status.st_mtime_ns)
        else:
            tree.others.add(name)

    def _file(self, now: Seen, known: File | None) -> File:
        file = File(now, settled=now.ctime_ns < self._started - _TICK_NS)
        if known is not None and known.seen == now:
            file.uploaded = known.uploaded
            file.digest = known.digest if known.settled else None
        return file

    def _count(self, more: Totals) -> None:
        self._seen_so_far = self._seen_so_far.plus(more)
        if self._glance is not None and self._seen_so_far.entries > self._glance:
            raise MoreThanAGlance
        self._check(self._seen_so_far)

    def _check(self, totals: Totals) -> None:
        if totals.entries > self._bounds.entries:
            raise WorkspaceFull(f"the working directory holds more than {self._bounds.entries} files and directories")
        if totals.total_bytes > self._bounds.total_bytes:
            raise WorkspaceFull(f"the working directory holds more than {self._bounds.total_bytes} bytes")


def store(fd: int, tree: Tree, known: Tree | None, batch: BlobBatch) -> str:
    """Put whatever of `tree`, the directory open as `fd`, has no digest yet, and give it one, which is the answer."""
    for name, file in tree.files.items():
        if file.digest is None:
            with _opened(fd, name, file.seen.mode) as content:
                file.digest = _store_file(content, file, known.files.get(name) if known else None, batch)
    for name, child in tree.trees.items():
        if child.digest is None:
            with _opened(fd, name, stat.S_IFDIR | child.mode) as below:
                store(below, child, known.trees.get(name) if known else None, batch)
    tree.digest = batch.put(tree.encoded())
    return tree.digest


def _store_file(fd: int, file: File, known: File | None, batch: BlobBatch) -> str:
    if os.fstat(fd).st_ino != file.seen.inode:
        raise SnapshotRefused("the working directory changed while it was being kept")
    if known is not None and known.digest is not None and known.seen == file.seen:
        # Not settled when it was last seen, but most likely the same: find out without writing a copy.
        if _digest(fd) == known.digest:
            return known.digest
        os.lseek(fd, 0, os.SEEK_SET)
    file.uploaded = False
    return batch.put_file(fd, file.seen.size)


def _digest(fd: int) -> str:
    hasher = hashlib.sha256()
    while piece := os.read(fd, _CHUNK):
        hasher.update(piece)
    return hasher.hexdigest()


def encode(entries: list[Any]) -> bytes:
    """The tree object of these entries."""
    entries.sort(key=lambda entry: raw(entry[1]))
    return json.dumps(entries, separators=(",", ":")).encode()


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


@contextmanager
def opened_directory(parent: int, name: str) -> Iterator[int]:
    """A directory that will get its mode when all is done, opened to change what is in it."""
    mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    if mode & 0o700 != 0o700 and os.geteuid() != 0:
        _change_mode(parent, name, mode | 0o700)
    with closing(os.open(name, DIRECTORY, dir_fd=parent)) as fd:
        yield fd


def remove(parent: int, name: str) -> None:
    """Remove whatever is under this name, if anything is, with all that is below."""
    try:
        mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        os.unlink(name, dir_fd=parent)
        return
    with opened_directory(parent, name) as fd:
        for child in os.listdir(fd):
            remove(fd, child)
    os.rmdir(name, dir_fd=parent)


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


def is_tmpfs(fd: int) -> bool:
    status = ctypes.create_string_buffer(256)  # struct statfs, which begins with the type as a long
    if _libc.fstatfs(fd, status) != 0:
        raise OSError(ctypes.get_errno(), "fstatfs failed")
    return ctypes.c_long.from_buffer(status).value == _TMPFS_MAGIC
