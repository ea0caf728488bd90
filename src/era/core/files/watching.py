"""Watches of the files of sessions: what changes in them.

Theory of operation. In a live session each watch has a helper of its own in the sandbox (guest/live_watch.py), which
reports changes as they happen. What that says is input from the sandbox: its form is checked, its pace is that of any
output, and what a reader doesn't take in time is dropped and told (EventLog).

The files of a session that isn't live change only with its version. So a watch that has readers asks for the session's
snapshot once a second, and the trees of an old and a new one are compared on a thread. A session that becomes live ends
these watches: they can't say what its processes have changed since. The next one is of the live session. Both are at
the session's home, as calls of this route are (api/hosts/home_forwarding.py).

A watch is of a path, and has any number of readers. It goes on for a while when the last one has left, so that one
whose connection broke can go on behind what it has had. Where that comes too late there is another watch, whose numbers
are beyond those of all before: so the reader is told of a gap.
"""

from __future__ import annotations

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from era.core.concurrency.event_log import EventLog, Gap
from era.core.concurrency.meter import turn
from era.core.concurrency.stall_timeout import stall_timeout
from era.core.live.file_helper import error_of, framed, gone
from era.core.live.live_session import LiveSession
from era.core.live.live_sessions import LiveSessions
from era.core.metadata import MetadataStore
from era.core.models import OwnedId, Session, Snapshot
from era.core.ports import GuestProcess
from era.core.process import ProcessOutput, ProcessSpec
from era.core.trees.diffs import entry_changes
from era.core.trees.paths import Parts
from era.core.trees.snapshots import Snapshots
from era.errors import Conflict, EraError, NotFound, Unavailable

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

_MOST_KEPT = 1000
"""Watches at a time. At this number, one without readers is ended to make room for another."""

_LOOK_SECONDS = 1.0
"""Seconds between two looks for new versions of sessions that aren't live."""

_SPEC = ProcessSpec((), {}, channel=True, module="live_watch")
_SECONDS = 30.0
"""How long a watch may take to be in force while the sandbox uses no processor."""

_LINE_BYTES = 64 << 10
_KEPT_BYTES = 1 << 20
_MOST_CHANGES = 10_000
"""Changes between two versions that a watch reports. Where there are more, or they don't fit into `_KEPT_BYTES`, it
reports an `overflow`."""

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

    def __init__(self, live_sessions: LiveSessions, store: MetadataStore, snapshots: Snapshots) -> None:
        self._live_sessions = live_sessions
        self._store = store
        self._snapshots = snapshots
        self._watches: dict[_Key, _Watch] = {}

    @asynccontextmanager
    async def watched(
        self, session_id: OwnedId, path: Parts, *, recursive: bool, after: int = 0
    ) -> AsyncIterator[AsyncIterator[list[tuple[int, FileEvent]] | Gap]]:
        """Follow the changes in a directory, or to a file, until the session becomes live or stops being live.

        Args:
            session_id: The session.
            path: The directory or file; no parts for the working directory.
            recursive: Whether directories below it are followed, too.
            after: Number of the event behind which to begin; 0: from now on.

        Returns:
            Events with their numbers, in pieces of a few. If the session becomes live, the last one is an `overflow`;
            otherwise the iterator raises EraError with the reason of its end.

        Raises:
            NotFound: There is no such session or path.
            Conflict: There are too many watches, readers or directories.
            SandboxFailed, Unavailable: The watch can't begin.
        """
        session = await self._store.session(session_id)
        with self._live_sessions.in_use(session.key) as live:
            watch = self._watch((session.key, path, recursive), session, live)
            with watch.read():
                await watch.begun()
                yield watch.events(after)

    def _watch(self, key: _Key, session: Session, live: LiveSession | None) -> _Watch:
        """The watch that there is, or else a new one. Raises Conflict where there are too many."""
        if sum(of.readers for each, of in self._watches.items() if each[0] == key[0]) >= MOST_READERS:
            raise Conflict(
                f"The watches of session '{session.id}' have {MOST_READERS} readers together, which is the most.",
                hint="End one, or have one reader pass on what it gets.",
                code="too_many_watches",
            )
        watch = self._watches.get(key)
        if watch is not None and watch.live is live and not watch.is_over:
            return watch
        own = [each for each, of in self._watches.items() if each[0] == key[0] and not of.is_over]
        if len(own) >= MOST and not self._end_unread(own):
            raise Conflict(
                f"Session '{session.id}' has {MOST} watches, as many as it may.",
                hint="End one, or watch a directory above with recursive=true.",
                code="too_many_watches",
            )
        if len(self._watches) >= _MOST_KEPT:
            self._end_unread(list(self._watches))
        made: _Watch

        def ended() -> None:
            if self._watches.get(key) is made:
                del self._watches[key]

        if live is not None:
            made = _LiveWatch(live, key[1], recursive=key[2], ended=ended)
        else:

            def is_live() -> bool:
                return self._live_sessions.get(session.key) is not None

            made = _VersionWatch(session, key[1], self._snapshots, self._store, is_live, recursive=key[2], ended=ended)
        self._watches[key] = made
        return made

    def _end_unread(self, keys: Sequence[_Key]) -> bool:
        """End the one of these watches that nobody has read for longest; whether there is one without readers."""
        unread = [key for key in keys if not self._watches[key].readers]
        if unread:
            self._watches.pop(min(unread, key=lambda key: self._watches[key].read_at)).end()
        return bool(unread)


class _Watch(ABC):
    """One watch, with its readers."""

    live: LiveSession | None = None

    def __init__(self, path: Parts, *, recursive: bool, ended: Callable[[], None]) -> None:
        """`ended` is called when it has ended, however that is."""
        self.readers = 0
        self.has_readers = asyncio.Event()
        self.read_at = time.monotonic()
        """When the last reader left."""

        self._path = path
        self._recursive = recursive
        # Microseconds: more than there can be events, so a later watch begins beyond all numbers of this one.
        self._log: EventLog[FileEvent] = EventLog(max_size=_KEPT_BYTES, last=time.time_ns() // 1000)
        self._begun = asyncio.Event()
        self._error: EraError | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._following = asyncio.create_task(self._follow())
        self._following.add_done_callback(lambda _: ended())

    @property
    def is_over(self) -> bool:
        return self._following.done() or self._following.cancelling() > 0

    @contextmanager
    def read(self) -> Iterator[None]:
        """Somebody reads it within the block."""
        self.readers += 1
        self.has_readers.set()
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        try:
            yield
        finally:
            self.readers -= 1
            self.read_at = time.monotonic()
            if not self.readers:
                self.has_readers.clear()
                self._linger = asyncio.get_running_loop().call_later(_LINGER_SECONDS, self.end)

    async def begun(self) -> None:
        """Wait until it is in force. Raises EraError."""
        waiting = asyncio.create_task(self._begun.wait())
        try:
            await self._either([waiting, self._following])
        finally:
            waiting.cancel()
        if not self._begun.is_set():
            self.end()
            raise self._why() or gone()

    async def _either(self, awaited: list[asyncio.Task[Any]]) -> None:
        """Wait until one of these tasks is done, or the watch takes too long to begin."""
        await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)

    async def events(self, after: int) -> AsyncIterator[list[tuple[int, FileEvent]] | Gap]:
        """The events behind `after`, or from now on, in pieces. Raises `_why` at the end."""
        position = min(after, self._log.last) if after else self._log.last
        yield [(position, FileEvent("watching", "/".join(self._path)))]
        async for piece in self._log.pieces(position, _AT_ONCE):
            yield piece
            await asyncio.sleep(_PAUSE_SECONDS)
        if (why := self._why()) is not None:
            raise why

    def end(self) -> None:
        self._following.cancel()

    def _append(self, event: FileEvent) -> None:
        self._log.append(event, _size_of(event))

    @abstractmethod
    def _why(self) -> EraError | None:
        """Why it has ended; None where its last event says so."""

    @abstractmethod
    async def _follow(self) -> None:
        """Log events until it ends, and end the log then."""


class _LiveWatch(_Watch):
    """A watch of a live session, by a helper in its sandbox."""

    def __init__(self, live: LiveSession, path: Parts, *, recursive: bool, ended: Callable[[], None]) -> None:
        super().__init__(path, recursive=recursive, ended=ended)
        self.live: LiveSession = live

    async def _either(self, awaited: list[asyncio.Task[Any]]) -> None:
        with suppress(TimeoutError):
            async with stall_timeout(self.live.sandbox.cpu_seconds, _SECONDS):
                await super()._either(awaited)

    def _why(self) -> EraError:
        return _not_live(self.live.session.id) if not self.live.is_open else self._error or gone()

    async def _follow(self) -> None:
        """Start the helper and log what it tells, until it ends or says what can't be."""
        buffer = b""
        process: GuestProcess | None = None
        try:
            process = await (await self.live.supervisor()).start(_SPEC)
            await process.send(framed({"path": list(self._path), "recursive": self._recursive}))
            async for event in process.events():
                if not isinstance(event, ProcessOutput):
                    break
                if event.stream != "channel":
                    continue
                *lines, buffer = (buffer + event.data).split(b"\n")
                for line in lines:
                    self._take(line)
                    await turn()  # thousands may have come in one piece
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
            self._append(FileEvent(kind, path, to))
        else:
            raise ValueError("an event has no form")


class _VersionWatch(_Watch):
    """A watch of a session that isn't live, by its versions."""

    def __init__(
        self,
        session: Session,
        path: Parts,
        snapshots: Snapshots,
        store: MetadataStore,
        is_live: Callable[[], bool],
        *,
        recursive: bool,
        ended: Callable[[], None],
    ) -> None:
        super().__init__(path, recursive=recursive, ended=ended)
        self._session = session
        self._snapshots = snapshots
        self._store = store
        self._is_live = is_live

    def _why(self) -> EraError | None:
        return self._error

    async def _follow(self) -> None:
        """Log what differs between versions, until the session is live or gone."""
        session, snapshot = self._session, self._session.snapshot
        try:
            if self._path:
                await self._snapshots.find(snapshot, self._path, session.owned_id)
            self._begun.set()
            while not self._is_live():
                await self.has_readers.wait()
                await asyncio.sleep(_LOOK_SECONDS)
                try:
                    new = (await self._store.snapshots_of([session.key])).get(session.key)
                except Unavailable:
                    continue
                if new is None:
                    raise NotFound(f"Session '{session.id}' was deleted meanwhile.")
                for event in await self._changes(snapshot, new):
                    self._append(event)
                    await turn()
                snapshot = new
            self._append(FileEvent("overflow"))
        except EraError as error:
            self._error = error
        finally:
            self._log.end()

    async def _changes(self, old: Snapshot, new: Snapshot) -> list[FileEvent]:
        """Compare two snapshots. Returns an `overflow` if there are too many changes, or the old one isn't kept any
        more."""
        if old.root == new.root:
            return []

        def compare(small: bool) -> list[FileEvent]:
            read = self._snapshots.reader(small=small)
            events, size = list[FileEvent](), 0
            for kind, path in entry_changes(read, old.root, new.root, self._path, recursive=self._recursive):
                events.append(FileEvent(kind, path))
                size += _size_of(events[-1])
                if len(events) > _MOST_CHANGES or size > _KEPT_BYTES:
                    return [FileEvent("overflow")]
            return events

        try:
            return await self._snapshots.threads.by_size(compare, self._session.owned_id)
        except OSError:
            return [FileEvent("overflow")]


def _size_of(event: FileEvent) -> int:
    """What an event counts in a log."""
    return 100 + len(event.path or "") + len(event.to or "")


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
        f"Session '{session_id}' is not live any more.",
        hint="Watch again to follow what runs and files calls change.",
        code="not_live",
    )
