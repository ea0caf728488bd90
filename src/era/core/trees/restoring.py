"""Making a working directory what a snapshot says: from blobs, or from another directory that holds it.

Theory of operation. Nothing runs in the directory meanwhile, but hostile code has written it: see trees.py. Whoever
runs in it next begins after the tick of the clock in which the last file was made, so whatever that writes is seen to
be newer.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from era.core.models import STATE_FILE
from era.core.totals import Bounds
from era.core.trees import trees
from era.core.trees.blob_store import BlobStore
from era.core.trees.copies import copy
from era.core.trees.diffs import ReadTree
from era.core.trees.tree_objects import PACKAGES, on_disk
from era.core.trees.trees import Scan, SnapshotRefused, Tree
from era.core.trees.watch import Watch

_SMALL_BLOB = 1 << 20
_CLOCK_OF_FILES = 5  # CLOCK_REALTIME_COARSE, which the time module lacks
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

type Owner = tuple[int, int] | None
"""The uid and gid of what is made; None: those of this process."""


def check_empty(root: int, bounds: Bounds, *, packages: bool) -> None:
    """Raises OSError where anything is in the directory open as `root` or, with `packages`, a file in that of
    packages."""
    with suppress(SnapshotRefused):
        if not set(os.listdir(root)) - {STATE_FILE} and Scan(bounds, packages=packages).full(root, None).is_empty:
            return
    raise OSError(errno.ENOTEMPTY, "what is there now isn't known")


def restore(root: int, digest: str | None, known: Tree, owner: Owner, blobs: BlobStore, read_tree: ReadTree) -> Tree:
    """Turn the directory open as `root`, which holds `known`, into what the tree object `digest` says (None: empty).
    Goes only where the two differ. Returns the tree that it now is. Raises OSError."""
    tree = _Restore(owner, blobs, read_tree).directory(root, digest, known)
    _wait_for_the_next_tick()
    return tree


def recalled(digest: str, blobs: BlobStore, read_tree: ReadTree) -> Tree:
    """What a tree object says of a directory that isn't known any more. No scan takes a file or directory for unchanged
    by it, but it tells of equal files which of them a client has put. Raises as `read_tree` does."""
    tree, entries = Tree(), read_tree(digest)
    below = [entry[2] for entry in entries if entry[0] == "dir"]
    blobs.expect(below)
    for kind, portable, *rest in entries:
        name = trees.native(portable)
        match kind, rest:
            case "file", (content, size, mode, mtime_ns, *uploaded):
                nowhere = trees.Fingerprint(-1, size, mtime_ns, 0, mode)
                tree.files[name] = trees.File(nowhere, settled=False, digest=content, uploaded=bool(uploaded))
            case "link", (target, mtime_ns):
                tree.links[name] = trees.Link(target, mtime_ns)
            case "dir", (content, mode):
                tree.trees[name] = replace(recalled(content, blobs, read_tree), mode=mode)
    tree.update_totals()
    return tree


def move(source: int, target: int, tree: Tree) -> Tree:
    """Move everything in the directory open as `source`, which is `tree`, to the empty one open as `target`, whose
    owner it gets. Returns the tree as it is then, whose files would look changed otherwise: a rename changes times too.
    Raises OSError, also where either isn't what it should be."""
    names = [*tree.files, *tree.links, *tree.trees, *tree.others]
    if set(os.listdir(target)) - {STATE_FILE}:
        raise OSError(errno.ENOTEMPTY, "what is there now isn't known")
    if set(os.listdir(source)) - {STATE_FILE} != set(names):
        raise OSError(errno.ESTALE, "a directory isn't what it was")
    # A directory that moves gets another `..`, which is written into it: only root can move one that isn't writable.
    modes = {} if os.geteuid() == 0 else {name: stat.S_IFDIR | below.mode for name, below in tree.trees.items()}
    shut = {name: mode for name, mode in modes.items() if not mode & stat.S_IWUSR}
    for name in names:
        if name in shut:
            trees.change_mode(source, name, shut[name] | stat.S_IWUSR)
        os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)
        if name in shut:
            trees.change_mode(target, name, shut[name])
    had, has = os.fstat(source), os.fstat(target)
    moved = _moved(target, tree, None if had.st_uid == has.st_uid else (has.st_uid, has.st_gid))
    _wait_for_the_next_tick()
    return moved


def watch(fd: int, tree: Tree, by: Watch, path: tuple[str, ...] = ()) -> None:
    """Have `by` watch the directory open as `fd`, which is `tree`, and those below, without looking at any file.
    Raises OSError, and SnapshotRefused where it isn't that tree."""
    by.add(fd, path)
    for name, below in tree.trees.items():
        with trees.opened(fd, name, stat.S_IFDIR | below.mode) as child:
            watch(child, below, by, (*path, name))


class _Restore:
    """One restore from blobs."""

    def __init__(self, owner: Owner, blobs: BlobStore, read_tree: ReadTree) -> None:
        self._owner = owner
        self._blobs = blobs
        self._read_tree = read_tree

    def directory(self, fd: int, digest: str | None, known: Tree) -> Tree:
        """Turn the directory open as `fd`, which holds `known`, into what a tree object says; None: empty."""
        if digest == known.digest and digest is not None:
            return known
        tree = Tree(digest=digest)
        entries = {trees.native(entry[1]): entry for entry in self._read_tree(digest)} if digest else {}
        self._blobs.expect(_to_prefetch(entries, known))
        for name in (*known.files, *known.links, *known.trees, *known.others):
            if name not in entries:
                _remove(fd, name)
        for name, (kind, _, *rest) in entries.items():
            match kind, rest:
                case "file", (content, size, mode, mtime_ns, *uploaded):
                    file = known.files.get(name)
                    if file is None or not _is_there(file, content, size, mode, mtime_ns):
                        _remove(fd, name)
                        file = self._file(fd, name, content, size, mode, mtime_ns)
                    tree.files[name] = replace(file, uploaded=bool(uploaded))
                case "link", (target, mtime_ns):
                    tree.links[name] = trees.Link(target, mtime_ns)
                    if known.links.get(name) != tree.links[name]:
                        _remove(fd, name)
                        os.symlink(trees.native(target), name, dir_fd=fd)
                        if self._owner is not None:
                            os.chown(name, *self._owner, dir_fd=fd, follow_symlinks=False)
                        os.utime(name, ns=(mtime_ns, mtime_ns), dir_fd=fd, follow_symlinks=False)
                case "dir", (content, mode):
                    below = known.trees.get(name)
                    if below is None:
                        _make_empty_directory(fd, name)
                        below = Tree()
                    if (below.digest, below.mode) != (content, mode):
                        below = self._child(fd, name, content, mode, below)
                    tree.trees[name] = below
        tree.update_totals()
        return tree

    def _child(self, parent: int, name: str, digest: str, mode: int, known: Tree) -> Tree:
        """The same for a subdirectory, which then gets its owner and mode."""
        with trees.opened_directory(parent, name) as fd:
            tree = replace(self.directory(fd, digest, known), mode=mode)
            if self._owner is not None:
                os.fchown(fd, *self._owner)
            os.fchmod(fd, mode)
        return tree

    def _file(self, parent: int, name: str, digest: str, size: int, mode: int, mtime_ns: int) -> trees.File:
        """Make a new file with this content and metadata."""
        with trees.closing(os.open(name, _NEW_FILE, 0o600, dir_fd=parent)) as fd:
            self._fill(fd, digest, size)
            if self._owner is not None:
                os.fchown(fd, *self._owner)
            os.fchmod(fd, mode)
            os.utime(fd, ns=(mtime_ns, mtime_ns))
            return trees.File(trees.fingerprint(os.fstat(fd)), settled=True, digest=digest)

    def _fill(self, fd: int, digest: str, size: int) -> None:
        """Copy a blob into a file, within the kernel. Raises OSError where it isn't of this size."""
        with trees.closing(self._blobs.open_blob(digest)) as content:
            if os.fstat(content).st_size != size:
                raise OSError(errno.EIO, "a file is not as long as it was")
            copy(content, fd, size)


def _moved(fd: int, tree: Tree, owner: tuple[int, int] | None) -> Tree:
    """The directory open as `fd`, whose entries were moved or get another owner. Raises OSError."""
    if owner is not None:
        for name in (*tree.files, *tree.links, *tree.others):
            os.chown(name, *owner, dir_fd=fd, follow_symlinks=False)
    tree = replace(tree, files={name: _as_it_is(fd, name, file) for name, file in tree.files.items()})
    if owner is not None:
        children = dict(tree.trees)
        for name, below in tree.trees.items():
            with trees.closing(os.open(name, trees.DIRECTORY, dir_fd=fd)) as child:
                children[name] = _moved(child, below, owner)
                os.fchown(child, *owner)
                os.fchmod(child, below.mode)
        tree.trees = children
    return tree


def _as_it_is(fd: int, name: str, file: trees.File) -> trees.File:
    """A file with its present fingerprint, where nothing but its ctime may be another. Raises OSError."""
    now = trees.fingerprint(os.stat(name, dir_fd=fd, follow_symlinks=False))
    if now._replace(ctime_ns=file.fingerprint.ctime_ns) != file.fingerprint:
        raise OSError(errno.ESTALE, "a file isn't what it was")
    return replace(file, fingerprint=now)


def _is_there(file: trees.File | None, content: str, _size: int, mode: int, mtime_ns: int, *_: object) -> bool:
    """Whether a file is what a tree object says of it."""
    return file is not None and (file.digest, *file.fingerprint.mode_and_mtime) == (content, mode, mtime_ns)


def _to_prefetch(entries: Mapping[str, Sequence[Any]], known: Tree) -> Iterator[str]:
    """The blobs to fetch before a directory is restored. Large files aren't fetched ahead: that would gain little."""
    for name, (kind, _, *rest) in entries.items():
        if kind == "dir":
            below = known.trees.get(name)
            if below is None or below.digest != rest[0]:
                yield rest[0]
        elif kind == "file" and rest[1] <= _SMALL_BLOB:
            file = known.files.get(name)
            if file is None or file.digest != rest[0]:
                yield rest[0]


def _wait_for_the_next_tick() -> None:
    """Wait until the clock of file times has advanced.

    A write within the same tick could leave a file's times as they are now.
    """
    made_at = time.clock_gettime_ns(time.CLOCK_REALTIME)
    while time.clock_gettime_ns(_CLOCK_OF_FILES) <= made_at:
        time.sleep(0.001)


def _remove(parent: int, name: str) -> None:
    """Remove whatever has this name, with everything below it. Does nothing where nothing has. The directory of
    packages itself stays, since the sandbox has it mounted."""
    try:
        mode = os.stat(on_disk(name), dir_fd=parent, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        os.unlink(name, dir_fd=parent)
        return
    with trees.opened_directory(parent, name) as fd:
        for child in os.listdir(fd):
            _remove(fd, child)
    if name != PACKAGES:
        os.rmdir(name, dir_fd=parent)


def _make_empty_directory(parent: int, name: str) -> None:
    """Make a directory in the place of whatever has this name. That of packages is there already, and is emptied."""
    _remove(parent, name)
    if name != PACKAGES:
        os.mkdir(name, 0o700, dir_fd=parent)
