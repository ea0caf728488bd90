# Made by scripts/blocking.py of src/era/sdk/aio/runs.py: change that one.
"""Runs of a session: their records, those in the background, and their output as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from time import monotonic
from typing import Any, Literal, Self

from era.common.urls import quoted
from era.errors import EraError
from era.sdk.answers import ExecuteResult, RunRecord, RunResult
from era.sdk.blocking import Answer, sleep
from era.sdk.calls import Call
from era.sdk.events import CELL_EVENTS, Gap, RunEvent, Stderr, Stdout
from era.sdk.retries import PATIENCE, is_away, went_away
from era.sdk.sync.connection import Connection
from era.sdk.sync.streams import EventStream

_FIRST_LOOK, _LONGEST_PAUSE = 0.05, 2.0

_BEGIN_SECONDS = 2.0
"""Seconds for which `stop_of_key` looks for a run that may be about to begin."""

_LEAVING_SECONDS = 10.0
"""Seconds that each call of `stop_of_key` may take: its caller has been interrupted."""


class Run:
    """A run that goes on by itself, or has ended: followed and stopped by its id."""

    def __init__(self, connection: Connection, session: str, run_id: str) -> None:
        self.id = run_id
        self._connection = connection
        self._session = session
        self._path = f"{session}/runs/{quoted(run_id)}"

    def record(self) -> RunRecord:
        """What is known of it now."""
        return RunRecord(self._connection.get(self._path))

    def wait(self) -> RunRecord:
        """Its record, once it has ended. A server that goes away meanwhile is waited for, too, as by streams."""
        seconds = _FIRST_LOOK
        answered_at: float | None = None
        while True:
            try:
                record = self.record()
                if record.status != "running":
                    return record
                answered_at = monotonic()
            except EraError as error:
                if answered_at is None:
                    raise
                is_late = monotonic() - answered_at > PATIENCE
                if is_late or self._connection.retries == 0 or not is_away(error):
                    raise went_away(error) from None
            sleep(seconds)
            seconds = min(seconds * 1.5, _LONGEST_PAUSE)

    def stream(self, after: int = 0) -> RunStream:
        """Its output as it comes, from the beginning, or behind the event with a number."""
        answer = self._connection.open(Call("GET", f"{self._path}/events", query={"after": after}))
        return RunStream(self._connection, self._session, answer, self.id, after)

    def stop(self) -> RunRecord:
        """End it: SIGTERM, and SIGKILL two seconds later. What it left is kept."""
        return RunRecord(self._connection.send("DELETE", self._path))

    def output(self, stream: Literal["stdout", "stderr"] = "stdout") -> bytes:
        """What it wrote, so far."""
        return self._connection.content(f"{self._path}/{stream}")


type _Records = list[RunRecord]


class Runs:
    """The records of a session's runs."""

    def __init__(self, connection: Connection, path: str) -> None:
        self._connection = connection
        self._session = path

    def list(self, limit: int | None = None) -> _Records:
        """Records, newest first: all, or the newest `limit`."""
        return RunRecord.each(self._connection.pages(f"{self._session}/runs", "runs", limit))

    def get(self, run_id: str) -> Run:
        """Return a handle on the run with this id. No call is made: `record()` gives its record."""
        return Run(self._connection, self._session, run_id)

    def stop_of_key(self, key: str) -> bool:
        """Stop the run that has begun with this idempotency key, or begins within two seconds. Returns whether there
        was one. Raises no EraError: its caller has been interrupted, and is about to raise that."""
        query, until = {"idempotency_key": key}, monotonic() + _BEGIN_SECONDS
        with suppress(EraError):
            while True:
                look = Call("GET", f"{self._session}/runs", query=query, seconds=_LEAVING_SECONDS)
                for record in (self._connection.call(look))["runs"]:
                    path = f"{self._session}/runs/{quoted(record['run_id'])}"
                    self._connection.call(Call("DELETE", path, seconds=_LEAVING_SECONDS))
                    return True
                if monotonic() > until:
                    break
                sleep(_FIRST_LOOK)
        return False


class Output[Result: (RunResult, ExecuteResult)]:
    """A program's output as it comes: an iterator of Stdout and Stderr, in a context also of Shown, ClearOutput and
    CellError, and then `result`."""

    _Result: type[Result]

    def __init__(self, stream: EventStream) -> None:
        self._stream = stream
        self._result: Result | None = None
        self._iterator = self._follow()
        self._output: dict[str, list[str]] = {"stdout": [], "stderr": []}

    @property
    def result(self) -> Result:
        """How it ended, with all output that has been iterated over. Only there when the iterator has ended."""
        if self._result is None:
            raise RuntimeError("The run hasn't ended: iterate over its events first.")
        return self._result

    def wait(self) -> Result:
        """The result, when all events have come."""
        for _ in self:
            pass
        return self.result

    def close(self) -> None:
        """Listen no longer."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[RunEvent]:
        return self._iterator

    def _follow(self) -> Iterator[RunEvent]:
        for event in self._stream.events():
            if event["type"] == "done":
                self._end(event)
            elif event["type"] == "gap":
                yield Gap(event)
            elif event["type"] in CELL_EVENTS:
                yield CELL_EVENTS[event["type"]](event)
            elif event["type"] in self._output:
                self._output[event["type"]].append(event["content"])
                yield Stdout(event) if event["type"] == "stdout" else Stderr(event)

    def _end(self, event: dict[str, Any]) -> None:
        event = {name: value for name, value in event.items() if name != "type"}
        output = {name: "".join(pieces) for name, pieces in self._output.items()}
        self._result = self._Result({**output, **event})


class ExecuteStream(Output[ExecuteResult]):
    """A run without a session as it happens. Closing the stream ends the program: nothing else could get at what it
    writes. So it doesn't go on where the connection breaks, which raises ConnectionLost.

    with era.stream("python", "print('hello')") as stream:
        for event in stream:
            print(event.content, end="")
    print(stream.result.status)
    """

    _Result = ExecuteResult


class RunStream(Output[RunResult]):
    """A run of a session as it happens. Closing the stream leaves the run going on.

    If the connection breaks, it goes on where it was: nothing comes twice, and nothing is left out but what the server
    no longer keeps, which is said by a Gap.

    with session.stream("print('hello')") as stream:
        for event in stream:
            print(event.content, end="")
    print(stream.result.status)
    """

    _Result = RunResult

    def __init__(
        self, connection: Connection, session: str, answer: Answer, run_id: str | None = None, after: int = 0
    ) -> None:
        self.run_id = run_id or answer.headers.get("x-era-run")
        """Names the run from the start. None if it is the repeated answer of an earlier one."""

        self._connection = connection
        self._session = session
        path = None if self.run_id is None else f"{session}/runs/{quoted(self.run_id)}/events"
        super().__init__(EventStream(connection, path, answer, last="done", after=after))

    @property
    def position(self) -> int:
        """The number of the newest event that came, behind which another stream of the run would go on."""
        return self._stream.position

    def stop(self) -> None:
        """Ask the run to end; its last events still come."""
        if self.run_id is not None:
            Run(self._connection, self._session, self.run_id).stop()
