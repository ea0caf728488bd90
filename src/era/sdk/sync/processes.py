# Made by scripts/blocking.py of src/era/sdk/aio/processes.py: change that one.
"""Processes of a live session: what goes on beside its runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from era.common.urls import quoted
from era.sdk.answers import ProcessInfo
from era.sdk.calls import Call
from era.sdk.events import Gap, ProcessEvent, ProcessExit, ProcessOutput
from era.sdk.options import body
from era.sdk.sync.connection import Connection
from era.sdk.sync.streams import EventStream

if TYPE_CHECKING:
    from typing import Unpack

    from era.sdk.options import ProcessOptions

_LOGIN_SHELL = 'exec "$(command -v bash || command -v sh)" -l'
_INPUT_SECONDS = 120.0
"""How long the program may take to read what is written to it; the server gives up before that."""


class Process:
    """One process, by its id or tag. It goes on when nobody listens."""

    def __init__(self, connection: Connection, session: str, id: str) -> None:
        self.id = id
        self._connection = connection
        self._path = f"{session}/processes/{quoted(id)}"

    def info(self) -> ProcessInfo:
        """Its record as it is now."""
        return ProcessInfo(self._connection.get(self._path))

    def events(self, after: int = 0) -> Iterator[ProcessEvent]:
        """What it writes, from the first byte that is kept, or behind a byte with a number: ProcessOutput, Gap for what
        is no longer kept, and last ProcessExit. If the connection breaks, it goes on where it was."""
        path = f"{self._path}/events"
        answer = self._connection.open(Call("GET", path, query={"after": after}))
        stream = EventStream(self._connection, path, answer, last="exit", after=after)
        for event in stream.events():
            if event["type"] == "exit":
                yield ProcessExit(event)
            else:
                yield Gap(event) if event["type"] == "gap" else ProcessOutput(event)

    def wait(self) -> ProcessInfo:
        """Its record, once it has ended."""
        for _ in self.events():
            pass
        return self.info()

    def write(self, data: bytes | str) -> None:
        """Write to its standard input or terminal. Raises Conflict where it takes none or has ended."""
        content = data.encode() if isinstance(data, str) else data
        self._connection.call(Call("POST", f"{self._path}/stdin", content=content, seconds=_INPUT_SECONDS))

    def close_stdin(self) -> None:
        """End its input."""
        self._connection.send("DELETE", f"{self._path}/stdin")

    def signal(self, signal: str | int = "TERM") -> None:
        """Send a signal to its process group, by name or number."""
        self._connection.send("POST", f"{self._path}/signal", {"signal": signal})

    def resize(self, cols: int, rows: int) -> None:
        """Give its terminal another size."""
        self._connection.send("PATCH", self._path, {"pty": {"cols": cols, "rows": rows}})

    def stop(self) -> ProcessInfo:
        """End it: SIGTERM, two seconds later SIGKILL. It is dead when this returns."""
        return ProcessInfo(self._connection.send("DELETE", self._path))


type _Infos = list[ProcessInfo]


class Processes:
    """A session's processes: those that run, and those that ended last."""

    def __init__(self, connection: Connection, path: str) -> None:
        self._connection = connection
        self._session = path
        self._path = f"{path}/processes"

    def start(self, command: str | Sequence[str], **options: Unpack[ProcessOptions]) -> Process:
        """Start one: a line for the shell, or a program and its arguments. The session is live from now on.

        Options: `cwd`, `env`, `secrets`, `stdin` (whether it takes input), `pty` (`{"cols": 80, "rows": 24}`), `tag` (a
        name of your own), `timeout`.
        """
        given = {"command": command if isinstance(command, str) else list(command), **body(options)}
        seconds = self._connection.turn_seconds  # it waits for a setup, and for a run that can't be joined
        call = Call("POST", self._path, json=given, once=self._connection.keys, seconds=seconds)
        answer = self._connection.call(call)
        return self.get(answer["process_id"])

    def terminal(self, cols: int = 80, rows: int = 24, **options: Unpack[ProcessOptions]) -> Process:
        """Start a login shell in a terminal."""
        options["pty"] = {"cols": cols, "rows": rows}
        return self.start(_LOGIN_SHELL, **options)

    def list(self) -> _Infos:
        """Their records, newest first."""
        return ProcessInfo.each((self._connection.get(self._path))["processes"])

    def get(self, id: str) -> Process:
        """Return a handle on the process with this id or tag. No call is made: `info()` gives its record."""
        return Process(self._connection, self._session, id)
