"""Watches of the files of live sessions: what changes in them, as it happens (guest/live_watch.py).

Theory of operation. Each watch has a helper of its own in the sandbox. What that says is input from the sandbox: its
form is checked, its pace is that of any output, and what a reader doesn't take in time is dropped and told (EventLog).

A watch is of a path, and has any number of readers. It goes on for a while when the last one has left, so that one
whose connection broke can go on behind what it has had. Where that comes too late there is another watch, whose numbers
are beyond those of all before: so the reader is told of a gap.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
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
from era.core.stall_timeout import stall_timeout
from era.errors import Conflict, EraError

MOST = 8
"""Watches of a session at a time."""

MOST_READERS = 32
"""Readers of all watches of a session at a time. Each is sent every change, which is work of the event loop."""

_AT_ONCE = 100
"""Events that a reader is sent in one piece."""

_PAUSE_SECONDS = 0.05
"""Seconds between two pieces for a reader, so that many events in a short time make few pieces."""

_LINGER_SECONDS = 60.0
"""How long a watch goes on that nobody reads."""

_SPEC = ProcessSpec((), {}, channel=True, module="live_watch")
_SECONDS = 30.0
"""How long a watch may take to be in force while the sandbox uses no processor."""

_LINE_BYTES = 64 << 10
_KEPT_BYTES = 1 << 20
_BYTE_US = 0.1
"""What it costs the event loop to take a byte."""

_KINDS = ("create", "write", "remove", "rename", "chmod", "overflow")

type _Key = tuple[int, Parts, bool]
"""The key of a session, the path that is watched, and whether what is below is, too."""


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
        self._watches: dict[_Key, _Watch] = {}

    @asynccontextmanager
    async def watched(
        self, session_id: OwnedId, path: Parts, *, recursive: bool, after: int = 0
    ) -> AsyncIterator[AsyncIterator[list[tuple[int, FileEvent]] | Gap]]:
        """What changes in a directory, or to a file, until the session isn't live any more: from now on, or behind the
        event with the number `after`, in pieces of a few events. Raises NotFound, Conflict where it isn't live now, has
        too many watches, readers or directories; SandboxFailed, Unavailable. The events raise EraError when the watch
        ends, and say why."""
        session = await self._store.session(session_id)
        with self._live_sessions.in_use(session.key) as live:
            if live is None:
                raise _not_live(session.id)
            watch = self._watch((session.key, path, recursive), live)
            with watch.read():
                await watch.begun()
                yield watch.events(after)

    def _watch(self, key: _Key, live: LiveSession) -> _Watch:
        """The watch that there is, or else a new one. Raises Conflict where there are too many."""
        if sum(of.readers for each, of in self._watches.items() if each[0] == key[0]) >= MOST_READERS:
            raise Conflict(
                f"The watches of session '{live.session.id}' have {MOST_READERS} readers together, which is the most.",
                hint="End one, or have one reader pass on what it gets.",
                code="too_many_watches",
            )
        watch = self._watches.get(key)
        if watch is not None and watch.live is live and not watch.is_over:
            return watch
        own = [(each, of) for each, of in self._watches.items() if each[0] == key[0] and not of.is_over]
        if len(own) >= MOST:
            unread = [(of.read_at, each, of) for each, of in own if not of.readers]
            if not unread:
                raise Conflict(
                    f"Session '{live.session.id}' has {MOST} watches, as many as it may.",
                    hint="End one, or watch a directory above with recursive=true.",
                    code="too_many_watches",
                )
            _, oldest, of = min(unread)
            of.end()
            del self._watches[oldest]
        made: _Watch

        def ended() -> None:
            if self._watches.get(key) is made:
                del self._watches[key]

        made = self._watches[key] = _Watch(live, path=key[1], recursive=key[2], ended=ended)
        return made


class _Watch:
    """One watch, with its readers."""

    def __init__(self, live: LiveSession, path: Parts, *, recursive: bool, ended: Callable[[], None]) -> None:
        """`ended` is called when it has ended, however that is."""
        self.live = live
        self.readers = 0
        self.read_at = time.monotonic()
        """When the last reader left."""

        self._path = path
        # Microseconds: more than there can be events, so a later watch begins beyond all numbers of this one.
        self._log: EventLog[FileEvent] = EventLog(max_size=_KEPT_BYTES, last=time.time_ns() // 1000)
        self._begun = asyncio.Event()
        self._error: EraError | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._following = asyncio.create_task(self._follow(recursive=recursive))
        self._following.add_done_callback(lambda _: ended())

    @property
    def is_over(self) -> bool:
        return self._following.done() or self._following.cancelling() > 0

    @contextmanager
    def read(self) -> Iterator[None]:
        """Somebody reads it within the block."""
        self.readers += 1
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        try:
            yield
        finally:
            self.readers -= 1
            self.read_at = time.monotonic()
            if not self.readers:
                self._linger = asyncio.get_running_loop().call_later(_LINGER_SECONDS, self.end)

    async def begun(self) -> None:
        """Wait until it is in force. Raises EraError."""
        waiting = asyncio.create_task(self._begun.wait())
        try:
            with suppress(TimeoutError):
                async with stall_timeout(self.live.sandbox.cpu_seconds, _SECONDS):
                    await asyncio.wait([waiting, self._following], return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if not self._begun.is_set():
            self.end()
            raise self._why()

    async def events(self, after: int) -> AsyncIterator[list[tuple[int, FileEvent]] | Gap]:
        """The events behind `after`, or from now on, in pieces. Raises EraError at the end."""
        position = min(after, self._log.last) if after else self._log.last
        yield [(position, FileEvent("watching", "/".join(self._path)))]
        async for piece in self._log.pieces(position, _AT_ONCE):
            yield piece
            await asyncio.sleep(_PAUSE_SECONDS)
        raise self._why()

    def end(self) -> None:
        self._following.cancel()

    def _why(self) -> EraError:
        """Why it has ended."""
        return _not_live(self.live.session.id) if not self.live.is_open else self._error or gone()

    async def _follow(self, *, recursive: bool) -> None:
        """Start the helper and log what it tells, until it ends or says what can't be."""
        buffer, budget = b"", Budget(self)
        process: GuestProcess | None = None
        try:
            process = await (await self.live.supervisor()).start(_SPEC)
            await process.send(framed({"path": list(self._path), "recursive": recursive}))
            async for event in process.events():
                if not isinstance(event, ProcessOutput):
                    break
                if event.stream != "channel":
                    continue
                *lines, buffer = (buffer + event.data).split(b"\n")
                for line in lines:
                    self._take(line)
                    await budget.spend(len(line) * _BYTE_US)  # thousands may have come in one piece
                if len(buffer) > _LINE_BYTES or self._error is not None:
                    break
        except EraError as error:
            self._error = error
        except (ValueError, RecursionError, BrokenPipeError):
            pass
        finally:
            self._log.end()
            if process is not None:
                with suppress(OSError):
                    await process.kill()

    def _take(self, line: bytes) -> None:
        """Log an event. Raises ValueError for what is none."""
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError("an event has no form")
        if "error" in found:
            self._error = self._error or _error(found["error"], self._path)
        elif found.get("type") == "watching":
            self._begun.set()
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
