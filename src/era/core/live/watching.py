"""Watches of the files of live sessions: what changes in them, as it happens (guest/live_watch.py).

Each watch has a helper of its own in the sandbox, which ends with it. What that says is input from the sandbox: its
form is checked, its pace is that of any output, and what its reader doesn't take in time is dropped and told
(EventLog).
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from era.core.event_log import EventLog, Gap
from era.core.files.paths import Parts
from era.core.live.file_helper import error_of, framed, gone
from era.core.live.live_session import LiveSession
from era.core.live.live_sessions import LiveSessions
from era.core.loop_slices import Budget
from era.core.metadata import MetadataStore
from era.core.models import OwnedId
from era.core.ports import GuestProcess
from era.core.process import ProcessOutput, ProcessSpec
from era.errors import Conflict, EraError

MOST = 8
"""Watches of a session at a time."""

_SPEC = ProcessSpec((), {}, channel=True, module="live_watch")
_SECONDS = 30.0
_LINE_BYTES = 64 << 10
_KEPT_BYTES = 1 << 20
_BYTE_US = 0.1
"""What it costs the event loop to take a byte."""

_KINDS = ("create", "write", "remove", "rename", "chmod", "overflow")


@dataclass(frozen=True, slots=True)
class FileEvent:
    """Something has changed. `to` is the new path of what was renamed; an `overflow` has no path."""

    kind: str
    path: str | None = None
    to: str | None = None


class Watching:
    """Watches. There is one of these a service."""

    def __init__(self, live_sessions: LiveSessions, store: MetadataStore) -> None:
        self._live_sessions = live_sessions
        self._store = store
        self._counts: Counter[int] = Counter()
        """Watches of each session, by its key."""

    @asynccontextmanager
    async def watched(
        self, session_id: OwnedId, path: Parts, *, recursive: bool
    ) -> AsyncIterator[AsyncIterator[tuple[int, FileEvent] | Gap]]:
        """What changes in a directory, or to a file, from now on, until the session isn't live any more. Raises
        NotFound, Conflict where it isn't live now, has too many watches or too many directories; SandboxFailed,
        Unavailable. The events raise EraError when the watch ends, and say why."""
        session = await self._store.session(session_id)
        with self._live_sessions.in_use(session.key) as live:
            if live is None:
                raise _not_live(session.id)
            if self._counts[session.key] >= MOST:
                raise Conflict(
                    f"Session '{session.id}' has {MOST} watches, as many as it may.",
                    hint="End one, or watch a directory above with recursive=true.",
                    code="too_many_watches",
                )
            self._counts[session.key] += 1
            try:
                supervisor = await live.supervisor()
                process = await supervisor.start(_SPEC)
                watch = _Watch(process, live, path)
                try:
                    await watch.begin(recursive=recursive)
                    yield watch.events()
                finally:
                    await watch.end()
            finally:
                self._counts[session.key] -= 1
                if not self._counts[session.key]:
                    del self._counts[session.key]


class _Watch:
    def __init__(self, process: GuestProcess, live: LiveSession, path: Parts) -> None:
        self._process = process
        self._live = live
        self._path = path
        self._log: EventLog[FileEvent] = EventLog(max_size=_KEPT_BYTES)
        self._begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._error: EraError | None = None
        self._following = asyncio.create_task(self._follow())

    async def begin(self, *, recursive: bool) -> None:
        """Wait until it is in force. Raises EraError."""
        try:
            async with asyncio.timeout(_SECONDS):
                await self._process.send(framed({"path": list(self._path), "recursive": recursive}))
                await asyncio.wait([self._begun, self._following], return_when=asyncio.FIRST_COMPLETED)
        except (TimeoutError, BrokenPipeError):
            raise gone() from None
        if not self._begun.done():
            raise self._why()

    async def events(self) -> AsyncIterator[tuple[int, FileEvent] | Gap]:
        """All events. Raises EraError at the end."""
        async for event in self._log.follow():
            yield event
        raise self._why()

    async def end(self) -> None:
        await self._process.kill()
        await asyncio.wait([self._following])

    def _why(self) -> EraError:
        """Why it has ended."""
        return _not_live(self._live.session.id) if not self._live.is_open else self._error or gone()

    async def _follow(self) -> None:
        """Log what the helper tells, until it ends or says what can't be."""
        buffer, budget = b"", Budget(self)
        try:
            async for event in self._process.events():
                if not isinstance(event, ProcessOutput):
                    break
                if event.stream != "channel":
                    continue
                *lines, buffer = (buffer + event.data).split(b"\n")
                for line in lines:
                    self._take(line)
                await budget.spend(len(event.data) * _BYTE_US)
                if len(buffer) > _LINE_BYTES or self._error is not None:
                    break
        except (ValueError, RecursionError):
            pass
        finally:
            self._log.end()
            with suppress(OSError):
                await self._process.kill()

    def _take(self, line: bytes) -> None:
        """Log an event. Raises ValueError for what is none."""
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError("an event has no form")
        if "error" in found:
            self._error = self._error or _error(found["error"], self._path)
        elif found.get("type") == "watching":
            if not self._begun.done():
                self._begun.set_result(None)
                self._log.append(FileEvent("watching", "/".join(self._path)))
        elif found.get("type") in _KINDS:
            kind = found["type"]
            path = None if kind == "overflow" else _text(found.get("path"))
            to = _text(found.get("to")) if kind == "rename" else None
            self._log.append(FileEvent(kind, path, to), 100 + len(path or "") + len(to or ""))
        else:
            raise ValueError("an event has no form")


def _text(path: object) -> str:
    """A path that the helper says. Raises ValueError for what is none."""
    if not isinstance(path, list) or not path or not all(isinstance(name, str) for name in path):
        raise ValueError("a path has no form")
    text = "/".join(path)
    text.encode(errors="surrogateescape")
    return text


def _error(word: object, path: Parts) -> EraError:
    if word == "many":
        return Conflict(
            "There is too much to watch: too many directories below, or too many watches.",
            hint="Watch a directory further down, or without recursive=true.",
            code="too_much_to_watch",
        )
    return error_of(word, path)


def _not_live(session_id: str) -> Conflict:
    return Conflict(
        f"Session '{session_id}' is not live: nothing changes its files but runs and files calls.",
        hint="Start a process (POST /api/sessions/{id}/processes) and it is; GET /api/sessions/{id}/versions has what "
        "runs and calls have changed.",
        code="not_live",
    )
