"""Snapshots of a working directory in which processes go on: the tree of one moment.

Theory of operation
===================

*Nothing has changed.* That is what most looks find, and a small tree needn't stand still for it: a scan tells whether
the tree was what is known already when the scan began (`Scan.was_still`).

*Standing still.* Where the sandbox can be frozen, everything in it stands still while the directory is scanned and what
has changed is put aside (ContentCopies): that takes milliseconds, since most of the tree is known from the time
before, and copies share blocks with the files where the file system can do that. Then everything goes on, while what
was put aside is hashed, stored and made durable. A directory that isn't known yet is looked at once before, while
processes go on: so the moment is short all the same. What turns out to be large work is given up before anything is put
aside: everything goes on until there is a thread for it, and stands still again.

*Without a freezer.* The tree is looked at once while processes go on: each file is as it was at some time. The snapshot
is consistent only if no process was left, which the caller knows (live/checkpoints.py).

*Half a write.* A call that writes much sets a file's times when it begins, and no more, so what is read meanwhile may
be half of it, and nothing tells so later. Nor can anybody tell that it is under way: another thread may have closed its
descriptor, and gVisor's kernel has all files open. But no call goes on while everything stands still. So it does for a
moment before a directory is looked at while processes go on, and what has changed since that moment is read again at
the next look. Where that moment can't be had, it is what has changed within the last minute (_WRITE_NS).

*What may change unseen.* A file that a process has open needs no opening any more, one that it executes can be opened
under a name that is gone, and one that it has mapped is changed without any call. So the sandbox is asked which files
those are (Sandbox.held_files). They are looked at each time, whatever the watch says (watch.py), and those that are
mapped are read each time (trees.py); where that can't be told, all are. To ask takes a while, in which processes that
go on may map more: what has changed since is read again at the next look, and so is what has changed between the scan
and the end of its reading.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Container
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from era.core import limits
from era.core.models import EMPTY, OwnedId, Snapshot
from era.core.ports import Sandbox
from era.core.process import HeldFiles
from era.core.trees import file_threads, trees
from era.core.trees.blob_store import BlobBatch, CountingBatch
from era.core.trees.copies import ContentCopies
from era.core.trees.durable import times_tell_of_maps
from era.core.trees.file_threads import RunOnThread
from era.core.trees.memory import Memory, has_many_entries, is_large_scan
from era.core.trees.paths import Parts
from era.core.trees.snapshots import SMALL_TREE, Snapshots
from era.core.trees.tree_objects import TreeNotSmall
from era.core.trees.trees import Scan, SnapshotRefused, Tree
from era.core.trees.watch import Watch
from era.errors import CommitFailed

_FREEZE_PAUSES = (0.1, 0.1)
"""Seconds between two tries to have everything stand still. On a busy machine a process may not get to its stand within
the time of one; the pauses let the sandbox get on with what it couldn't be stopped in."""

_WRITE_NS = 60_000_000_000
"""How long one call may be writing to a file."""

_MOST_KNOWN = 1000


@dataclass(frozen=True, slots=True)
class LiveSnapshot:
    """What a working directory held."""

    snapshot: Snapshot
    consistent: bool
    """Whether all of it is of one moment: everything stood still, or nothing had changed. Else that is so only if no
    process ran."""


@dataclass(frozen=True, slots=True)
class _Look:
    """A scanned tree, what was put aside of it, and the watch and the held files at that time."""

    tree: Tree
    aside: ContentCopies
    watch: Watch | None
    held: HeldFiles | None
    unstored_bytes: int
    """See trees.Tree."""


class LiveSnapshots:
    """Takes snapshots of live sessions' working directories."""

    def __init__(self, snapshots: Snapshots, directory: Path) -> None:
        """Files are put aside in `directory`, which has to be there and is on the file system of working directories
        at best."""
        self._snapshots = snapshots
        self._directory = directory
        self._cant_freeze: set[str] = set()
        """The ids of sandboxes that can't be frozen, so that looking at them before would be of no use."""

    def naming(self) -> AbstractContextManager[None]:
        """See BlobStore."""
        return self._snapshots.blobs.naming()

    async def take(
        self,
        sandbox: Sandbox,
        previous: Snapshot,
        entry: str | None = None,
        *,
        changed: bool = False,
        session_id: OwnedId,
    ) -> LiveSnapshot:
        """Make the content of `sandbox.workspace` durable.

        The arguments and errors are those of Snapshots.take: SnapshotRefused where the tree exceeds the limits,
        CommitFailed where the disk fails. `changed` says that the tree was changed just now, so that it isn't first
        looked at whether it is as it was.
        """
        try:
            with self._snapshots.memories.in_use(sandbox.id):
                return await self._take(sandbox, previous, entry, changed=changed, session_id=session_id)
        except OSError as error:
            self._snapshots.forget(sandbox.id)
            raise CommitFailed(f"the files of this session could not be kept: {error.strerror}") from error
        except BaseException:
            self._snapshots.forget(sandbox.id)
            raise

    async def _take(
        self,
        sandbox: Sandbox,
        previous: Snapshot,
        entry: str | None,
        *,
        changed: bool,
        session_id: OwnedId,
    ) -> LiveSnapshot:
        memory = await self._snapshots.memory_of(sandbox, previous, session_id)
        if memory is not None and not changed and self._is_unchanged(sandbox, memory):
            return LiveSnapshot(previous, consistent=True)
        is_known = memory is not None and (
            memory.watch is not None
            or (not memory.is_recalled and (memory.tree.totals.entries <= SMALL_TREE or not sandbox.opens_on_host))
        )
        async with AsyncExitStack() as stack:
            if not is_known and sandbox.id not in self._cant_freeze:
                memory = await self._warm(sandbox, previous, memory, session_id)
                entry = None  # it was removed before that watch began, which so has nothing of its to expect
            look = await self._frozen_look(sandbox, memory, entry, stack, session_id)
            consistent = look is not None
            if look is None:
                look = await self._loose_look(sandbox, memory, stack, session_id)
            found, known = look, memory
            updated = await self._snapshots.threads.by_size(
                lambda _: self._store(found, known),
                session_id,
                is_large=look.unstored_bytes > file_threads.LARGE_BYTES,
            )
        self._snapshots.memories.put(sandbox.id, updated)
        return LiveSnapshot(updated.snapshot, consistent)

    def _is_unchanged(self, sandbox: Sandbox, memory: Memory) -> bool:
        """Whether a small tree that is known is still what it was, at this moment, so that nothing stands still: a cell
        takes 14.5 ms so, and 18.1 ms else. What a process had mapped at the last look isn't settled, and so counts
        as changed; what it has mapped since has another time once it is written to, on the file systems that are asked
        for. Raises SnapshotRefused, OSError."""
        if memory.watch is not None or memory.held is None or memory.tree.totals.entries > SMALL_TREE:
            return False
        scan = Scan(
            limits.bounds(sandbox.limits), small=SMALL_TREE, packages=sandbox.may_have_packages(), changing=True
        )
        try:
            with trees.opened_root(sandbox.workspace) as root:
                if not times_tell_of_maps(root):
                    return False
                tree = scan.full(root, memory.tree)
        except TreeNotSmall:
            return False
        is_known = tree.digest is not None or (tree.is_empty and memory.snapshot.root is None)
        return is_known and scan.was_still

    async def _frozen_look(
        self,
        sandbox: Sandbox,
        memory: Memory | None,
        entry: str | None,
        stack: AsyncExitStack,
        session_id: OwnedId,
    ) -> _Look | None:
        """A look while everything stands still; None where that can't be had. What turns out to be large work doesn't
        wait for its thread meanwhile: everything goes on until there is one."""
        is_large = is_large_scan(memory)
        while True:
            async with self._standing_still(sandbox, session_id, is_large=is_large) as run:
                if run is None:
                    return None
                aside = self._copies(sandbox)
                stack.push_async_callback(self._close, aside)
                try:
                    return await run(partial(self._look, sandbox, memory, entry, aside, small=not is_large))
                except TreeNotSmall:
                    is_large = True
            await self._close(aside)

    def _copies(self, sandbox: Sandbox) -> ContentCopies:
        return ContentCopies(self._directory, limits.bounds(sandbox.limits).total_bytes)

    @asynccontextmanager
    async def _standing_still(
        self, sandbox: Sandbox, session_id: OwnedId, *, is_large: bool = False
    ) -> AsyncIterator[RunOnThread | None]:
        """Keep everything still for the block, and a thread free, on which the context's value runs jobs, one at a
        time; None where that can't be had."""
        for pause in (*_FREEZE_PAUSES, None):
            async with (
                self._snapshots.threads.slot(session_id, is_large=is_large) as run,
                sandbox.frozen() as still,
            ):
                if still:
                    yield run
                    return
            if still is None:
                if len(self._cant_freeze) >= _MOST_KNOWN:
                    self._cant_freeze.clear()
                self._cant_freeze.add(sandbox.id)
                break
            if pause is not None:
                await asyncio.sleep(pause)
        yield None

    def _look(
        self,
        sandbox: Sandbox,
        memory: Memory | None,
        entry: str | None,
        aside: ContentCopies,
        *,
        small: bool,
    ) -> _Look:
        """Scan and put aside, on a thread, while everything stands still. Raises SnapshotRefused, OSError, and with
        `small` TreeNotSmall before anything is put aside."""
        with trees.opened_root(sandbox.workspace) as root:
            held = sandbox.held_files(os.fstat(root).st_dev)
            tree, watch = self._snapshots.scan(root, sandbox, memory, entry, small=small, mapped=_mapped(held))
            unstored_bytes = _small_bytes(tree, small=small)
            aside.put_tree(root, tree, still=True)
            if watch is not None:
                watch.skip()
        return _Look(tree, aside, watch, held, unstored_bytes)

    async def _warm(
        self, sandbox: Sandbox, previous: Snapshot, memory: Memory | None, session_id: OwnedId
    ) -> Memory | None:
        """Look at a directory that isn't known, and store its files, while processes go on. What is remembered of it
        then is true of each file, but of no moment; nothing where that fails, as the next look will say, or where the
        sandbox can't be frozen."""
        async with self._standing_still(sandbox, session_id) as run:
            calls_since = time.time_ns() - (0 if run is not None else _WRITE_NS)
        if sandbox.id in self._cant_freeze:
            return memory
        aside = self._copies(sandbox)

        def job(small: bool) -> Memory:
            with trees.opened_root(sandbox.workspace) as root:
                # This tells how large it is. What is held isn't asked for yet, and would count as changed if unknown.
                tree, watch = self._snapshots.scan(root, sandbox, memory, small=small, changing=True)
                try:
                    _small_bytes(tree, small=small)
                    # What was opened before the watch began may change without its noting that. So that is asked for
                    # now, and nothing counts that was seen before. What is written to meanwhile, be it by a call or by
                    # a map that isn't told of, has a time since then.
                    held = sandbox.held_files(os.fstat(root).st_dev)
                    # Whatever is read here, the watch tells that it was opened.
                    tree = self._put_aside(root, sandbox, memory, watch, held, calls_since, aside, small=small)
                    with self._snapshots.blobs.batch() as batch:
                        counting = CountingBatch(batch)
                        aside.store_files(tree, memory.tree if memory else None, counting)
                except BaseException:
                    if watch is not None and (memory is None or watch is not memory.watch):
                        watch.close()
                    raise
            return Memory(previous, tree, watch, held=_held_names(tree, held), ahead_bytes=counting.total)

        try:
            warm = await self._snapshots.threads.by_size(job, session_id, is_large=has_many_entries(memory))
        except (OSError, SnapshotRefused):
            return memory
        finally:
            await self._close(aside)
        self._snapshots.memories.put(sandbox.id, warm)
        return warm

    async def _loose_look(
        self, sandbox: Sandbox, memory: Memory | None, stack: AsyncExitStack, session_id: OwnedId
    ) -> _Look:
        """Look once while processes go on. What has changed within the last minute is read again at the next look."""
        aside = self._copies(sandbox)
        stack.push_async_callback(self._close, aside)

        def job(small: bool) -> _Look:
            with trees.opened_root(sandbox.workspace) as root:
                since_ns = time.time_ns() - _WRITE_NS
                held = sandbox.held_files(os.fstat(root).st_dev)
                tree = self._put_aside(root, sandbox, memory, None, held, since_ns, aside, small=small)
            return _Look(tree, aside, memory.watch if memory else None, None, tree.unstored_bytes())

        return await self._snapshots.threads.by_size(job, session_id, is_large=has_many_entries(memory))

    def _put_aside(
        self,
        root: int,
        sandbox: Sandbox,
        memory: Memory | None,
        watch: Watch | None,
        held: HeldFiles | None,
        since_ns: int,
        aside: ContentCopies,
        *,
        small: bool,
    ) -> Tree:
        """Scan and put aside while processes go on. What has changed since `since_ns` isn't settled. Raises
        SnapshotRefused, OSError, and with `small` TreeNotSmall."""
        tree = Scan(
            limits.bounds(sandbox.limits),
            small=file_threads.LARGE_ENTRIES if small else None,
            watch=watch,
            packages=sandbox.may_have_packages(),
            mapped=_mapped(held),
            changing=True,
            asked_ns=since_ns,
        ).full(root, memory.tree if memory is not None else None)
        _small_bytes(tree, small=small)
        before = _fingerprints(tree)
        aside.put_tree(root, tree, still=False)
        _small_bytes(tree, small=small)  # files may have grown since the scan
        _unsettle(tree, before)
        return tree

    def _store(self, look: _Look, memory: Memory | None) -> Memory:
        """Store what was put aside, on a thread. Raises OSError."""
        tree, known = look.tree, memory.tree if memory else None
        held = _held_names(tree, look.held)
        if tree.is_empty:
            return Memory(EMPTY, tree, look.watch, held=held)
        stored = 0
        if tree.digest is None:
            with self._snapshots.blobs.batch() as batch:
                counting = CountingBatch(batch)
                look.aside.store_files(tree, known, counting)
                digest = _store_directories(tree, counting)
            stored = counting.total + (memory.ahead_bytes if memory else 0)
            self._snapshots.remember_totals(digest, tree.totals)
        own = tree.own_totals()
        return Memory(Snapshot(tree.digest, own.files, own.total_bytes, stored), tree, look.watch, held=held)

    async def _close(self, aside: ContentCopies) -> None:
        """Remove what was put aside, on a thread: large copies take long."""
        await self._snapshots.threads.free(aside.close)


def _small_bytes(tree: Tree, *, small: bool) -> int:
    """The bytes of a tree that aren't stored. Raises TreeNotSmall where they are many and the work is to be `small`."""
    size = tree.unstored_bytes()
    if small and size > file_threads.LARGE_BYTES:
        raise TreeNotSmall
    return size


def _store_directories(tree: Tree, batch: BlobBatch) -> str:
    """Put the tree objects that aren't known to be stored, and set their digests. Returns the tree's own."""
    for child in tree.trees.values():
        if child.digest is None:
            _store_directories(child, batch)
    tree.digest = batch.put(tree.encoded())
    return tree.digest


class _Every:
    """Whatever it is asked about."""

    def __contains__(self, inode: object) -> bool:
        return True


def _mapped(held: HeldFiles | None) -> Container[int]:
    """The files that processes may have mapped, by inode: any, where that can't be told."""
    return _Every() if held is None else held.mapped


def _names_of(tree: Tree, inodes: frozenset[int], path: Parts = ()) -> set[tuple[Parts, str]]:
    """The files of a tree that have one of these inodes, by directory and name."""
    if not inodes:
        return set()
    names = {(path, name) for name, file in tree.files.items() if file.fingerprint.inode in inodes}
    for name, child in tree.trees.items():
        names |= _names_of(child, inodes, (*path, name))
    return names


def _held_names(tree: Tree, held: HeldFiles | None) -> frozenset[tuple[Parts, str]] | None:
    """Those that processes hold, by directory and name, as they are remembered (memory.py)."""
    return None if held is None or held.in_flight else frozenset(_names_of(tree, held.all))


def _unstored(tree: Tree) -> list[trees.File]:
    """The files below that aren't known to be stored."""
    files = [file for file in tree.files.values() if file.digest is None]
    for child in tree.trees.values():
        if child.digest is None:
            files += _unstored(child)
    return files


def _fingerprints(tree: Tree) -> dict[int, trees.Fingerprint]:
    """The fingerprints of the files that aren't stored yet, by the files' identity."""
    return {id(file): file.fingerprint for file in _unstored(tree)}


def _unsettle(tree: Tree, before: dict[int, trees.Fingerprint]) -> None:
    """Have all files read again that were put aside just now and have changed since they were scanned: what was put
    aside may be older than the fingerprint, which is from behind that."""
    for file in tree.files.values():
        if id(file) in before and before[id(file)] != file.fingerprint:
            file.settled = False
    for child in tree.trees.values():
        _unsettle(child, before)
