"""Reading and writing the files of a session, for clients.

Theory of operation. A sandbox's working directory is never touched: it was made by hostile code, and a run may be under
way in it. Reads come from the session's committed snapshot, so they are consistent and never see a run half done.
Writes make another snapshot and the session's next version, between runs; the session's sandbox, if it has one, is
brought up to date when it is used next.

A write has two parts. First its content is received and made durable, at the client's pace and without holding the
session's turn. Then, in its turn, the tree objects on the way to the change are written anew and a row is committed,
which takes no longer for a large file than for a small one.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from era.core.concurrency.tasks import Threads
from era.core.concurrency.turns import Liveness, Turns
from era.core.limits import Rules, bounds
from era.core.metadata import MetadataStore
from era.core.models import OwnedId, Session, Snapshot
from era.core.sessions.expiry import calling
from era.core.sessions.sessions import keeping_files
from era.core.sessions.versions import HistoryBound
from era.core.totals import Bounds, Totals
from era.core.trees import edits
from era.core.trees.blob_store import BlobStore
from era.core.trees.edits import Changes, Entry, FileEntry, Place, PutFile, Remove, display_path, no_file
from era.core.trees.paths import Parts
from era.core.trees.snapshots import Snapshots
from era.core.trees.spool import Spool, Upload
from era.core.trees.unpack import PIECE
from era.errors import BadRequest, Conflict, NotFound, PreconditionFailed, TooLarge, Unavailable

PATIENCE = 60.0
"""Seconds for which a change of files waits for the runs before it. Many clients would have given up by then without
knowing what they waited for."""

ANY = "*"
"""Stands for every entity tag."""
LIVE = "its versions can't be changed from outside"
"""What is so of a session that is live."""


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a session's files, and the snapshot that they were read from. `more`: there is a next page."""

    snapshot: Snapshot
    files: Sequence[FileEntry]
    more: bool


@dataclass(frozen=True, slots=True)
class Condition:
    """Preconditions of a write, as If-Match and If-None-Match state them: sets of digests, or of ANY. None: none."""

    match: frozenset[str] | None = None
    none_match: frozenset[str] | None = None

    def check(self, path: Parts, current: str | None) -> None:
        """Raises PreconditionFailed. `current` is the file's digest, None if nothing is there, "" if it is no file."""
        is_there = current is not None
        if self.match is not None and not (is_there and self.match & {ANY, current}):
            raise PreconditionFailed(f"'{display_path(path)}' is not what If-Match says.")
        if self.none_match is not None and is_there and self.none_match & {ANY, current}:
            raise PreconditionFailed(f"'{display_path(path)}' is what If-None-Match rules out.")


@dataclass(slots=True)
class OpenFile:
    """A file of a snapshot, open for reading. The caller must `close` it."""

    digest: str
    size: int
    mtime_ns: int
    _fd: int
    _threads: Threads

    async def pieces(self, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes from `start` to `end` (exclusive). Raises Unavailable where the disk fails."""
        while start < end:
            try:
                piece = await self._threads(os.pread, self._fd, min(end - start, PIECE), start)
            except OSError as error:
                raise Unavailable(f"The file could not be read: {error.strerror}.") from error
            if not piece:
                raise Unavailable("The file is not as long as it was.")
            start += len(piece)
            yield piece

    def close(self) -> None:
        os.close(self._fd)


type Body = Callable[[Session], AsyncIterator[bytes]]
"""Gives content in pieces, as they arrive, for a session that was just looked up."""


class SessionFiles:
    """Reads and writes files of sessions."""

    def __init__(
        self,
        store: MetadataStore,
        snapshots: Snapshots,
        blobs: BlobStore,
        turns: Turns,
        spool: Spool,
        threads: Threads,
        rules: Rules,
        history: HistoryBound,
        liveness: Liveness,
    ) -> None:
        self._liveness = liveness
        self._store = store
        self._snapshots = snapshots
        self._blobs = blobs
        self._turns = turns
        self._spool = spool
        self._threads = threads
        self._rules = rules
        self._history = history

    async def snapshot(self, session_id: OwnedId, version: int | None = None) -> tuple[Snapshot, int]:
        """The files of a version, of the current one if it is None, and when they became that. Raises NotFound where
        the version isn't kept."""
        if version is None:
            session = await self._store.session(session_id)
            return session.snapshot, session.updated_at
        found = (await self._store.version(session_id, version)).version
        return found.snapshot, found.created_at

    async def page(
        self,
        session_id: OwnedId,
        *,
        limit: int,
        after: Parts,
        prefix: Parts,
        directories: bool = False,
        version: int | None = None,
    ) -> Page:
        """Up to `limit` files after the path `after` whose path begins with `prefix`, in the order of their paths; with
        `directories` those too."""
        snapshot, _ = await self.snapshot(session_id, version)
        files = await self._snapshots.entries(
            snapshot, session_id, after=after, prefix=prefix, directories=directories, limit=limit + 1
        )
        return Page(snapshot, files[:limit], len(files) > limit)

    async def stat(self, session_id: OwnedId, path: Parts) -> FileEntry:
        """What is at a path. Raises NotFound, Conflict where the path leads through a link."""
        snapshot, _ = await self.snapshot(session_id)
        return edits.file_entry(path, await self._snapshots.find(snapshot, path, session_id))

    async def open(self, session_id: OwnedId, path: Parts, version: int | None = None) -> OpenFile:
        """Open a file. Raises NotFound, Conflict for what is no file, Unavailable where the disk fails."""
        snapshot, _ = await self.snapshot(session_id, version)
        entry = await self._snapshots.find(snapshot, path, session_id)
        match entry:
            case "file", _, digest, size, _, mtime_ns, *_:
                try:
                    fd = await self._threads.in_turn(
                        session_id.owner, self._blobs.open_blob, digest, session=session_id
                    )
                except OSError as error:
                    raise Unavailable(f"The file could not be read: {error.strerror}.") from error
                return OpenFile(digest, size, mtime_ns, fd, self._threads)
            case "link", *_:
                raise Conflict(
                    f"'{display_path(path)}' is a symbolic link. Where it points is not followed.",
                    hint="Get the file it points to by its own path, or the archive, where links are kept as they are.",
                    code="is_a_link",
                )
            case _:
                raise Conflict(
                    f"'{display_path(path)}' is a directory.",
                    hint="GET /api/sessions/{id}/files?prefix=DIRECTORY/ lists it.",
                    code="is_a_directory",
                )

    @asynccontextmanager
    async def received(self, session_id: OwnedId, path: Parts, body: Body) -> AsyncIterator[tuple[Session, Upload]]:
        """The session, and all of `body`, received for a file in it; it is there within the block. Raises Conflict
        where the session keeps no files, TooLarge for a path that is too deep, TooManyUploads, Unavailable."""
        session = keeping_files(await self._store.session(session_id))
        self.check_depth(path)
        receiving = self._spool.receive(body(session), session.owner, self._threads)
        async with calling(self._store, session), receiving as upload:
            yield session, upload

    async def put_received(
        self,
        session: Session,
        path: Parts,
        upload: Upload,
        condition: Condition,
        *,
        mode: int | None = None,
        patience: float = PATIENCE,
    ) -> int:
        """Write a file whose content has been received. Returns how many old versions that dropped.

        Raises Conflict where something of another kind is there or on the way, TooLarge beyond the session's limits,
        PreconditionFailed, SessionLive; RunUnderWay where the turn doesn't come within `patience` (seconds; 0 waits for
        no run).
        """
        self._liveness.check_not(session, LIVE)
        if upload.content is None:
            if condition != Condition():  # what is refused anyway would stay on the disk until it's swept as garbage
                session = await self.writable_session(session.owned_id, session.key)
                condition.check(path, await self._current(session, path))
            await self._put_ahead(session.owner, upload)
        changes = Changes()
        changes.add(path, PutFile(upload.digest, upload.size, time.time_ns(), mode))
        async with self._turns.take(session.owned_id, patience=patience):
            session = await self.writable_session(session.owned_id, session.key)
            if condition != Condition():
                condition.check(path, await self._current(session, path))
            # Put it again: it may have waited for its turn so long that it was swept as garbage.
            with self._blobs.naming():
                snapshot = await self._snapshots.edit(
                    session.snapshot, changes, upload.put, self.bounds(session), session.owned_id
                )
                return (await self.commit(session, snapshot))[1]

    async def _put_ahead(self, owner: str, upload: Upload) -> None:
        """Make what was received durable before anything names it. Raises Unavailable."""

        def put() -> None:
            with self._blobs.batch() as batch:
                upload.put(batch)

        try:
            await self._threads.in_turn(owner, put)
        except OSError as error:
            raise Unavailable(f"The file could not be kept: {error.strerror}.") from error

    async def content(self, upload: Upload, size: int) -> AsyncIterator[bytes]:
        """The content of an upload, in pieces of `size` bytes at most. Raises Unavailable where the disk fails."""
        if upload.content is not None:
            for at in range(0, len(upload.content), size):
                yield upload.content[at : at + size]
            return
        try:
            try:
                fd = await self._threads(os.open, upload.path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # the blob store has taken it over
                fd = await self._threads(self._blobs.open_blob, upload.digest)
            try:
                at = 0
                while piece := await self._threads(os.pread, fd, size, at):
                    at += len(piece)
                    yield piece
            finally:
                os.close(fd)
        except OSError as error:
            raise Unavailable(f"The body could not be read again: {error.strerror}.") from error

    async def delete(
        self, session_id: OwnedId, path: Parts, *, recursive: bool, condition: Condition, patience: float = PATIENCE
    ) -> int:
        """Remove a file or link; a directory only if `recursive`. Returns how many old versions that dropped. Raises
        NotFound, Conflict, PreconditionFailed; RunUnderWay as `put_received` does."""
        async with self._turns.take(session_id, patience=patience):
            session = await self.writable_session(session_id)
            current = await self._current(session, path)
            condition.check(path, current)
            if current is None:
                raise no_file(path)
            changes = Changes()
            changes.add(path, Remove(recursive))
            return await self._edit(session, changes)

    async def make_directory(
        self, session_id: OwnedId, path: Parts, *, mode: int | None = None, patience: float = PATIENCE
    ) -> tuple[bool, int]:
        """Make a directory, and those on the way to it. Returns whether it is new, and how many old versions that
        dropped. One that is there stays as it is. Raises Conflict where something else is; RunUnderWay as `put`
        does."""
        self.check_depth((*path, ""))
        async with self._turns.take(session_id, patience=patience):
            session = await self.writable_session(session_id)
            there = await self._found(session, path)
            if there is not None and there[0] == "dir":
                return False, 0
            changes = Changes()
            changes.add_directory(path, mode)
            return True, await self._edit(session, changes)

    async def move(
        self, session_id: OwnedId, source: Parts, target: Parts, *, replace: bool, patience: float = PATIENCE
    ) -> int:
        """Give a file, link or directory another path; directories on the way to that are made. Returns how many old
        versions that dropped. One that is moved to where it is stays.

        Raises NotFound where nothing is at `source`; Conflict where something is at `target`, unless it is a file or
        link and may be replaced (`replace`); BadRequest for what would be in itself; TooLarge where that
        would be too deep; RunUnderWay as `put_received` does.
        """
        self.check_depth(target)
        async with self._turns.take(session_id, patience=patience):
            session = await self.writable_session(session_id)
            entry = await self._snapshots.find(session.snapshot, source, session.owned_id)
            if source == target:
                return 0
            if target[: len(source)] == source:
                raise BadRequest(
                    f"'{display_path(target)}' is below '{display_path(source)}': nothing can be moved into itself.",
                    hint="Choose another path.",
                    code="bad_path",
                )
            self._check_free(target, await self._found(session, target), entry, replace=replace)
            levels = await self._snapshots.depth(entry, session.owned_id)
            self.check_depth((*target, *("",) * levels))
            changes = Changes()
            changes.add(source, Remove(recursive=True))
            changes.add(target, Place(entry))
            return await self._edit(session, changes)

    def _check_free(self, target: Parts, there: Entry | None, entry: Entry, *, replace: bool) -> None:
        """Raises Conflict where what is at `target` can't make way for an entry."""
        if there is None or (replace and "dir" not in (there[0], entry[0])):
            return
        raise Conflict(
            f"There is something at '{display_path(target)}' already.",
            hint='Delete it first, or send "replace": true, which replaces files and links.',
            code="exists",
        )

    async def _edit(self, session: Session, changes: Changes) -> int:
        """Commit changes that put no content, in the session's turn. Returns how many old versions that dropped."""
        with self._blobs.naming():
            snapshot = await self._snapshots.edit(
                session.snapshot, changes, lambda _: None, self.bounds(session), session.owned_id
            )
            return (await self.commit(session, snapshot))[1]

    async def commit(self, session: Session, snapshot: Snapshot) -> tuple[Session, int]:
        """Make `snapshot` the session's next version, in its turn. Returns the session after that, and how many old
        versions had to go for it."""
        trim = await self._history.trim(session, snapshot)
        committed = await self._store.commit(
            session.owned_id, "files", data=None, snapshot=snapshot, key=session.key, trim=trim
        )
        return committed, 0 if trim is None else len(trim.drop)

    async def writable_session(self, session_id: OwnedId, key: int | None = None) -> Session:
        """The session, which must keep files; with `key`, it must be the very one that had this key.

        Raises NotFound where another has taken its id meanwhile, Conflict where it isn't persistent, SessionLive where
        its processes work on its files.
        """
        session = await self._store.session(session_id)
        if key is not None and session.key != key:
            raise NotFound(f"Session '{session_id}' was deleted meanwhile.")
        self._liveness.check_not(keeping_files(session), LIVE)
        return session

    def bounds(self, session: Session) -> Bounds:
        """The bounds of the session's tree."""
        return bounds(self._rules.granted(session.limits))

    def check_depth(self, path: Parts) -> None:
        """Raises TooLarge for a path through too many directories."""
        depth = bounds(self._rules.defaults).depth
        if len(path) > depth + 1:
            raise TooLarge(f"The path goes through {len(path) - 1} directories, {depth} may be.")

    def size_check(self, session: Session, allowed: int | None = None) -> Callable[[int], None]:
        """A function that raises TooLarge for a size (bytes) that the session can't hold, whatever it holds now, or
        that is over `allowed`."""
        most = self.bounds(session).total_bytes

        def check(size: int) -> None:
            if allowed is not None and size > allowed:
                raise TooLarge(
                    f"The body is over {allowed} bytes, which is as much as this link allows.",
                    hint="Send less. Nothing was changed.",
                )
            if size > most:
                raise TooLarge(
                    f"The body is over {most} bytes, which is as much as this session may hold.",
                    hint="Send less, or raise the session's limits.disk_mb. Nothing was changed.",
                )

        return check

    async def check_room(self, session: Session, path: Parts, size: int) -> None:
        """Raises TooLarge for a file of so many bytes that the session can't hold beside what it held last, packages
        included. In a live session that is to be known before it is written: what exceeds the bound there can't be
        committed, and then its processes are ended."""
        most, held = self.bounds(session), await self._snapshots.totals(session.snapshot, session.owned_id)
        if most.have_room(held.plus(Totals(1, 1, size))):
            return
        entry = await self._found(session, path)
        before = Totals() if entry is None else Totals(1, 1, edits.entry_size(entry) if entry[0] == "file" else 0)
        more = Totals(1, 1, size).minus(before)
        held = held.plus(more)
        if not most.have_room(held) and (more.total_bytes > 0 or more.entries > 0):
            raise TooLarge(
                f"The session would hold {held.total_bytes} bytes in {held.entries} files and directories, "
                f"{most.total_bytes} in {most.entries} may be."
            )

    async def _current(self, session: Session, path: Parts) -> str | None:
        """What is at a path, as Condition.check takes it: a file's digest, None for nothing, "" for no file."""
        entry = await self._found(session, path)
        if entry is None:
            return None
        return str(entry[2]) if entry[0] == "file" else ""

    async def _found(self, session: Session, path: Parts) -> Entry | None:
        """The entry at a path, None for nothing."""
        try:
            return await self._snapshots.find(session.snapshot, path, session.owned_id)
        except NotFound:
            return None
