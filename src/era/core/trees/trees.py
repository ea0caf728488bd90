"""Scans of a working directory, tree objects, and storing what is new of a scanned tree in a batch of blobs.

Theory of operation. `Scan.full` walks the directory and reads no file: it applies the bounds, and marks with its digest
what is unchanged since the scan before (`known`), by inode, size, times and mode. `store` then reads only what has no
digest.

A file whose fingerprint is the same may have changed all the same:
  - One whose ctime is as young as the scan could be written again within the same tick of the clock (git calls this
    "racily clean"). It isn't *settled*: the next scan reads it again. We take a tick to be 50 ms at most; kernels have
    1 to 10.
  - tmpfs doesn't update a file's times when it is written through a memory map. There nothing is taken as known.
  - Elsewhere a page that is written to through a map updates them once, and then again only after the kernel has
    written it back. So a file that a process still has mapped is never known, nor settled.
  - Some ioctls of file systems exchange or erase what is in files and nothing else. Programs can't have these
    (drivers/seccomp.py, _UNTOLD).

If the directory is watched (see watch.py), `Scan.rescan` visits only what was touched; the rest stays as it is known.

The directory was written by hostile code, which is dead during a scan or stands still, so nothing changes meanwhile;
where that can't be had (`changing`), what is gone when it is looked at is left out. A name may be
anything, but it stays what it is: every name is opened relative to its directory's descriptor, one component at a time,
never following a link and never blocking, and what was opened is checked to be what was seen.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from era.core.models import STATE_FILE
from era.core.totals import Bounds, Totals, link_totals, spare_bytes, work_of_listing
from era.core.trees.blob_store import BlobBatch
from era.core.trees.durable import is_tmpfs
from era.core.trees.tree_objects import (
    NODE_MODULES,
    NPM_LIST,
    PACKAGES,
    ListTooLong,
    TreeNotSmall,
    encode,
    name_bytes,
    on_disk,
)
from era.core.trees.watch import Touched, Watch

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
UPLOADED = (1,)
"""The last element of a file's entry in a tree object, if a client has put it. Other files' entries lack it."""

GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EINVAL)
"""How opening or reading a name fails that is gone, or another kind of thing than it was."""

_TICK_NS = 50_000_000
_CHUNK = 1 << 20


class SnapshotRefused(Exception):
    """The working directory can't be kept: the message says which bound it broke."""


class Changed(SnapshotRefused):
    """Something is no longer what it was when it was scanned."""

    def __init__(self) -> None:
        super().__init__("the working directory changed while it was being kept")


class WorkspaceFull(SnapshotRefused):
    """There are more files in it, or more bytes, than the session may have."""


class Fingerprint(NamedTuple):
    """The metadata by which an unchanged file is recognised without reading it."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    mode: int

    @property
    def mode_and_mtime(self) -> tuple[int, int]:
        """The metadata that a tree object keeps: permission bits and modification time."""
        return self.mode & 0o777, self.mtime_ns


@dataclass(slots=True)
class File:
    """A regular file. `digest` is None as long as its content isn't known to be stored."""

    fingerprint: Fingerprint
    settled: bool
    """Whether any later change is certain to change the fingerprint."""

    digest: str | None = None
    uploaded: bool = False
    """Whether a client has put it and no run has changed it since."""

    spare_bytes: int = 0
    """See totals.py."""


class Link(NamedTuple):
    target: str
    mtime_ns: int


@dataclass(slots=True)
class Tree:
    """A directory: its entries by name. `digest` is None as long as its tree object isn't known to be stored."""

    mode: int = 0o700
    files: dict[str, File] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)
    trees: dict[str, Tree] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)
    """Pipes, sockets and devices: counted, but not kept."""

    digest: str | None = None
    totals: Totals = field(default_factory=Totals)
    spare_bytes: int = 0
    """Its own, which the totals don't have; see totals.py."""

    def totals_of(self, name: str) -> Totals:
        """The share of one entry in the totals; nothing for a name that doesn't exist."""
        if (file := self.files.get(name)) is not None:
            return Totals(1, 1, file.fingerprint.size, file.spare_bytes)
        if name in self.links:
            return link_totals(len(name_bytes(self.links[name].target)))
        if (tree := self.trees.get(name)) is not None:
            return Totals(1, 0, 0, tree.spare_bytes).plus(tree.totals)
        return Totals(1) if name in self.others else Totals()

    def update_totals(self) -> None:
        """Set `totals` from the entries."""
        names = (*self.files, *self.links, *self.trees, *self.others)
        self.totals = Totals(*map(sum, zip(Totals(), *map(self.totals_of, names), strict=True)))

    def own_totals(self) -> Totals:
        """The totals of a root without packages (see packages.py)."""
        totals = self.totals.minus(self.totals_of(PACKAGES))
        npm = self.trees.get(NODE_MODULES)
        npm_list = npm.files.get(NPM_LIST) if npm is not None else None
        return totals if npm_list is None or npm_list.uploaded else totals.minus(self.totals_of(NODE_MODULES))

    def unstored_bytes(self) -> int:
        """The sizes of all files that aren't known to be stored."""
        if self.digest is not None:
            return 0
        files = sum(file.fingerprint.size for file in self.files.values() if file.digest is None)
        return files + sum(tree.unstored_bytes() for tree in self.trees.values())

    @property
    def is_empty(self) -> bool:
        return not (self.files or self.links or self.trees)

    def matches(self, known: Tree) -> bool:
        """Whether this tree equals `known`, an earlier state of the same directory: nothing is new, changed or gone."""
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
        """The tree object, in its canonical form. All entries must have digests. Raises SnapshotRefused where it would
        be too long."""
        entries: list[tuple[Any, ...]] = [
            (
                "file",
                portable(name),
                file.digest,
                file.fingerprint.size,
                *file.fingerprint.mode_and_mtime,
                *UPLOADED[: file.uploaded],
            )
            for name, file in self.files.items()
        ]
        entries += [("link", portable(name), link.target, link.mtime_ns) for name, link in self.links.items()]
        entries += [("dir", portable(name), tree.digest, tree.mode) for name, tree in self.trees.items()]
        try:
            return encode(entries)
        except ListTooLong as error:
            raise SnapshotRefused(f"the working directory has {error}") from None


class FullScanNeeded(Exception):
    """inotify may have missed a change, so a scan of only what was touched isn't enough."""


class Scan:
    """One scan of a working directory; to be used once."""

    def __init__(
        self,
        bounds: Bounds,
        *,
        small: int | None = None,
        watch: Watch | None = None,
        packages: bool = False,
        mapped: Container[int] = (),
        changing: bool = False,
        asked_ns: int | None = None,
    ) -> None:
        """The scan gives up with TreeNotSmall where it looks at more than `small` entries, if given. Directories are
        added to `watch`. `packages`: also scan the directory of packages, beside the working directory. `mapped` are
        the inodes of files that processes have mapped, which may change without their metadata. `changing`: something
        may be going on in the directory; what is gone when it is looked at is left out. `asked_ns` is when `mapped` was
        asked for, where more may have been mapped since: it is the time that files have to be older than to be
        settled."""
        self._mapped = mapped
        self._changing = changing
        self.missed = False
        """Whether anything was gone when it was looked at."""

        self._bounds = bounds
        self._packages = packages
        self._small = small
        self._watch = watch
        self._is_rescan = False
        self._entries = self._total_bytes = self._spare_bytes = self._directories_of_packages = 0
        self._work = 0
        """Entries so far, and for how many those count that are much to list."""

        self._started = time.time_ns() if asked_ns is None else asked_ns
        self._newest_ns = 0
        """The newest ctime of directories below the root and of links, as it was behind each one's scan."""

    @property
    def was_still(self) -> bool:
        """Whether the tree of a `small` scan, as far as it is what was known before, is that of the moment at which the
        scan began, though something may be going on. The root is listed by one call. What was renamed since, or had
        entries added or removed, has a new ctime; so has a file, which isn't what was known then."""
        return self._small is not None and not self.missed and self._newest_ns < self._started - _TICK_NS

    def full(self, root: int, known: Tree | None) -> Tree:
        """Scan the whole directory open as `root`. In the result, unchanged files and trees of `known` have digests.

        Raises SnapshotRefused beyond the bounds, TreeNotSmall.
        """
        status = os.fstat(root)
        self._count(0, 0, spare_bytes(status), work_of_listing(status))
        tree = self._scan(root, None if known is None or is_tmpfs(root) else known, ())
        self._check_whole(root, tree)
        return tree

    def rescan(self, root: int, known: Tree, touched: Touched) -> Tree:
        """Scan only what was touched; the rest is as in `known`. Returns `known` itself if nothing has changed.

        Raises SnapshotRefused beyond the bounds, FullScanNeeded, TreeNotSmall.
        """
        self._is_rescan = True
        tree = self._rescan(root, known, touched, ())
        self._check_whole(root, tree)
        return tree

    def _scan(self, fd: int, known: Tree | None, path: tuple[str, ...]) -> Tree:
        """Scan the directory open as `fd`, at `path` below the root. Raises SnapshotRefused."""
        if len(path) > self._bounds.depth:
            raise SnapshotRefused(f"the working directory is nested deeper than {self._bounds.depth} directories")
        if self._watch is not None:
            self._watch.add(fd, path)
        tree = Tree()
        children: list[tuple[str, os.stat_result]] = []
        with os.scandir(fd) as entries:
            for entry in entries:
                name = entry.name
                if not path and name == STATE_FILE:
                    self._look_at_state_file(fd, arrived=True)
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode):
                        children.append((name, status))
                        work = 1 + work_of_listing(status)
                        if path[:1] == (PACKAGES,):
                            self._count_alone(work)
                        else:
                            self._count(1, 0, spare_bytes(status), work)
                    else:
                        self._add(tree, fd, name, status, known)
                        self._note_links(path, name, status, arrived=True)
                        more, _, total_bytes, spare = tree.totals_of(name)
                        self._count(more, total_bytes, spare, more)
                except (OSError, Changed) as error:
                    self._overlook(error)
        if self._packages and not path:
            children.append((PACKAGES, os.stat(on_disk(PACKAGES), dir_fd=fd, follow_symlinks=False)))
            self._count(0, 0, 0, work_of_listing(children[-1][1]))
        for name, status in children:
            try:
                tree.trees[name] = self._scan_child(fd, name, status, known, path)
            except (OSError, Changed) as error:
                self._overlook(error)
        if self._packages and not path:
            _drop_empty_packages(tree)
        if path:
            self._newest_ns = max(self._newest_ns, os.fstat(fd).st_ctime_ns)
        tree.update_totals()
        if known is not None and known.digest is not None and tree.matches(known):
            tree.digest = known.digest
        return tree

    def _scan_child(
        self, fd: int, name: str, status: os.stat_result, known: Tree | None, path: tuple[str, ...]
    ) -> Tree:
        """Scan a subdirectory of `fd` with this status; `known` and `path` are those of `fd`."""
        with opened(fd, name, status.st_mode) as child:
            below = self._scan(child, known.trees.get(name) if known else None, (*path, name))
        below.mode, below.spare_bytes = status.st_mode & 0o777, spare_bytes(status)
        return below

    def _rescan(self, fd: int, known: Tree, touched: Touched, path: tuple[str, ...]) -> Tree:
        """Scan what was touched in the directory open as `fd`, at `path` below the root."""
        tree = replace(
            known,
            files=dict(known.files),
            links=dict(known.links),
            trees=dict(known.trees),
            others=set(known.others),
            digest=None,
        )
        names = touched.names | touched.below.keys()
        if self._packages and not path:
            names.add(PACKAGES)  # its own mode is told of by nobody, and it may not have been watched yet
        for name in names:
            self._count(0, 0, 0, 1)
            if not path and name == STATE_FILE:
                self._look_at_state_file(fd, arrived=name in touched.arrived)
                continue
            try:
                status = os.stat(on_disk(name), dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                status = None
            before = tree.totals_of(name)
            was = known.trees.get(name)
            tree.others.discard(name)
            for kind in (tree.files, tree.links, tree.trees):
                kind.pop(name, None)
            try:
                if status is not None and stat.S_ISDIR(status.st_mode):
                    if was is None or name in touched.new:
                        self._count(0, 0, 0, work_of_listing(status))
                        tree.trees[name] = self._scan_child(fd, name, status, known, path)
                    else:
                        tree.trees[name] = self._rescan_child(fd, name, status, was, touched, path)
                elif status is not None:
                    self._add(tree, fd, name, status, known)
                    self._note_links(path, name, status, arrived=name in touched.arrived)
            except (OSError, Changed) as error:
                self._overlook(error)
            if name == PACKAGES:
                _drop_empty_packages(tree)
            tree.totals = tree.totals.minus(before).plus(tree.totals_of(name))
        unchanged = known.digest is not None and tree.matches(known) and tree.others == known.others
        return known if unchanged and tree.totals == known.totals else tree

    def _rescan_child(
        self, fd: int, name: str, status: os.stat_result, was: Tree, touched: Touched, path: tuple[str, ...]
    ) -> Tree:
        """The subdirectory `name`, which was `was` at the last scan: rescanned where it was touched, as its `status` is
        now."""
        below = was
        if name in touched.below:
            with opened(fd, name, status.st_mode) as child:
                below = self._rescan(child, was, touched.below[name], (*path, name))
        mode, spare = status.st_mode & 0o777, spare_bytes(status)
        if (below.mode, below.spare_bytes) != (mode, spare):
            below = replace(below, mode=mode, spare_bytes=spare)
        return below

    def _add(self, tree: Tree, fd: int, name: str, status: os.stat_result, known: Tree | None) -> None:
        """Add the entry of a file, a link or something else that is no directory."""
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFREG:
            file = self._file(fingerprint(status), known.files.get(name) if known else None)
            spare = spare_bytes(status)
            tree.files[name] = file if file.spare_bytes == spare else replace(file, spare_bytes=spare)
        elif kind == stat.S_IFLNK:
            tree.links[name] = Link(portable(os.readlink(name, dir_fd=fd)), status.st_mtime_ns)
            self._newest_ns = max(self._newest_ns, status.st_ctime_ns)
        else:
            tree.others.add(name)

    def _look_at_state_file(self, root: int, *, arrived: bool) -> None:
        """Look at what has the state file's name: it isn't kept, but may be one of several names of a file that is.
        Raises SnapshotRefused where it is a directory, as what is in there would go unnoticed; FullScanNeeded."""
        with suppress(FileNotFoundError):
            status = os.stat(STATE_FILE, dir_fd=root, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                raise SnapshotRefused(f"{STATE_FILE} is a directory, which can't be kept")
            self._note_links((), STATE_FILE, status, arrived=arrived)

    def _note_links(self, path: tuple[str, ...], name: str, status: os.stat_result, *, arrived: bool) -> None:
        """Note how many names a file has. `arrived` says that another one may have had its name at the last scan, as
        all may have in a directory that wasn't watched yet. Raises FullScanNeeded."""
        watch, links = self._watch, status.st_nlink
        if watch is not None and watch.note_links(path, name, links, arrived=arrived) and self._is_rescan:
            watch.need_full_scan()
            raise FullScanNeeded

    def _file(self, now: Fingerprint, known: File | None) -> File:
        """A file as scanned, with its digest if it is certainly unchanged."""
        is_mapped = now.inode in self._mapped
        same = known if known is not None and known.fingerprint == now else None
        if same is not None and same.settled and same.digest is not None and not is_mapped:
            return same
        settled = now.ctime_ns < self._started - _TICK_NS and not is_mapped
        return File(now, settled, uploaded=same is not None and same.uploaded)

    def _overlook(self, error: OSError | Changed) -> None:
        """Leave out what is gone or something else when it is looked at, where that may be. Raises `error` else."""
        if not self._changing or (isinstance(error, OSError) and error.errno not in GONE):
            raise error
        self.missed = True

    def _count(self, entries: int, total_bytes: int, spare: int, work: int) -> None:
        """Count what a scan has come to. Raises WorkspaceFull, TreeNotSmall."""
        self._entries += entries
        self._total_bytes += total_bytes
        self._spare_bytes += spare
        self._work += work
        if self._small is not None and self._work > self._small:
            raise TreeNotSmall
        self._check(self._entries, self._total_bytes, self._spare_bytes)

    def _count_alone(self, work: int) -> None:
        """Count a directory of packages, which may be nothing but directories: those are dropped, and so don't count
        beside what else there is (`_check_whole`). Raises as `_count` does."""
        self._directories_of_packages += 1
        self._check(self._directories_of_packages, 0, 0)
        self._count(0, 0, 0, work)

    def _check_whole(self, root: int, tree: Tree) -> None:
        """Apply the bounds to the tree of a root. Raises WorkspaceFull."""
        entries, _, total_bytes, spare = tree.totals
        self._check(entries, total_bytes, spare + spare_bytes(os.fstat(root)))

    def _check(self, entries: int, total_bytes: int, spare: int) -> None:
        most = self._bounds.total_bytes
        if entries > self._bounds.entries:
            raise WorkspaceFull(f"the working directory holds more than {self._bounds.entries} files and directories")
        if total_bytes + spare > most:
            verb = "holds" if total_bytes > most else "has allocated"
            raise WorkspaceFull(f"the working directory {verb} more than {most} bytes")


def _drop_empty_packages(tree: Tree) -> None:
    """Take the directory of packages out of a root's tree if there are only directories in it."""
    if not tree.trees[PACKAGES].totals.files:
        del tree.trees[PACKAGES]


def store(fd: int, tree: Tree, known: Tree | None, batch: BlobBatch) -> str:
    """Put everything of `tree` that has no digest yet into a batch, and set the digests. Returns the tree's own.

    `fd` is the scanned directory. Raises SnapshotRefused where it has changed since the scan, OSError.
    """
    for name, file in tree.files.items():
        if file.digest is None:
            with opened(fd, name, file.fingerprint.mode) as content:
                file.digest = _store_file(content, file, known.files.get(name) if known else None, batch)
    for name, child in tree.trees.items():
        if child.digest is None:
            with opened(fd, name, stat.S_IFDIR | child.mode) as below:
                store(below, child, known.trees.get(name) if known else None, batch)
    tree.digest = batch.put(tree.encoded())
    return tree.digest


def _store_file(fd: int, file: File, known: File | None, batch: BlobBatch) -> str:
    """Put the content of a file, unless it proves to be the known one. Returns its digest. Raises SnapshotRefused."""
    if os.fstat(fd).st_ino != file.fingerprint.inode:
        raise Changed
    if known is not None and known.digest is not None and known.fingerprint == file.fingerprint:
        # It wasn't settled at the last scan, but most likely it is the same: find out without writing a copy.
        if digest_of(fd) == known.digest:
            return known.digest
        os.lseek(fd, 0, os.SEEK_SET)
    digest = batch.put_file(fd, file.fingerprint.size)
    file.uploaded = is_still_uploaded(file, digest, known)
    return digest


def is_still_uploaded(file: File, digest: str, known: File | None) -> bool:
    """Whether a file with this content is one that a client has put and no run has changed, by what was known of it.
    The inode doesn't count: it isn't known where the file is known by a tree object alone."""
    if known is None or not known.uploaded:
        return False
    return (digest, *file.fingerprint.mode_and_mtime) == (known.digest, *known.fingerprint.mode_and_mtime)


def digest_of(fd: int) -> str:
    """The SHA-256 of what a file has from its position on. Raises OSError."""
    hasher = hashlib.sha256()
    while piece := os.read(fd, _CHUNK):
        hasher.update(piece)
    return hasher.hexdigest()


def fingerprint(status: os.stat_result) -> Fingerprint:
    return Fingerprint(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_mode)


def portable(name: str) -> str:
    """A name in the form that tree objects use, from the form that Python's `os` uses, which depends on the locale."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def native(name: str) -> str:
    """A name in the form that Python's `os` uses, from the form that tree objects use."""
    return os.fsdecode(name_bytes(name))


@contextmanager
def closing(fd: int) -> Iterator[int]:
    """Close a descriptor after the block."""
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def opened_root(workspace: Path) -> Iterator[int]:
    """Open a working directory. Its path is the service's own, so it can be trusted; its mode isn't kept."""
    mode = os.lstat(workspace).st_mode
    if _needs_chmod(mode):
        os.chmod(workspace, stat.S_IMODE(mode) | 0o700)
    with closing(os.open(workspace, DIRECTORY)) as fd:
        yield fd


@contextmanager
def opened(parent: int, name: str, mode: int) -> Iterator[int]:
    """Open a file or directory for reading, even if its mode forbids that. `mode` is its st_mode, as scanned.

    Raises SnapshotRefused where it is something else by now.
    """
    needs_chmod = _needs_chmod(mode)
    if needs_chmod:
        change_mode(parent, name, mode | 0o500)
    try:
        with closing(os.open(on_disk(name), DIRECTORY if stat.S_ISDIR(mode) else _FILE, dir_fd=parent)) as fd:
            if stat.S_IFMT(os.fstat(fd).st_mode) != stat.S_IFMT(mode):
                raise Changed
            yield fd
    finally:
        if needs_chmod:
            change_mode(parent, name, mode)


@contextmanager
def opened_directory(parent: int, name: str) -> Iterator[int]:
    """Open a directory to change its content, even if its mode forbids that. The mode is left as it is then."""
    mode = os.stat(on_disk(name), dir_fd=parent, follow_symlinks=False).st_mode
    if mode & 0o700 != 0o700 and os.geteuid() != 0:
        change_mode(parent, name, mode | 0o700)
    with closing(os.open(on_disk(name), DIRECTORY, dir_fd=parent)) as fd:
        yield fd


def _needs_chmod(mode: int) -> bool:
    """Whether this process must change a file's or directory's mode in order to read it; root needn't."""
    needed = 0o500 if stat.S_ISDIR(mode) else 0o400
    return mode & needed != needed and os.geteuid() != 0


def change_mode(parent: int, name: str, mode: int) -> None:
    """Set the permission bits of a file or directory, which must be of the kind that `mode` (an st_mode) says."""
    # chmod(2) would follow a link, and fchmod(2) needs a file that can be opened. A path descriptor avoids both.
    with closing(os.open(on_disk(name), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)) as fd:
        if stat.S_IFMT(os.fstat(fd).st_mode) != stat.S_IFMT(mode):
            raise Changed
        os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(mode))
