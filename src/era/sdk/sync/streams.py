# Made by scripts/blocking.py of src/era/sdk/aio/streams.py: change that one.
"""Event streams that go on where they broke."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from era.errors import EraError
from era.sdk.blocking import Answer, sleep
from era.sdk.calls import Call
from era.sdk.errors import AnswerTimeout, ConnectionLost
from era.sdk.events import Events
from era.sdk.sync.connection import Connection

_RESUMES = 5
"""How often a stream that broke is taken up again before anything comes of it."""

_FIRST_PAUSE = 0.05


class EventStream:
    """The numbered events of an answer. If it breaks, `path` has those behind the last one that came: nothing comes
    twice, and what the server no longer keeps comes as a `gap`."""

    def __init__(self, connection: Connection, path: str | None, answer: Answer, last: str) -> None:
        """`path` is None where nothing has the rest; `last` is the type of the last event."""
        self._connection = connection
        self._path = path
        self._answer = answer
        self._last = last
        self._events = Events()

    @property
    def position(self) -> int:
        """The number of the newest event that came, behind which another stream would go on."""
        return self._events.last_id or 0

    def events(self) -> Iterator[dict[str, Any]]:
        """The events, with the last one. Raises ConnectionLost or AnswerTimeout where it can't go on."""
        attempt = 0
        while True:
            lost: EraError = ConnectionLost("The stream ended before its last event.")
            try:
                for piece in self._answer.pieces():
                    for event in self._events.feed(piece):
                        attempt = 0
                        is_last = event["type"] == self._last
                        yield event
                        if is_last:
                            return
            except (ConnectionLost, AnswerTimeout) as error:
                lost = error
            if self._path is None or attempt == _RESUMES:
                raise lost
            sleep(_FIRST_PAUSE * 3**attempt)
            attempt += 1
            query = {"after": self._events.restart()}
            self._answer = self._connection.open(Call("GET", self._path, query=query))

    def close(self) -> None:
        """Listen no longer."""
        self._answer.close()
