"""Working directories made durable, and put back.

Theory of operation. A snapshot is a tree of content-addressed objects: a file is its bytes, a directory is a *tree
object*, JSON that lists its entries sorted by name, each with what it takes to make it again. Equal content has equal
addresses, so a subtree that didn't change is neither written nor looked at again when it is put.

`take` works in two passes. `_Scan` walks the directory and only looks at it: it applies the limits before anything is
read, and marks what is known from the walk before (same inode, size, times and mode) as unchanged. A small tree of
which nothing changed is done there and then on the event loop. `_Keeper` then reads what is left, on a thread.

What was known may be relied on only if that can't have missed a change and the content can't have been swept since:
  - A file whose ctime is as young as the scan could be written once more within the clock's tick and look the same
    (git calls this racy). It is read again next time.
  - tmpfs doesn't touch a file's times when it is written through a memory map. There nothing is relied on.
  - Content is safe from the sweep while a row names it. So the memory of a sandbox counts only while its last
    snapshot is the session's present one; a run that wasn't committed makes it void.

The directory is written by hostile code, which is dead by the time we look (nothing in it changes while `take` runs).
So a name may be anything, but it stays what it is: every name is opened relative to its directory's descriptor, one
component at a time, never through a link and never waiting, and what was opened is checked to be what was seen.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from era.core.models import EMPTY, STATE_FILE, Snapshot
from era.core.ports import Sandbox, SnapshotRefused
from era.errors import CommitFailed, SandboxFailed, Unavailable

_GLANCE = 32
"""Trees of up to this many entries are looked at on the event loop: that takes less time than going to a thread."""

_RACY_NS = 50_000_000
_GRACE_SECONDS = 3600.0
_TMPFS_MAGIC = 0x01021994
_THREADS = 2

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class BlobBatch(Protocol):
    def put(self, content: bytes) -> str: ...

    def put_file(self, fd: int, size: int) -> str: ...


class BlobStore(Protocol):
    """Content by its SHA-256; see store/blobs.py. Called from several threads."""

    def batch(self) -> AbstractContextManager[BlobBatch]: ...

    def get(self, digest: str) -> bytes: ...

    def open_blob(self, digest: str) -> int: ...

    def sweep(self, keep: set[str], older_than: float) -> int: ...


class Listed(NamedTuple):
    """A file or link of a snapshot. `path` is relative; bytes that aren't UTF-8 are lone surrogates in it."""

    path: str
    size: int
    mtime_ns: int
    is_link: bool


class _Seen(NamedTuple):
    """What tells one state of a file from another without reading it."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    mode: int


@dataclass(slots=True)
class _File:
    seen: _Seen
    settled: bool
    """A later change can't look like this one."""

    digest: str | None = None


class _Link(NamedTuple):
    target: str
    mtime_ns: int


@dataclass(slots=True)
class _Tree:
    """A directory. `digest` is None as long as it isn't known to be stored."""

    mode: int = 0
    files: dict[str, _File] = field(default_factory=dict)
    links: dict[str, _Link] = field(default_factory=dict)
    trees: dict[str, _Tree] = field(default_factory=dict)
    digest: str | None = None

    def same_as(self, other: _Tree) -> bool:
        """Whether the two have the same content, all of `self` being known from `other`."""
        return (
            self.links == other.links
            and self.files.keys() == other.files.keys()
            and self.trees.keys() == other.trees.keys()
            and all(file.digest is not None for file in self.files.values())
            and all(
                tree.digest is not None and tree.mode == other.trees[name].mode for name, tree in self.trees.items()
            )
        )

    def encoded(self) -> bytes:
        """The tree object: one form for one content."""
        entries: list[tuple[Any, ...]] = [
            ("file", _portable(name), file.digest, file.seen.size, file.seen.mode & 0o777, file.seen.mtime_ns)
            for name, file in self.files.items()
        ]
        entries += [("link", _portable(name), link.target, link.mtime_ns) for name, link in self.links.items()]
        entries += [("dir", _portable(name), tree.digest, tree.mode) for name, tree in self.trees.items()]
        entries.sort(key=lambda entry: _raw(entry[1]))
        return json.dumps(entries, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class _Memory:
    """What the last walk through a sandbox found."""

    snapshot: Snapshot
    tree: _Tree


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a working directory may hold and still be kept."""

    entries: int = 200_000
    total_bytes: int = 4 << 30
    depth: int = 128


class Snapshots:
    """A SnapshotStore over a BlobStore. `close` when done."""

    def __init__(
        self, blobs: BlobStore, *, bounds: Bounds = Bounds(), grace_seconds: float = _GRACE_SECONDS
    ) -> None:
        self._blobs = blobs
        self._bounds = bounds
        self._grace_seconds = grace_seconds
        self._memories: dict[str, _Memory] = {}
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="era-files")

    async def take(self, sandbox: Sandbox, previous: Snapshot) -> Snapshot:
        """See SnapshotStore. Raises CommitFailed where the disk fails."""
        memory = self._memories.get(sandbox.id)
        known = memory.tree if memory and memory.snapshot.root == previous.root else None
        try:
            snapshot = self._glance(sandbox, known, previous)
            if snapshot is None:
                memory = await self._on_thread(lambda: self._keep(sandbox, known))
                self._memories[sandbox.id] = memory
                snapshot = memory.snapshot
        except OSError as error:
            raise CommitFailed(f"the files of this run could not be kept: {error.strerror}") from error
        return snapshot

    async def restore(self, snapshot: Snapshot, sandbox: Sandbox) -> None:
        """See SnapshotStore. Raises SandboxFailed where that fails: the sandbox can't be used then."""
        if snapshot.root is None:
            return
        root = snapshot.root
        try:
            tree = await self._on_thread(lambda: self._fill(sandbox, root))
        except OSError as error:
            raise SandboxFailed(f"the session's files could not be put back: {error.strerror}") from error
        self._memories[sandbox.id] = _Memory(snapshot, tree)

    def forget(self, sandbox_id: str) -> None:
        self._memories.pop(sandbox_id, None)

    async def entries(self, snapshot: Snapshot) -> Sequence[Listed]:
        """Every file and link of a snapshot, directories in the order of their names."""
        if snapshot.root is None:
            return ()
        root = snapshot.root
        try:
            return await self._on_thread(lambda: list(self._listed(root, "")))
        except OSError as error:
            raise Unavailable(f"the session's files could not be listed: {error.strerror}") from error

    async def collect_garbage(self, roots: Iterable[str]) -> int:
        """Remove content that no snapshot in `roots` needs and that is older than the grace period; how many went.

        The grace period is for what was put but isn't in a row yet, so read `roots` just before. Raises Unavailable,
        and removes nothing, where a tree object can't be read: what it names would be lost for good.
        """
        older_than = time.time() - self._grace_seconds
        wanted = list(roots)

        def job() -> int:
            keep: set[str] = set()
            for root in wanted:
                self._mark(root, keep)
            return self._blobs.sweep(keep, older_than)

        try:
            return await self._on_thread(job)
        except OSError as error:
            raise Unavailable(f"unused files could not be cleared away: {error.strerror}") from error

    async def close(self) -> None:
        """Let what is under way finish."""
        await asyncio.to_thread(self._threads.shutdown)

    async def _on_thread[T](self, job: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, job)

    def _glance(self, sandbox: Sandbox, known: _Tree | None, previous: Snapshot) -> Snapshot | None:
        """The answer where it is plain to see: a tree that is empty, or small and unchanged."""
        scan = _Scan(self._bounds, _GLANCE)
        try:
            with _opened_root(sandbox) as root:
                tree = scan.walk(root, known)
        except _MoreThanAGlance:
            return None
        if tree.digest is not None:
            return previous
        if tree.files or tree.links or tree.trees:
            return None
        self.forget(sandbox.id)
        return EMPTY

    def _keep(self, sandbox: Sandbox, known: _Tree | None) -> _Memory:
        scan = _Scan(self._bounds)
        with _opened_root(sandbox) as root:
            tree = scan.walk(root, known)
            if tree.digest is None:
                with self._blobs.batch() as batch:
                    _store(root, tree, known, batch)
        return _Memory(Snapshot(tree.digest, scan.file_count, scan.total_bytes), tree)

    def _fill(self, sandbox: Sandbox, digest: str) -> _Tree:
        with _opened_root(sandbox) as root:
            gid = os.fstat(root).st_gid
            owner = None if sandbox.uid is None else (sandbox.uid, gid)
            tree = self._fill_directory(root, digest, owner)
            if _is_tmpfs(root):
                return _Tree()
        # A write within the present tick of the clock could leave a file's times as they are. The program comes after
        # this tick, so that every file here is settled.
        made_at = time.clock_gettime_ns(time.CLOCK_REALTIME)
        while time.clock_gettime_ns(time.CLOCK_REALTIME_COARSE) <= made_at:
            time.sleep(0.001)
        return tree

    def _fill_directory(self, fd: int, digest: str, owner: tuple[int, int] | None) -> _Tree:
        tree = _Tree(digest=digest)
        for kind, portable, *rest in self._tree_object(digest):
            name = _native(portable)
            match kind, rest:
                case "file", (content, size, mode, mtime_ns):
                    seen = self._fill_file(fd, name, content, size, mode, mtime_ns, owner)
                    tree.files[name] = _File(seen, settled=True, digest=content)
                case "link", (target, mtime_ns):
                    os.symlink(_native(target), name, dir_fd=fd)
                    if owner is not None:
                        os.chown(name, *owner, dir_fd=fd, follow_symlinks=False)
                    os.utime(name, ns=(mtime_ns, mtime_ns), dir_fd=fd, follow_symlinks=False)
                    tree.links[name] = _Link(target, mtime_ns)
                case "dir", (content, mode):
                    os.mkdir(name, 0o700, dir_fd=fd)
                    child = os.open(name, _DIRECTORY, dir_fd=fd)
                    try:
                        tree.trees[name] = self._fill_directory(child, content, owner)
                        if owner is not None:
                            os.fchown(child, *owner)
                        os.fchmod(child, mode)
                    finally:
                        os.close(child)
                    tree.trees[name].mode = mode
        return tree

    def _fill_file(
        self, parent: int, name: str, digest: str, size: int, mode: int, mtime_ns: int, owner: tuple[int, int] | None
    ) -> _Seen:
        fd = os.open(name, _NEW_FILE, 0o600, dir_fd=parent)
        try:
            content = self._blobs.open_blob(digest)
            try:
                if _copy(content, fd) != size:
                    raise OSError(errno.EIO, "a file is not as long as it was")
            finally:
                os.close(content)
            if owner is not None:
                os.fchown(fd, *owner)
            os.fchmod(fd, mode)
            os.utime(fd, ns=(mtime_ns, mtime_ns))
            return _seen(os.fstat(fd))
        finally:
            os.close(fd)

    def _listed(self, digest: str, prefix: str) -> Iterator[Listed]:
        for kind, name, *rest in self._tree_object(digest):
            match kind, rest:
                case "file", (_, size, _, mtime_ns):
                    yield Listed(prefix + name, size, mtime_ns, is_link=False)
                case "link", (target, mtime_ns):
                    yield Listed(prefix + name, len(_raw(target)), mtime_ns, is_link=True)
                case "dir", (content, _):
                    yield from self._listed(content, f"{prefix}{name}/")

    def _mark(self, digest: str, keep: set[str]) -> None:
        if digest in keep:
            return
        keep.add(digest)
        for kind, _, *rest in self._tree_object(digest):
            if kind == "file":
                keep.add(rest[0])
            elif kind == "dir":
                self._mark(rest[0], keep)

    def _tree_object(self, digest: str) -> list[list[Any]]:
        content = self._blobs.get(digest)
        if hashlib.sha256(content).hexdigest() != digest:
            raise OSError(errno.EIO, "a directory's list is damaged")
        entries: list[list[Any]] = json.loads(content)
        return entries
