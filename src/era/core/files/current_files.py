"""The files of a session as they are now: those of its version in force, or of its tree while it is live.

Theory of operation. Where a session isn't live, its version is all there is, and SessionFiles answers. In a live
session the tree of this moment is read and changed from inside, by a helper with the rights of the session's own
programs (file_helper.py). So a GET sees what a process has just written, and a PUT is there for it at once.

While a session is put away its tree can't be asked any more, and its version is behind. Calls wait for that.

A change takes the session's turn. When the tree has it, the tree is committed (checkpoints.py), and that is when the
call is answered: what it says is durable, and is what a run or a crash right after it begins from.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from era.core import jsontext
from era.core.concurrency.turns import Turns
from era.core.files.session_files import PATIENCE, Body, Condition, OpenFile, Page, SessionFiles
from era.core.live.checkpoints import Checkpoints
from era.core.live.file_helper import PIECE, FileHelper, entry_of, gone, number_of
from era.core.live.live_session import LiveSession
from era.core.live.live_sessions import LiveSessions
from era.core.metadata import MetadataStore
from era.core.models import OwnedId, Session, Snapshot
from era.core.sessions.sessions import keeping_files
from era.core.trees.edits import FileEntry, display_path, in_the_way
from era.core.trees.paths import Parts
from era.core.trees.spool import Upload
from era.errors import BadRequest, EraError, NotFound, SandboxFailed, SessionLive, Unavailable

_ATTEMPTS = 5
_SETTLE_SECONDS = 30.0
"""How long a call waits for a session that is being put away."""

_PAUSE = 0.05


class _PutAway(Exception):
    """The session isn't live any more."""


class LiveFile:
    """A file of a live session, open for reading; see OpenFile."""

    def __init__(self, helper: FileHelper, handle: int, entry: FileEntry, tag: str) -> None:
        self.digest = entry.digest or tag
        self.size = entry.size
        self.mtime_ns = entry.mtime_ns or 0
        self._helper = helper
        self._handle = handle
        self._closing: asyncio.Task[object] | None = None

    async def pieces(self, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes from `start` to `end` (exclusive). Raises Unavailable where the file gets shorter meanwhile."""
        while start < end:
            _, piece = await self._helper.call("read", handle=self._handle, at=start, size=min(PIECE, end - start))
            if not piece or len(piece) > end - start:
                raise Unavailable("The file is not as long as it was.")
            start += len(piece)
            yield piece

    def close(self) -> None:
        if self._closing is None and self._helper.alive:
            self._closing = asyncio.create_task(_quietly(self._helper.call("close", handle=self._handle)))


class CurrentFiles:
    """Reads and changes the files of sessions, live or not."""

    def __init__(
        self,
        files: SessionFiles,
        live_sessions: LiveSessions,
        checkpoints: Checkpoints,
        store: MetadataStore,
        turns: Turns,
    ) -> None:
        self._files = files
        self._live_sessions = live_sessions
        self._checkpoints = checkpoints
        self._store = store
        self._turns = turns
        self.check_depth = files.check_depth
        self.size_check = files.size_check

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
        """See SessionFiles.page. Of a live session, files over 16 MiB have no digest."""

        async def live_page(live: LiveSession, helper: FileHelper) -> Page:
            head, body = await helper.call(
                "list", after=list(after), prefix=list(prefix), limit=limit + 1, directories=directories
            )
            is_long = len(body) > jsontext.IN_THREAD
            listed = partial(_listed, most=limit + 1)
            files = await jsontext.aside(listed, body) if is_long else listed(body)
            totals = Snapshot(None, number_of(head, "count"), number_of(head, "bytes"))
            return Page(totals, files[:limit], len(files) > limit)

        async def stored_page() -> Page:
            return await self._files.page(
                session_id, limit=limit, after=after, prefix=prefix, directories=directories, version=version
            )

        return await (stored_page() if version is not None else self._read(session_id, live_page, stored_page))

    async def stat(self, session_id: OwnedId, path: Parts) -> FileEntry:
        """Describe a file or directory, as SessionFiles.stat does. A path without parts is the working directory."""
        if not path:
            await self._store.session(session_id)
            return FileEntry("", "dir")

        async def live_stat(live: LiveSession, helper: FileHelper) -> FileEntry:
            found, _ = await helper.call("stat", path, **_at(path))
            entry = entry_of(path, found)
            if entry.kind not in ("file", "link", "dir"):
                raise in_the_way("other", path)
            return entry

        return await self._read(session_id, live_stat, lambda: self._files.stat(session_id, path))

    async def open(self, session_id: OwnedId, path: Parts, version: int | None = None) -> OpenFile | LiveFile:
        """See SessionFiles.open."""

        async def live_open(live: LiveSession, helper: FileHelper) -> OpenFile | LiveFile:
            found, _ = await helper.call("open", path, **_at(path))
            return LiveFile(helper, number_of(found, "handle"), entry_of(path, found), _tag(found))

        async def stored_open() -> OpenFile | LiveFile:
            return await self._files.open(session_id, path, version)

        return await (stored_open() if version is not None else self._read(session_id, live_open, stored_open))

    async def put(
        self,
        session_id: OwnedId,
        path: Parts,
        body: Body,
        condition: Condition,
        *,
        mode: int | None = None,
        patience: float = PATIENCE,
    ) -> tuple[Upload, int]:
        """Write a file, replacing one that is there. All of it is durable when this returns, or nothing has changed.
        `mode` are its permission bits; see PutFile.

        Returns what was written, and how many old versions that dropped. Raises as SessionFiles.received and
        put_received do.
        """
        if patience == 0:
            self._turns.check_free(session_id)  # before the content is sent
        async with self._files.received(session_id, path, body) as (session, upload):

            async def live_put(live: LiveSession, helper: FileHelper) -> int:
                await self._check(helper, path, condition)
                # There may be more room, or less, since the body began to come.
                now = await self._store.session(session_id)
                await self._files.check_room(now, path, upload.size)
                if upload.size <= PIECE:
                    content = b"".join([piece async for piece in self._files.content(upload, PIECE)])
                    await helper.call("put", path, content, **_at(path), mode=mode, mtime_ns=time.time_ns())
                else:
                    await self._write(helper, path, upload, mode)
                return await self._checkpoints.commit_edit(live)

            async def stored_put() -> int:
                return await self._files.put_received(session, path, upload, condition, mode=mode, patience=patience)

            return upload, await self._change(session_id, patience, live_put, stored_put, session)

    async def delete(
        self, session_id: OwnedId, path: Parts, *, recursive: bool, condition: Condition, patience: float = PATIENCE
    ) -> int:
        """See SessionFiles.delete."""

        async def live_delete(live: LiveSession, helper: FileHelper) -> int:
            await self._check(helper, path, condition)
            await helper.call("delete", path, **_at(path), recursive=recursive)
            return await self._checkpoints.commit_edit(live)

        return await self._change(
            session_id,
            patience,
            live_delete,
            lambda: self._files.delete(session_id, path, recursive=recursive, condition=condition, patience=patience),
        )

    async def make_directory(
        self, session_id: OwnedId, path: Parts, *, mode: int | None = None, patience: float = PATIENCE
    ) -> tuple[bool, int]:
        """Make a directory, as SessionFiles.make_directory does. A path without parts is the working directory, which
        exists already."""
        if not path:
            keeping_files(await self._store.session(session_id))
            return False, 0
        self.check_depth((*path, ""))

        async def live_make(live: LiveSession, helper: FileHelper) -> tuple[bool, int]:
            found, _ = await helper.call("mkdir", path, **_at(path), mode=mode)
            created = found.get("created") is True
            return created, await self._checkpoints.commit_edit(live) if created else 0

        return await self._change(
            session_id,
            patience,
            live_make,
            lambda: self._files.make_directory(session_id, path, mode=mode, patience=patience),
        )

    async def move(
        self, session_id: OwnedId, source: Parts, target: Parts, *, replace: bool, patience: float = PATIENCE
    ) -> int:
        """See SessionFiles.move."""
        self.check_depth(target)

        async def live_move(live: LiveSession, helper: FileHelper) -> int:
            if target != source and target[: len(source)] == source:
                raise BadRequest(
                    f"'{display_path(target)}' is below '{display_path(source)}': nothing can be moved into itself.",
                    hint="Choose another path.",
                    code="bad_path",
                )
            await helper.call("stat", source, **_at(source))
            await helper.call("move", target, source=list(source), target=list(target), replace=replace)
            return await self._checkpoints.commit_edit(live)

        return await self._change(
            session_id,
            patience,
            live_move,
            lambda: self._files.move(session_id, source, target, replace=replace, patience=patience),
        )

    async def keep(self, session_id: OwnedId) -> None:
        """Have the version in force say what the tree of a live session holds. Raises as Checkpoints.request does."""
        session = await self._store.session(session_id)
        await self._settled(session)
        with self._live_sessions.in_use(session.key) as live:
            if live is not None:
                await self._checkpoints.request(live)

    async def _settled(self, session: Session) -> None:
        """Wait until a session that is being put away has been. Raises Unavailable where that takes too long: what its
        version has by then isn't what its tree holds, and a file that is there would be said not to be."""
        await self._live_sessions.settled(session.key, _SETTLE_SECONDS)
        if self._live_sessions.is_being_put_away(session.key):
            raise Unavailable(f"Session '{session.id}' is being put away: its files can't be read until it has been.")

    async def _check(self, helper: FileHelper, path: Parts, condition: Condition) -> None:
        """Raises PreconditionFailed where the file isn't as the condition demands."""
        if condition == Condition():
            return
        current: str | None
        try:
            found, _ = await helper.call("stat", path, **_at(path))
            entry = entry_of(path, found)
            current = (entry.digest or _tag(found)) if entry.kind == "file" else ""
        except NotFound:
            current = None
        condition.check(path, current)

    async def _write(self, helper: FileHelper, path: Parts, upload: Upload, mode: int | None) -> None:
        """Have the helper make a file of a large upload, piece by piece."""
        made, _ = await helper.call("create", path, **_at(path))
        handle = number_of(made, "handle")
        try:
            at = 0
            async for piece in self._files.content(upload, PIECE):
                await helper.call("write", path, piece, handle=handle, at=at)
                at += len(piece)
            await helper.call("place", path, handle=handle, name=path[-1], mode=mode, mtime_ns=time.time_ns())
        except BaseException:
            await _quietly(helper.call("close", handle=handle))
            raise

    async def _read[T](
        self,
        session_id: OwnedId,
        live_job: Callable[[LiveSession, FileHelper], Awaitable[T]],
        stored_job: Callable[[], Awaitable[T]],
    ) -> T:
        """What a live session's helper says, or else what the version in force does."""
        session = await self._store.session(session_id)
        await self._settled(session)
        with self._live_sessions.in_use(session.key) as live:
            if live is not None:
                with suppress(_PutAway):
                    return await live_job(live, await _helper(live))
        if live is not None:  # it ended while its helper was started
            await self._settled(session)
        return await stored_job()

    async def _change[T](
        self,
        session_id: OwnedId,
        patience: float,
        live_job: Callable[[LiveSession, FileHelper], Awaitable[T]],
        stored_job: Callable[[], Awaitable[T]],
        session: Session | None = None,
    ) -> T:
        """Change the tree of a live session in its turn, or else the version in force. It may become live, or be put
        away, while this waits. Given a `session`, as it was a moment ago, it must be that very one: both jobs see to
        that by its key."""
        key = None if session is None else session.key
        for left in reversed(range(_ATTEMPTS)):
            if session is None:
                session = keeping_files(await self._store.session(session_id))
            if key is not None and session.key != key:
                raise NotFound(f"Session '{session_id}' was deleted meanwhile.")
            await self._live_sessions.settled(session.key, _SETTLE_SECONDS)
            try:
                with self._live_sessions.in_use(session.key) as live:
                    if live is None:
                        return await stored_job()
                    async with self._turns.take(session_id, patience=patience):
                        if not live.is_open:
                            raise _PutAway
                        return await live_job(live, await _helper(live))
            except (SessionLive, _PutAway) as error:
                if not left:
                    raise Unavailable("The session became live or was put away all the time.") from error
                await asyncio.sleep(_PAUSE)
                session = None
        raise AssertionError("the last attempt returns or raises")


async def _helper(live: LiveSession) -> FileHelper:
    """See LiveSession.files. Raises _PutAway where the session isn't open any more."""
    try:
        return await live.files()
    except SandboxFailed:
        if live.is_open:
            raise
        raise _PutAway from None


def _listed(body: bytes, most: int) -> list[FileEntry]:
    """The entries of a list, so many at most. Raises Unavailable for what the helper can't have written."""
    if jsontext.has_too_many_parts(body):
        raise gone()
    try:
        listed = json.loads(body, parse_int=jsontext.integers())
        return [entry_of(tuple(map(str, each["path"])), each) for each in listed[:most]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise gone() from None


def _at(path: Parts) -> dict[str, Any]:
    return {"path": list(path)}


def _tag(found: Mapping[str, Any]) -> str:
    """What stands for the digest of a large file: it changes whenever the file is written to."""
    return "-".join(str(number_of(found, name)) for name in ("inode", "size", "mtime_ns", "ctime_ns"))


async def _quietly(work: Awaitable[object]) -> None:
    """Do something whose failure means nothing."""
    try:
        await work
    except (EraError, OSError):
        return
