# Made by scripts/blocking.py of src/era/sdk/aio/streams.py: change that one.
"""Event streams that go on where they broke."""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic
from typing import Any

from era.errors import EraError
from era.sdk.blocking import Answer, is_event_stream, sleep
from era.sdk.calls import Call, Query
from era.sdk.errors import AnswerTimeout, ConnectionLost
from era.sdk.events import Events
from era.sdk.retries import PATIENCE, is_away, went_away
from era.sdk.sync.connection import Connection

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0


class EventStream:
    """The numbered events of an answer. If it breaks, `path` has those behind the last one that came: nothing comes
    twice, and what the server no longer keeps comes as a `gap`."""

    def __init__(
        self,
        connection: Connection,
        path: str | None,
        answer: Answer,
        *,
        last: str | None,
        query: Query | None = None,
        after: int = 0,
        seconds: float | None = None,
    ) -> None:
        """`path` is None where nothing has the rest, and may need a `query`; `last` is the type of the last event, if
        there ever is one; `after` is the number behind which the answer begins; the one that has the rest may take so
        many `seconds` to begin, if not as any call."""
        self._connection = connection
        self._path = path
        self._query = query or {}
        self._answer = answer
        self._last = last
        self._seconds = seconds
        self._events = Events(after)

    @property
    def position(self) -> int:
        """The number of the newest event that came, behind which another stream would go on."""
        return self._events.last_id

    def events(self) -> Iterator[dict[str, Any]]:
        """The events, with the last one. Raises why it can't go on, such as ConnectionLost."""
        broken: float | None = None
        seconds = _FIRST_PAUSE
        answer: Answer | None = self._answer
        while True:
            lost: EraError = ConnectionLost("The stream ended before its last event.")
            try:
                if answer is None:
                    query = {**self._query, "after": self._events.restart()}
                    call = Call("GET", self._path or "", query=query, seconds=self._seconds)
                    self._answer = answer = self._connection.open(call)
                is_servers = is_event_stream(answer.headers.get("content-type"))
                for piece in answer.pieces():
                    # A heartbeat is enough, but only an event shortens the next pause.
                    broken = None if is_servers else broken
                    for event in self._events.feed(piece):
                        broken, seconds = None, _FIRST_PAUSE
                        is_last = event["type"] == self._last
                        yield event
                        if is_last:
                            return
            except EraError as error:
                is_cut = isinstance(error, ConnectionLost | AnswerTimeout)
                if not is_cut and not (answer is None and is_away(error)):
                    raise
                lost = went_away(error)
            now = monotonic()
            broken = now if broken is None else broken
            if self._path is None or self._connection.retries == 0 or now - broken > PATIENCE:
                raise lost
            sleep(seconds)
            seconds = min(seconds * 3, _LONGEST_PAUSE)
            answer = None

    def close(self) -> None:
        """Listen no longer."""
        self._answer.close()
