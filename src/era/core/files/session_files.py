"""The files of a session, read and changed by its clients.

Theory of operation. A live working directory is never touched: hostile code made it, and a run may be under way in it.
What is read comes from the session's committed snapshot, so it is consistent, and is never what a run has half done.
What is written makes another snapshot and the session's next version, between runs; its sandbox, if it has one, catches
up when it is used next.

A write has two parts. Its content comes in and becomes durable first, at the client's pace and without the turn. Then,
in its turn, the tree objects on the way to the change are written anew and a row is committed, which takes no longer
for a large file than for a small one.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from era.core.expiry import calling
from era.core.files.edits import Changes, Listed, PutFile, Remove, no_file, shown
from era.core.files.paths import Parts
from era.core.files.snapshots import BlobStore, Snapshots
from era.core.files.spool import Spool, Threads, Upload
from era.core.files.trees import Bounds
from era.core.files.unpack import PIECE
from era.core.limits import Rules, bounds
from era.core.metadata import MetadataStore
from era.core.models import OwnedId, Session
from era.core.turns import Turns
from era.errors import Conflict, NotFound, PreconditionFailed, TooLarge, Unavailable

ANY = "*"


@dataclass(frozen=True, slots=True)
class Page:
    """Some of a session's files, and the session as it was then."""

    session: Session
    files: Sequence[Listed]
    more: bool


@dataclass(frozen=True, slots=True)
class Condition:
    """What must be true of a file for it to be changed: digests, or ANY for whatever there is."""

    match: frozenset[str] | None = None
    none_match: frozenset[str] | None = None

    def check(self, path: Parts, current: str | None) -> None:
        """Raises PreconditionFailed. `current` is None where there is nothing, "" where it is no file."""
        is_there = current is not None
        if self.match is not None and not (is_there and self.match & {ANY, current}):
            raise PreconditionFailed(f"'{shown(path)}' is not what If-Match says.")
        if self.none_match is not None and is_there and self.none_match & {ANY, current}:
            raise PreconditionFailed(f"'{shown(path)}' is what If-None-Match rules out.")


@dataclass(slots=True)
class OpenFile:
    """A file of a snapshot, open to be read. `close` when done."""

    digest: str
    size: int
    mtime_ns: int
    _fd: int
    _threads: Threads

    async def pieces(self, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes from `start` up to `end`. Raises Unavailable where the disk fails."""
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


class SessionFiles:
    def __init__(
        self,
        store: MetadataStore,
        snapshots: Snapshots,
        blobs: BlobStore,
        turns: Turns,
        spool: Spool,
        threads: Threads,
        rules: Rules,
    ) -> None:
        self._store = store
        self._snapshots = snapshots
        self._blobs = blobs
        self._turns = turns
        self._spool = spool
        self._threads = threads
        self._rules = rules

    async def page(self, session_id: OwnedId, *, limit: int, after: Parts, prefix: Parts) -> Page:
        """Files in the order of their paths: up to `limit` of those after the path `after` that begin with `prefix`."""
        session = await self._store.session(session_id)
        found = await self._snapshots.entries(session.snapshot, after=after, prefix=prefix, limit=limit + 1)
        return Page(session, found[:limit], len(found) > limit)

    async def open(self, session_id: OwnedId, path: Parts) -> OpenFile:
        """Raises NotFound, and Conflict for what is no file."""
        session = await self._store.session(session_id)
        entry = await self._snapshots.find(session.snapshot, path)
        match entry:
            case "file", _, digest, size, _, mtime_ns, *_:
                try:
                    fd = await self._threads(self._blobs.open_blob, digest)
                except OSError as error:
                    raise Unavailable(f"The file could not be read: {error.strerror}.") from error
                return OpenFile(digest, size, mtime_ns, fd, self._threads)
            case "link", *_:
                raise Conflict(
                    f"'{shown(path)}' is a symbolic link. Where it points is not followed.",
                    hint="Get the file it points to by its own path, or the archive, where links are kept as they are.",
                    code="is_a_link",
                )
            case _:
                raise Conflict(
                    f"'{shown(path)}' is a directory.",
                    hint="GET /api/sessions/{id}/files?prefix=DIRECTORY/ lists it.",
                    code="is_a_directory",
                )

    async def put(self, session_id: OwnedId, path: Parts, pieces: AsyncIterator[bytes], condition: Condition) -> Upload:
        """Put a file in the place of what is there. All of it is durable when this returns, or nothing has changed.

        Raises Conflict where something of another kind is there or on the way, TooLarge beyond the bounds,
        PreconditionFailed, TooManyUploads.
        """
        session = await self.changeable(session_id)
        self.check_depth(path)
        async with calling(self._store, session), self._spool.received(pieces, self._threads) as upload:
            if upload.content is None:
                await self._threads(self._put_ahead, upload)
            changes = Changes()
            changes.at(path, PutFile(upload.digest, upload.size, time.time_ns()))
            async with self._turns.take(session_id):
                session = await self.changeable(session_id, session.key)
                if condition != Condition():
                    condition.check(path, await self._current(session, path))
                # Put once more: it may have waited for its turn so long that it was swept.
                snapshot = await self._snapshots.edit(session.snapshot, changes, upload.put, self.bounds(session))
                await self._store.commit(session_id, "files", data=None, snapshot=snapshot, key=session.key)
            return upload

    async def delete(self, session_id: OwnedId, path: Parts, *, recursive: bool, condition: Condition) -> None:
        """Remove a file or link; a directory only if `recursive`. Raises NotFound, Conflict, PreconditionFailed."""
        async with self._turns.take(session_id):
            session = await self.changeable(session_id)
            current = await self._current(session, path)
            condition.check(path, current)
            if current is None:
                raise no_file(path)
            changes = Changes()
            changes.at(path, Remove(recursive))
            snapshot = await self._snapshots.edit(session.snapshot, changes, lambda _: None, self.bounds(session))
            await self._store.commit(session_id, "files", data=None, snapshot=snapshot, key=session.key)

    async def changeable(self, session_id: OwnedId, key: int | None = None) -> Session:
        """The session, if it is the one with this key and can have files."""
        session = await self._store.session(session_id)
        if key is not None and session.key != key:
            raise NotFound(f"Session '{session_id}' was deleted meanwhile.")
        if not session.persistent:
            raise Conflict(
                f"Session '{session_id}' is not persistent: it keeps no files.",
                hint='Make a session with "persistent": true.',
                code="not_persistent",
            )
        return session

    def bounds(self, session: Session) -> Bounds:
        """What the session's tree may hold."""
        return bounds(self._rules.granted(session.limits))

    def check_depth(self, path: Parts) -> None:
        """Raises TooLarge."""
        depth = bounds(self._rules.defaults).depth
        if len(path) > depth + 1:
            raise TooLarge(f"The path goes through {len(path) - 1} directories, {depth} may be.")

    async def size_check(self, session_id: OwnedId) -> Callable[[int], None]:
        """What raises TooLarge for the size of a body that the session can't hold."""
        most = self.bounds(await self._store.session(session_id)).total_bytes

        def check(size: int) -> None:
            if size > most:
                raise TooLarge(
                    f"The body is over {most} bytes, which is as much as this session may hold.",
                    hint="Send less, or raise the session's limits.disk_mb. Nothing was changed.",
                )

        return check

    async def _current(self, session: Session, path: Parts) -> str | None:
        try:
            entry = await self._snapshots.find(session.snapshot, path)
        except NotFound:
            return None
        return str(entry[2]) if entry[0] == "file" else ""

    def _put_ahead(self, upload: Upload) -> None:
        try:
            with self._blobs.batch() as batch:
                upload.put(batch)
        except OSError as error:
            raise Unavailable(f"The file could not be kept: {error.strerror}.") from error
