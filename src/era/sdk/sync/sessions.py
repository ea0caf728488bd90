# Made by scripts/blocking.py of src/era/sdk/aio/sessions.py: change that one.
"""Sessions, and what can be done with one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from era.common.urls import quoted, session_path
from era.errors import Conflict, NotFound
from era.sdk.answers import Checkpoint, ContextInfo, Diff, RunResult, SessionInfo, StoredCode, Ticket, Version
from era.sdk.blocking import Interruption, finished
from era.sdk.calls import Advance, Archive, Call, archive_of
from era.sdk.events import Gap, SetupDone, SetupEvent, SetupLine, SetupStatus
from era.sdk.options import body, run_body, run_seconds
from era.sdk.sugar import DataSugar
from era.sdk.sync.connection import LONGEST_RUN, Connection
from era.sdk.sync.files import Files
from era.sdk.sync.processes import Process, Processes
from era.sdk.sync.runs import Run, Runs, RunStream
from era.sdk.sync.streams import EventStream
from era.sdk.sync.webhooks import Inbox

if TYPE_CHECKING:
    from typing import Unpack

    from era.sdk.options import CellOptions, NewSession, ProcessOptions, RunOptions, SessionSettings


class Data(DataSugar):
    """The JSON object that programs of a session read and change. A change waits for the run under way."""

    def __init__(self, connection: Connection, path: str) -> None:
        self._connection = connection
        self._path = path

    def all(self) -> dict[str, Any]:
        """All of it, as it is now."""
        data: dict[str, Any] = (self._connection.get(self._path))["data"]
        return data

    def replace(self, data: Mapping[str, Any]) -> None:
        """Put other data in its place."""
        self._connection.send("PATCH", self._path, {"data": dict(data)}, self._connection.turn_seconds)

    def set(self, key: str, value: Any) -> None:
        """Set one key. Between the look and the change somebody else's may be lost."""
        self.replace({**self.all(), key: value})

    def delete(self, key: str) -> None:
        """Remove one key. Raises KeyError."""
        data = self.all()
        del data[key]
        self.replace(data)


type _Versions = list[Version]


class Versions:
    """The versions of a session that are kept: data and files as they were."""

    def __init__(self, connection: Connection, path: str) -> None:
        self._connection = connection
        self._session = path
        self._path = f"{path}/versions"

    def list(self, limit: int | None = None) -> _Versions:
        """Versions, newest first: all, or the newest `limit`."""
        return Version.each(self._connection.pages(self._path, "versions", limit))

    def get(self, version: int) -> Version:
        """One version, with its data."""
        return Version(self._connection.get(f"{self._path}/{version}"))

    def diff(self, version: int) -> Diff:
        """What a version changed, compared with the one before it."""
        return Diff(self._connection.get(f"{self._path}/{version}/diff"))

    def files(self, version: int) -> Files:
        """The files of a version, which can be listed and read."""
        return Files(self._connection, f"{self._path}/{version}")

    def name(self, version: int, name: str) -> Version:
        """Name a version, so that it is kept."""
        return Version(self._connection.send("PUT", f"{self._path}/{version}/name", {"name": name}))

    def unname(self, version: int) -> None:
        """Take a version its name. If it was kept for that only, it goes."""
        self._connection.send("DELETE", f"{self._path}/{version}/name")

    def rollback(self, version: int, *, stop: bool = False) -> SessionInfo:
        """Make a new version with the content of an old one. While processes or contexts run this raises SessionLive;
        with `stop`, they are ended first."""
        seconds = self._connection.turn_seconds
        fields = {"version": version, **({"stop": True} if stop else {})}
        answer = self._connection.send("POST", f"{self._session}/rollback", fields, seconds)
        return SessionInfo(answer)


_LONGEST_SETUP = 3600.0
"""Seconds that a setup may say nothing."""


class Session:
    """One session. Made by `era.session(…)` and by `era.sessions`.

    As a context manager it is deleted at the end of the block if it was made without an id, and kept otherwise. A
    deleted one can be restored for a day.
    """

    def __init__(self, connection: Connection, info: SessionInfo, *, is_temporary: bool = False) -> None:
        self.id = info.id
        self.language = info.language
        self.is_temporary = is_temporary
        """Whether the end of its `with` block deletes it."""

        self._connection = connection
        self._default_timeout = float(info.default_timeout)
        self._path = path = session_path(info.id)
        self.data = Data(connection, path)
        self.files = Files(connection, path)
        self.runs = Runs(connection, path)
        self.versions = Versions(connection, path)
        self.inbox = Inbox(connection, path)
        self.processes = Processes(connection, path)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} ({self.language})>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_temporary:
            with suppress(NotFound):  # somebody else may have been quicker
                self.delete()

    def info(self) -> SessionInfo:
        """The session as it is now."""
        info = SessionInfo(self._connection.get(self._path))
        self._default_timeout = float(info.default_timeout)
        return info

    @overload
    def run(self, code: str | None = None, *, background: Literal[True], **options: Unpack[RunOptions]) -> Run: ...

    @overload
    def run(
        self, code: str | None = None, *, background: Literal[False] = False, **options: Unpack[RunOptions]
    ) -> RunResult: ...

    def run(
        self, code: str | None = None, *, background: bool = False, **options: Unpack[RunOptions]
    ) -> RunResult | Run:
        """Run code, or the stored code, and return when its result is durable.

        With `background` it returns when the run has begun, with a handle on it. Options: `command` in place of code,
        `args`, `stdin`, `cwd`, `env`, `secrets`, `timeout` (seconds), `atomic`, `record_code` and `idempotency_key`.

        If the caller is interrupted, by Ctrl-C or a cancelled task, the run is stopped. What it left is kept.
        """
        once = self._once(options)
        given = run_body(code, options)
        if background:
            given["background"] = True
            return self.runs.get((self._run(given, once, self._connection.turn_seconds))["run_id"])
        return RunResult(self._run(given, once, self._seconds(given)))

    def _run(self, given: Mapping[str, Any], once: bool | str, seconds: float) -> Any:
        """Send a run, and return its answer. An interrupted run is stopped before the interruption is raised."""
        call = Call("POST", f"{self._path}/run", json=given, once=once, seconds=seconds)
        try:
            return self._connection.call(call)
        except Interruption:
            if once:
                finished(self.runs.stop_of_key(call.headers["Idempotency-Key"]))
            raise

    def stream(self, code: str | None = None, **options: Unpack[RunOptions]) -> RunStream:
        """Run code and get its output as it comes: an iterator of events, and the result at its end."""
        once = self._once(options)
        given = run_body(code, options)
        call = Call("POST", f"{self._path}/stream", json=given, once=once, seconds=self._seconds(given))
        return RunStream(self._connection, self._path, self._connection.open(call))

    def process(self, command: str | Sequence[str], **options: Unpack[ProcessOptions]) -> Process:
        """Start a process, which goes on beside runs: `session.process("npm run dev", tag="web")`."""
        return self.processes.start(command, **options)

    def terminal(self, cols: int = 80, rows: int = 24, **options: Unpack[ProcessOptions]) -> Process:
        """Start a login shell in a terminal: `write` types, `events` shows."""
        return self.processes.terminal(cols, rows, **options)

    def context(self, name: str = "main") -> Context:
        """The interpreter of this name, which stays from its first cell on: `session.context().run("x = 1")`."""
        return Context(self, self._connection, f"{self._path}/contexts", name)

    def contexts(self) -> list[ContextInfo]:
        """The interpreters that there are."""
        return ContextInfo.each((self._connection.get(f"{self._path}/contexts"))["contexts"])

    def checkpoint(self) -> Checkpoint:
        """Make what its files are at this moment its next version, behind the run under way."""
        seconds = self._connection.files_seconds
        return Checkpoint(self._connection.send("POST", f"{self._path}/checkpoint", seconds=seconds))

    def ticket(self) -> Ticket:
        """A ticket, with which a browser's page can open one WebSocket of it, soon."""
        return Ticket(self._connection.send("POST", f"{self._path}/tickets"))

    def stop(self) -> SessionInfo:
        """End all its processes and commit what they left: it isn't live any more."""
        seconds = self._connection.turn_seconds
        return SessionInfo(self._connection.send("POST", f"{self._path}/stop", seconds=seconds))

    def code(self) -> StoredCode:
        """The code that runs where none is sent. Raises NotFound."""
        return StoredCode(self._connection.get(f"{self._path}/code"))

    def set_code(self, code: str, description: str | None = None) -> None:
        """Store the code that runs where none is sent."""
        given = {"code": code} if description is None else {"code": code, "description": description}
        self._connection.send("PUT", f"{self._path}/code", given)

    def update(self, **settings: Unpack[SessionSettings]) -> SessionInfo:
        """Change settings. Objects are replaced, not merged, except `limits`."""
        waits = not {"data", "setup"}.isdisjoint(settings)
        seconds = self._connection.turn_seconds if waits else None
        info = SessionInfo((self._connection.send("PATCH", self._path, body(settings), seconds))["metadata"])
        self._default_timeout = float(info.default_timeout)
        return info

    def delete(self, *, purge: bool = False) -> None:
        """Delete it: its processes are dead when this returns. For a day it can be restored, unless with `purge`."""
        self._connection.call(Call("DELETE", self._path, query={"purge": True} if purge else None))

    def duplicate(
        self, id: str | None = None, *, data: Mapping[str, Any] | None = None, from_version: int | None = None
    ) -> Session:
        """A new session with a copy of all this one has, or had in a version. `data` replaces its data."""
        given = {"id": id, "data": None if data is None else dict(data), "from_version": from_version}
        fields = {name: value for name, value in given.items() if value is not None}
        answer = self._connection.call(Call("POST", f"{self._path}/duplicate", json=fields, once=self._connection.keys))
        return Session(self._connection, SessionInfo(answer))

    def rollback(self, version: int, *, stop: bool = False) -> SessionInfo:
        """Make a new version with the content of an old one. While processes or contexts run this raises SessionLive;
        with `stop`, they are ended first."""
        return self.versions.rollback(version, stop=stop)

    def setup(self) -> Iterator[SetupEvent]:
        """What the installing of packages says, from its beginning: SetupLine and SetupStatus, Gap for what isn't kept
        any more, and last SetupDone. If the connection breaks, it goes on where it was."""
        path = f"{self._path}/setup/events"
        answer = self._connection.open(Call("GET", path, seconds=_LONGEST_SETUP))
        stream = EventStream(self._connection, path, answer, last="done", seconds=_LONGEST_SETUP)
        for event in stream.events():
            if event["type"] == "gap":
                yield Gap(event)
            elif event["type"] == "done":
                yield SetupDone(event)
            else:
                yield SetupLine(event) if event["type"] == "line" else SetupStatus(event)

    def wait_for_setup(self) -> SetupDone:
        """The setup's result, when it has ended: `setup_status` is `completed` or `failed`."""
        for event in self.setup():
            if isinstance(event, SetupDone):
                return event
        raise AssertionError("unreachable: a stream ends with its last event, or with an error")

    def set_up_again(self) -> SessionInfo:
        """Install its packages again, after a failure or for newer versions."""
        seconds = self._connection.turn_seconds
        return SessionInfo(self._connection.send("POST", f"{self._path}/setup", seconds=seconds))

    def packages(self) -> dict[str, Any]:
        """What is installed: `pip`, `npm` and `go` with names and versions."""
        packages: dict[str, Any] = self._connection.get(f"{self._path}/environment")
        return packages

    def url(self, port: int = 80) -> str:
        """Return the public address of a port: a site of its own, such as http://3000-LABEL.localhost:8787.

        Pages there can use absolute paths and cookies. Where the name doesn't resolve, use `proxy_url`.
        """
        return str((self._connection.get(f"{self._path}/host", port=port))["site_url"])

    def proxy_url(self, port: int = 80) -> str:
        """Return the public address of a port as a path on the server's own address. It needs no name of its own."""
        return str((self._connection.get(f"{self._path}/host", port=port))["url"])

    def export(self, target: str | os.PathLike[str], *, current: bool = False, progress: Advance | None = None) -> int:
        """Write the whole session into one local file, which `sessions.import_` reads.

        Args:
            target: The local file.
            current: Whether to leave out versions before the current one.
            progress: Called with the number of bytes written since its last call.

        Returns:
            The file's size in bytes.

        Raises:
            LocalError: The file can't be written.
        """
        from era.sdk.directories import replacing  # for those who have local files: it takes long to import

        size = 0
        with replacing(target, progress) as write:
            for piece in self.export_pieces(current=current):
                write(piece)
                size += len(piece)
        return size

    def export_pieces(self, *, current: bool = False) -> Iterator[bytes]:
        """Yield what `export` writes, piece by piece."""
        query = {"versions": "current"} if current else None
        for piece in self._connection.pieces(Call("GET", f"{self._path}/capsule", query=query)):
            yield piece

    def _once(self, options: RunOptions) -> bool | str:
        """Take the idempotency key from a run's options. Without one, return whether the client makes one."""
        key = options.pop("idempotency_key", None)
        return self._connection.keys if key is None else key

    def _seconds(self, given: Mapping[str, Any]) -> float:
        """How long the answer of a run may take: as any call and as the run, which may wait as long for the setup."""
        return 2 * run_seconds(given, self._default_timeout) + self._connection.timeout


class Context:
    """An interpreter that stays: variables of one cell are there for the next."""

    def __init__(self, session: Session, connection: Connection, path: str, name: str) -> None:
        self.name = name
        self._session = session
        self._connection = connection
        self._path = f"{path}/{quoted(name)}"

    def run(self, code: str, **options: Unpack[CellOptions]) -> RunResult:
        """Run a cell. `value` of the result is what its last expression showed, `error` what it ended with."""
        return self._session.run(code, context=self.name, **options)

    def stream(self, code: str, **options: Unpack[CellOptions]) -> RunStream:
        """Run a cell and get its output as it comes."""
        return self._session.stream(code, context=self.name, **options)

    def interrupt(self) -> bool:
        """Interrupt the cell under way, as Ctrl-C does; whether there was one."""
        return bool((self._connection.send("POST", f"{self._path}/interrupt"))["interrupted"])

    def restart(self) -> ContextInfo:
        """End the interpreter and start another one."""
        return ContextInfo(self._connection.send("POST", f"{self._path}/restart"))

    def delete(self) -> None:
        """End it, and a run in it."""
        self._connection.send("DELETE", self._path)


type _Sessions = list[Session]


class Sessions:
    """All sessions of the key's owner."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, language: str, id: str | None = None, **options: Unpack[NewSession]) -> Session:
        """Make a session, as `era.session` does. Raises Conflict if the id is taken."""
        given = {"language": language, **({} if id is None else {"session_id": id}), **body(options)}
        answer = self._connection.call(Call("POST", "/api/sessions", json=given, once=self._connection.keys))
        return Session(self._connection, SessionInfo(answer), is_temporary=id is None)

    def get(self, id: str) -> Session:
        """The session of this id. Raises NotFound."""
        return Session(self._connection, SessionInfo(self._connection.get(session_path(id))))

    def named(self, id: str) -> Session:
        """The session of this id, without asking whether there is one: each of its calls tells. Its `language` is
        empty."""
        unknown = {"id": id, "language": "", "default_timeout": LONGEST_RUN}
        return Session(self._connection, SessionInfo(unknown))

    def get_or_create(self, language: str, id: str, **options: Unpack[NewSession]) -> Session:
        """The session of this id; if there is none, it is made, with these options."""
        try:
            return self.get(id)
        except NotFound:
            try:
                return self.create(language, id, **options)
            except Conflict:
                return self.get(id)  # somebody else was quicker

    def list(
        self,
        limit: int | None = None,
        *,
        language: str | None = None,
        status: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> _Sessions:
        """Sessions, newest first: all, or the newest `limit`; those that have all that is asked for."""
        return [Session(self._connection, each) for each in self.infos(limit, language, status, metadata)]

    def infos(
        self,
        limit: int | None = None,
        language: str | None = None,
        status: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> _Infos:
        """The same, as the server shows them."""
        query: dict[str, str | None] = {"language": language, "status": status}
        query |= {f"metadata.{name}": value for name, value in (metadata or {}).items()}
        return SessionInfo.each(self._connection.pages("/api/sessions", "sessions", limit, query))

    def delete(self, id: str, *, purge: bool = False) -> None:
        """Delete the session of this id. Raises NotFound."""
        self._connection.call(Call("DELETE", session_path(id), query={"purge": True} if purge else None))

    def restore(self, id: str) -> Session:
        """Bring back a session that expired or was deleted."""
        return Session(self._connection, SessionInfo(self._connection.send("POST", f"{session_path(id)}/restore")))

    def import_(
        self, archive: Archive, id: str | None = None, *, public: bool = False, progress: Advance | None = None
    ) -> Session:
        """Make a session of an archive that `session.export` wrote.

        Args:
            archive: A local file's path, an open binary file, or bytes.
            id: The session's id; None: the id that it had.
            public: Whether its public URL may be called by anybody if that was so in the exported session. Without,
                nobody can call it until `session.update(allow_public=True)`.
            progress: Called with the number of bytes sent since its last call.

        Raises:
            Conflict: There is a session with this id.
        """
        query = {"id": id, "public": public or None}
        call = Call(
            "POST", "/api/sessions/import", query=query, content=archive_of(archive, progress), kind="application/x-tar"
        )
        return Session(self._connection, SessionInfo(self._connection.call(call)))


type _Infos = list[SessionInfo]
