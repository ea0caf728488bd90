"""Snapshots: working directories made durable as content-addressed trees, and restored from them.

Theory of operation. A snapshot is a tree of content-addressed objects: a file is its bytes, a directory is a *tree
object*, JSON that lists its entries sorted by name, each with all that is needed to restore it. Equal content has equal
addresses, so an unchanged subtree is neither read nor written again.

`take` works in two passes (see trees.py). The first only scans, and applies the limits before any file is read; for a
small unchanged tree this is all, done on the event loop. The second reads new content, on a thread. A larger tree is
watched from its first scan on (see watch.py), so that later scans go only to what was touched.

`edit` makes a snapshot from another without any working directory (see edits.py). That is how clients change files: a
sandbox's working directory is never touched from outside, and is brought up to date when its session runs next.

`restore` makes a working directory what a snapshot says, whatever committed snapshot it holds now. It descends only
where the two differ. So a rollback, or a file put by a client, costs a warm sandbox only what it changes.

The result of an earlier scan may be relied on only if it can't have missed a change, and if the content can't have been
swept as garbage since. Content is safe from the sweep while a row names it. So what is remembered of a sandbox counts
only while its last snapshot is the session's current one; a run that wasn't committed makes it void.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice

from era.core import limits
from era.core.models import EMPTY, JsonObject, OwnedId, Snapshot
from era.core.ports import Sandbox
from era.core.totals import Bounds, Totals
from era.core.trees import edits, file_threads, restoring, trees
from era.core.trees.blob_store import BlobBatch, BlobStore, CountingBatch
from era.core.trees.diffs import ReadTree, list_artifacts, written_files
from era.core.trees.durable import is_tmpfs
from era.core.trees.edits import Changes, Entry, FileEntry
from era.core.trees.file_threads import FileThreads, check_small
from era.core.trees.memory import Memories, Memory, has_many_entries, is_large_scan
from era.core.trees.paths import Parts
from era.core.trees.tree_objects import NODE_MODULES, PACKAGES, Holdings, ListTooLong, TreeNotSmall, decode
from era.core.trees.trees import FullScanNeeded, Scan, SnapshotRefused, Tree
from era.core.trees.watch import Watch, WatchBudget
from era.errors import CommitFailed, SandboxFailed, TooLarge, Unavailable

SMALL_TREE = 32
"""Trees of up to this many entries are scanned on the event loop: that takes less time than a hop to a thread."""

_COUNTS_KEPT = 16_384
"""Some 5 MiB. One that has gone is counted anew, which is large work for a large tree."""

_GRACE_SECONDS = 3600.0
SHORT_GRACE_SECONDS = 60.0
"""The grace period where it is known what may be named yet: for the error of clocks, and for our own."""


class CollectionPutOff(Unavailable):
    """No garbage is collected now, since somebody reads what there is, or may still name it. That is no failure."""


class Snapshots:
    """Takes, restores, edits and compares snapshots in a blob store. `close` it at the end."""

    def __init__(
        self, blobs: BlobStore, *, grace_seconds: float = _GRACE_SECONDS, watches: WatchBudget | None = None
    ) -> None:
        self.blobs = blobs
        self._watches = watches or WatchBudget()
        self.grace_seconds = grace_seconds
        """For which garbage collection leaves what was put, where other processes put, too."""

        self.memories = Memories(lambda watch: self.threads.soon(watch.close))
        self._counts: dict[str, Totals] = {}
        """What trees hold, by root, the one used last at the end. An upper bound: pipes and the like, which aren't
        kept, may count."""

        self._counting = threading.Lock()
        """Held where counts are remembered or looked up, which is done on several threads."""

        self._collected: tuple[frozenset[str], frozenset[str], float] | None = None
        """The roots and blobs that the last garbage collection kept, and the time before which it swept."""

        self.threads = FileThreads()

    async def take(
        self, sandbox: Sandbox, previous: Snapshot, entry: str | None = None, *, session_id: OwnedId
    ) -> Snapshot:
        """Make the content of `sandbox.workspace` durable, while nothing runs there. Returns its snapshot.

        `previous` is the session's current snapshot, `entry` that of Ended; `session_id` says whose turn it is on the
        threads. Only what has changed since the last call for this sandbox is read. Raises SnapshotRefused where the
        tree exceeds the limits, CommitFailed where the disk fails.
        """
        with self.memories.in_use(sandbox.id):
            return await self._take(sandbox, previous, entry, session_id)

    async def _take(self, sandbox: Sandbox, previous: Snapshot, entry: str | None, session_id: OwnedId) -> Snapshot:
        """Do the work of `take`. Raises as it does."""
        memory = await self.memory_of(sandbox, previous, session_id)
        try:
            if memory is None or memory.watch is None:
                snapshot = self._quick_scan(sandbox, memory, previous)
                if snapshot is not None:
                    return snapshot
            # As large work it is all one job: a large tree that waited for a thread would count nowhere.
            updated = await self.threads.by_size(
                lambda small: self._scan_and_store(sandbox, memory, entry, small=small),
                session_id,
                is_large=is_large_scan(memory),
            )
        except OSError as error:
            self.forget(sandbox.id)
            raise CommitFailed(f"the files of this run could not be kept: {error.strerror}") from error
        except BaseException:
            self.forget(sandbox.id)
            raise
        self.memories.put(sandbox.id, updated)
        return updated.snapshot

    async def memory_of(self, sandbox: Sandbox, previous: Snapshot, session_id: OwnedId) -> Memory | None:
        """What is remembered of a sandbox, whose session's current snapshot is `previous`, as far as that counts; or
        what that snapshot says of its files, none of which is taken for unchanged then."""
        memory = self.memories.get(sandbox.id)
        if memory is not None and memory.snapshot.root == previous.root:
            return memory
        self.forget(sandbox.id)
        if (root := previous.root) is None:
            return None
        try:
            tree = await self._reading(lambda read: restoring.recalled(root, self.blobs, read), session_id)
        except Unavailable:
            return None  # then all files count as written
        return Memory(previous, tree, held=None, is_recalled=True)

    async def restore(self, snapshot: Snapshot, sandbox: Sandbox, *, session_id: OwnedId) -> None:
        """Make the sandbox's working directory what `snapshot` says; `session_id` is as for `take`.

        It must be empty, or what `take` or `restore` last saw. Raises SandboxFailed, after which the sandbox can't be
        used any more.
        """
        memory = self.memories.take(sandbox.id)
        try:
            tree = await self.threads.by_size(
                lambda small: self._restore(sandbox, snapshot, memory, small=small),
                session_id,
                is_large=has_many_entries(memory),
            )
        except BaseException as error:
            if memory is not None and memory.watch is not None:
                self.threads.soon(memory.watch.close)
            if isinstance(error, OSError):
                raise SandboxFailed(f"the session's files could not be put back: {error.strerror}") from error
            raise
        self.memories.put(sandbox.id, Memory(snapshot, tree, memory.watch if memory else None))

    def put_away(self, sandbox: Sandbox, snapshot: Snapshot) -> int | None:
        """Note that the sandbox is dead and its directory stays. Returns how many entries that has, where it is known
        to hold this snapshot, and so can be moved to another one; else None."""
        memory = self.memories.get(sandbox.id)
        if memory is None or memory.snapshot.root != snapshot.root:
            return None
        if PACKAGES in memory.tree.trees:
            return None  # they lie beside the working directory, from where nothing is moved
        if memory.watch is not None:
            # After a look that didn't ask the watch, that doesn't know which files have got another name since.
            linked = memory.watch.linked if memory.watch.works and memory.held is not None else None
            self.memories.put(sandbox.id, replace(memory, watch=None, linked=linked))
        return memory.tree.totals.entries

    async def move(self, old: Sandbox, new: Sandbox, *, session_id: OwnedId) -> None:
        """Move the content of a working directory that was put away to that of a new sandbox, which is empty. `old` has
        to be closed then. Raises SandboxFailed, after which neither can be used any more."""
        memory = self.memories.take(old.id)
        if memory is None:
            raise SandboxFailed("the session's files could not be moved: what is there isn't known any more")
        try:
            with self.memories.in_use(new.id):
                moved = await self.threads.by_size(
                    lambda _: self._move(old, new, memory), session_id, is_large=has_many_entries(memory)
                )
                self.memories.put(new.id, moved)
        except (OSError, SnapshotRefused) as error:
            raise SandboxFailed(f"the session's files could not be moved: {error}") from error

    def forget(self, sandbox_id: str) -> None:
        """Drop what is remembered of a sandbox, which is gone or holds something unknown."""
        self.memories.forget(sandbox_id)

    async def entries(
        self,
        snapshot: Snapshot,
        session_id: OwnedId,
        *,
        after: Parts = (),
        prefix: Parts = (),
        directories: bool = False,
        limit: int | None = None,
    ) -> Sequence[FileEntry]:
        """The files and links of a snapshot in order, at most `limit`; the others are as in edits.page.

        Raises Unavailable where the disk fails.
        """
        if snapshot.root is None:
            return ()

        def job(read: ReadTree) -> Sequence[FileEntry]:
            page = edits.page(read, snapshot.root, after=after, prefix=prefix, directories=directories)
            return [edits.file_entry(path, entry) for path, entry in islice(page, limit)]

        return await self._reading(job, session_id)

    async def find(self, snapshot: Snapshot, path: Parts, session_id: OwnedId) -> Entry:
        """The entry at a path. Raises NotFound, Conflict where the path leads through a link, Unavailable where the
        disk fails."""
        return await self._reading(lambda read: edits.find(read, snapshot.root, path), session_id)

    async def depth(self, entry: Entry, session_id: OwnedId) -> int:
        """How many directories are nested in an entry of a snapshot; see edits.depth. Raises Unavailable where the
        disk fails."""
        return await self._reading(lambda read: edits.depth(read, entry), session_id)

    async def edit(
        self,
        snapshot: Snapshot,
        changes: Changes,
        put: Callable[[BlobBatch], None],
        bounds: Bounds,
        session_id: OwnedId,
        *,
        replace: bool = False,
    ) -> Snapshot:
        """The snapshot with these changes, or with `replace` only these files beside its packages. `put` is called on a
        thread to put their content, if that isn't done yet; maybe twice.

        Raises Conflict and NotFound as edits.apply does, TooLarge where the result exceeds the bounds, Unavailable
        where the disk fails.
        """
        try:
            return await self.threads.by_size(
                lambda small: self._edit(snapshot, changes, put, bounds, small=small, only_these=replace), session_id
            )
        except ListTooLong as error:
            raise TooLarge(f"The session would have {error}.", hint="Use more directories.") from error
        except OSError as error:
            raise Unavailable(f"the files could not be kept: {error.strerror}") from error

    async def artifacts(self, old: Snapshot, new: Snapshot, session_id: OwnedId) -> JsonObject:
        """The artifacts among the files written between two snapshots; see diffs.list_artifacts.

        Nothing is read where the snapshots are equal. Raises CommitFailed where the disk fails.
        """
        if old.root == new.root:
            return {}
        try:
            return await self._reading(lambda read: list_artifacts(written_files(read, old.root, new.root)), session_id)
        except Unavailable as error:
            raise CommitFailed(error.message) from error

    def sweepable_before(self) -> float:
        """Content that was last put before this time, by the store's clock, is garbage where no row names it now."""
        settled = self.blobs.unnamed_since()
        if settled is None:
            return self.blobs.time() - self.grace_seconds
        return settled - min(self.grace_seconds, SHORT_GRACE_SECONDS)

    async def collect_garbage(
        self, roots: Iterable[str], blobs: Iterable[str] = (), *, older_than: float | None = None
    ) -> int:
        """Delete content that no snapshot in `roots` needs, that isn't in `blobs`, and that was last put before
        `older_than`. Returns how many blobs were deleted.

        `older_than` protects what was put but isn't named by a row yet. So it is what `sweepable_before` returned
        before the arguments were read, or else, if that was just before, what it returns now.
        If nothing can have become garbage since the last call, nothing is done; where other processes put content, too,
        that is never known. Raises Unavailable, and deletes nothing, where a tree object can't be read: what it names
        would be lost for good.
        """
        if older_than is None:
            older_than = self.sweepable_before()
        kept_roots, kept_blobs = frozenset(roots), frozenset(blobs)
        if self._collected is not None:
            *kept_last_time, swept_before = self._collected
            nothing_was_put = self.blobs.unnamed_since() is not None and self.blobs.last_put < swept_before
            if nothing_was_put and kept_last_time == [kept_roots, kept_blobs]:
                return 0

        def job() -> int:
            return self.blobs.sweep(self.sizes_of(kept_roots).keys() | kept_blobs, older_than)

        try:
            removed = await self.threads.sweep(job)
        except BlockingIOError as error:
            raise CollectionPutOff(f"unused files could not be cleared away: {error.strerror}") from error
        except OSError as error:
            raise Unavailable(f"unused files could not be cleared away: {error.strerror}") from error
        self._collected = (kept_roots, kept_blobs, older_than)
        return removed

    def sizes_of(self, roots: Iterable[str]) -> dict[str, int]:
        """The sizes in bytes of all tree objects and files of these snapshots, by digest.

        Reads every tree object, so it blocks for long; no file is read. Raises OSError.
        """
        holdings = Holdings(self.blobs, self._tree_object)
        for root in holdings.ahead(roots):
            holdings.add(root)
        return holdings.sizes

    async def held_bytes(
        self, roots: Sequence[str], most: int, at_least: int = 0, *, session_id: OwnedId
    ) -> Sequence[int]:
        """How many bytes the first of these snapshots holds, how many the first two together, and so on; content that
        they share counts once. Behind the first `at_least` numbers it ends with one that is over `most`.

        Reads every tree object of these; `session_id` is as for `take`. Raises Unavailable where the disk
        fails.
        """

        def job(small: bool) -> Sequence[int]:
            holdings = Holdings(self.blobs, self._tree_object, file_threads.LARGE_ENTRIES if small else None)
            totals: list[int] = []
            counted = total = 0
            for root in holdings.ahead(roots):
                holdings.add(root)
                total += sum(islice(holdings.sizes.values(), counted, None))  # what is new is at the end
                counted = len(holdings.sizes)
                totals.append(total)
                if total > most and len(totals) >= at_least:
                    break
            return totals

        try:
            return await self.threads.by_size(job, session_id)
        except OSError as error:
            raise Unavailable(f"the session's files could not be counted: {error.strerror}") from error

    async def close(self) -> None:
        """Wait for jobs under way, and free everything."""
        self.memories.forget_all()
        await self.threads.close()

    async def _reading[T](self, job: Callable[[ReadTree], T], session_id: OwnedId) -> T:
        """Run a job that reads tree objects, and does no more than that, on a thread; called anew where those are
        many. Raises Unavailable where the disk fails."""
        try:
            return await self.threads.by_size(lambda small: job(self.reader(small=small)), session_id)
        except OSError as error:
            raise Unavailable(f"the session's files could not be read: {error.strerror}") from error

    def _quick_scan(self, sandbox: Sandbox, memory: Memory | None, previous: Snapshot) -> Snapshot | None:
        """What `take` returns for a tree that is empty, or small and unchanged; None for any other."""
        scan = Scan(limits.bounds(sandbox.limits), small=SMALL_TREE, packages=sandbox.may_have_packages())
        try:
            with trees.opened_root(sandbox.workspace) as root:
                tree = scan.full(root, memory.tree if memory else None)
        except TreeNotSmall:
            return None
        if tree.digest is not None:
            return previous
        if not tree.is_empty:
            return None
        self.forget(sandbox.id)
        return EMPTY

    def _scan_and_store(self, sandbox: Sandbox, memory: Memory | None, entry: str | None, *, small: bool) -> Memory:
        """Scan the working directory, and store what is new. Runs on a thread; raises as `take` does, OSError, and with
        `small` TreeNotSmall, before anything is stored."""
        with trees.opened_root(sandbox.workspace) as root:
            tree, watch = self.scan(root, sandbox, memory, entry, small=small)
        if small and tree.unstored_bytes() > file_threads.LARGE_BYTES:
            if watch is not None and (memory is None or watch is not memory.watch):
                watch.close()  # before another one is made
            raise TreeNotSmall
        return self._store(sandbox, memory, tree, watch)

    def scan(
        self,
        root: int,
        sandbox: Sandbox,
        memory: Memory | None,
        entry: str | None = None,
        *,
        small: bool,
        mapped: Container[int] = (),
        changing: bool = False,
    ) -> tuple[Tree, Watch | None]:
        """Scan the working directory open as `root`, on a thread, and return its tree and the watch on it, if any: only
        what was touched, if a watch tells that. A large
        directory is watched from now on. `entry` is as for `take`, `mapped` and `changing` as for Scan. Raises
        SnapshotRefused, OSError, and with `small` TreeNotSmall."""
        known = memory.tree if memory else None
        watch = memory.watch if memory else None

        def scanning() -> Scan:
            return Scan(
                limits.bounds(sandbox.limits),
                small=file_threads.LARGE_ENTRIES if small else None,
                watch=watch,
                packages=sandbox.may_have_packages(),
                mapped=mapped,
                changing=changing,
            )

        tree = _rescanned(root, scanning(), memory, entry)
        if tree is None:
            if watch is not None and not watch.works:
                watch.close()
                watch = None
            tree = scanning().full(root, known)
            if watch is None and tree.totals.entries > SMALL_TREE and sandbox.opens_on_host and not is_tmpfs(root):
                # Only now, when it is known to be worth it: closing a watch takes the kernel 10 ms.
                watch = self.new_watch(sandbox.id, tree)
                if watch is not None:
                    try:
                        tree = scanning().full(root, known)  # it may have grown
                    except TreeNotSmall:
                        watch.close()  # before another one is made
                        raise
        return tree, watch

    def new_watch(self, sandbox_id: str, tree: Tree, linked: Iterable[tuple[Parts, str]] = ()) -> Watch | None:
        """A watch for a tree's directories; None where there can't be one, and every scan is a full one. `linked` are
        the files with several names, as far as that is known already. The sandbox is in use (Memories)."""
        if tree.totals.entries - tree.totals.files + 1 > self._watches.room:
            return None
        try:
            watch = Watch(self._watches, linked)
        except OSError:
            return None  # the user's inotify instances are used up
        self.memories.note_watch(sandbox_id, watch)
        return watch

    def _store(self, sandbox: Sandbox, memory: Memory | None, tree: Tree, watch: Watch | None) -> Memory:
        """Store what is new of a scanned tree. Runs on a thread; raises SnapshotRefused or OSError."""
        if tree.is_empty:
            return Memory(EMPTY, tree)
        stored = 0
        if tree.digest is None:
            with trees.opened_root(sandbox.workspace) as root, self.blobs.batch() as batch:
                counting = CountingBatch(batch)
                digest = trees.store(root, tree, memory.tree if memory else None, counting)
            stored = counting.total
            self.remember_totals(digest, tree.totals)
        if watch is not None:
            watch.skip()
        own = tree.own_totals()
        return Memory(Snapshot(tree.digest, own.files, own.total_bytes, stored), tree, watch)

    def _move(self, old: Sandbox, new: Sandbox, memory: Memory) -> Memory:
        """Do the work of `move`, on a thread. Returns what is known of the new sandbox. Raises OSError,
        SnapshotRefused."""
        with trees.opened_root(old.workspace) as source, trees.opened_root(new.workspace) as target:
            tree = restoring.move(source, target, memory.tree)
            watch = None
            if memory.linked is not None and new.opens_on_host:
                watch = self.new_watch(new.id, tree, memory.linked)
            if watch is not None:
                restoring.watch(target, tree, watch)
                watch.skip()
        return Memory(memory.snapshot, tree, watch)

    def _restore(self, sandbox: Sandbox, snapshot: Snapshot, memory: Memory | None, *, small: bool) -> Tree:
        """Restore a snapshot, on a thread. Returns the tree that the working directory now is. Raises OSError, and with
        `small` TreeNotSmall before anything is changed."""
        known, read = memory.tree if memory else Tree(), self.reader(small=small)
        if small and snapshot.root is not None:
            check_small(self._counted(snapshot.root, read))
        with trees.opened_root(sandbox.workspace) as root:
            if memory is None:
                restoring.check_empty(root, limits.bounds(sandbox.limits), packages=sandbox.may_have_packages())
            owner = None if sandbox.uid is None else (sandbox.uid, os.fstat(root).st_gid)
            return restoring.restore(root, snapshot.root, known, owner, self.blobs, read)

    def _edit(
        self,
        snapshot: Snapshot,
        changes: Changes,
        put: Callable[[BlobBatch], None],
        bounds: Bounds,
        *,
        small: bool,
        only_these: bool,
    ) -> Snapshot:
        """Do the work of `edit`, on a thread. Raises as `edit` does, OSError, and with `small` TreeNotSmall, where
        nothing but blobs is left of it."""
        if small and changes.count() > file_threads.LARGE_ENTRIES:
            raise TreeNotSmall
        plain_read = cache(self.reader(small=small))  # what is moved is read where it is and was
        with self.blobs.batch() as batch:
            counting = CountingBatch(batch)
            read: ReadTree = plain_read
            if only_these:
                read, kept = edits.only_packages(read, counting, snapshot.root)
                snapshot = Snapshot(kept, 0, 0)
            root, more = edits.apply(read, counting, snapshot.root, changes)
            if root is None:
                return EMPTY
            self.remember_totals(root, self._within(bounds, read, snapshot.root, more))
            put(batch)  # last, so that it is seldom done in vain
            files, total_bytes = snapshot.file_count + more.files, snapshot.total_bytes + more.total_bytes
            stored = counting.total + changes.put_bytes()
        if NODE_MODULES in changes.entries:  # whether it counts may have changed with it
            _, files, total_bytes, _ = edits.own_totals(plain_read, root)
        return Snapshot(root, files, total_bytes, stored)

    async def totals(self, snapshot: Snapshot, session_id: OwnedId) -> Totals:
        """What a snapshot holds, at most, packages included. Raises Unavailable where it can't be read."""
        if snapshot.root is None:
            return Totals()
        if (known := self._known_totals(snapshot.root)) is not None:
            return known
        root = snapshot.root
        return await self._reading(lambda read: self._counted(root, read), session_id)

    def _counted(self, root: str, read: ReadTree) -> Totals:
        """What a tree holds, at most: as it is remembered, or counted. Raises as `read` does."""
        if (known := self._known_totals(root)) is None:
            known = edits.count(read, root)
            self.remember_totals(root, known)
        return known

    def _within(self, bounds: Bounds, read: ReadTree, root: str | None, more: Totals) -> Totals:
        """What a tree would hold with so much more, packages included, as a run is measured. Raises TooLarge where that
        is more than before and over the bounds."""
        known = self._known_totals(root) if root else Totals()
        if known is None or not bounds.have_room(known.plus(more)):
            known = edits.count(read, root)
        entries, _, total_bytes, _ = whole = known.plus(more)
        if more.total_bytes > 0 and total_bytes > bounds.total_bytes:
            raise TooLarge(f"The session's files would be {total_bytes} bytes, {bounds.total_bytes} may be.")
        if more.entries > 0 and entries > bounds.entries:
            raise TooLarge(f"The session would have more than {bounds.entries} files and directories.")
        return whole

    def remember_totals(self, root: str, totals: Totals) -> None:
        """Remember what a tree holds, at most."""
        with self._counting:
            self._counts.pop(root, None)  # so it is the last
            self._counts[root] = totals
            if len(self._counts) > _COUNTS_KEPT:
                del self._counts[next(iter(self._counts))]

    def _known_totals(self, root: str) -> Totals | None:
        """What a tree holds, at most, if that is remembered."""
        with self._counting:
            totals = self._counts.pop(root, None)
            if totals is not None:
                self._counts[root] = totals
            return totals

    def reader(self, *, small: bool) -> ReadTree:
        """What reads tree objects on a thread. With `small` it raises TreeNotSmall once it has read many entries."""
        left = file_threads.LARGE_ENTRIES

        def read(digest: str) -> list[Entry]:
            nonlocal left
            entries = self.read_tree(digest)
            left -= max(1, len(entries))
            if small and left < 0:
                raise TreeNotSmall
            return entries

        return read

    def read_tree(self, digest: str) -> list[Entry]:
        """The entries of a tree object. Raises OSError."""
        return decode(self._tree_object(digest))

    def _tree_object(self, digest: str) -> bytes:
        """A tree object, whose digest is verified: a damaged one could name anything. Raises OSError."""
        content = self.blobs.get(digest)
        if hashlib.sha256(content).hexdigest() != digest:
            raise OSError(errno.EIO, "a directory's list is damaged")
        return content


def _rescanned(root: int, scan: Scan, memory: Memory | None, entry: str | None) -> Tree | None:
    """The tree by a scan of only what was touched; None where a full scan is needed. Raises as Scan.rescan does."""
    if memory is None or memory.watch is None or memory.held is None:
        return None
    touched = memory.watch.touched(entry)
    if touched is None:
        return None
    for path, name in memory.held:
        touched.at(path).names.add(name)
    try:
        return scan.rescan(root, memory.tree, touched)
    except FullScanNeeded:
        return None
