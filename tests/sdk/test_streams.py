"""When an event stream that broke is taken up again, how long, and where: on a connection that is scripted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from era.errors import EraError, RunLost, Unavailable
from era.sdk.calls import Call
from era.sdk.errors import ConnectionLost, ServerAway
from era.sdk.sync import streams
from era.sdk.sync.streams import EventStream


def event(number: int, kind: str = "line") -> bytes:
    return f"id: {number}\ndata: {json.dumps({'type': kind, 'number': number})}\n\n".encode()


class Answer:
    """A body that comes in these pieces, and then breaks or ends."""

    def __init__(self, *pieces: bytes, breaks: bool = True) -> None:
        self._pieces = pieces
        self._breaks = breaks

    def pieces(self) -> Iterator[bytes]:
        yield from self._pieces
        if self._breaks:
            raise ConnectionLost("It broke.")

    def close(self) -> None: ...


class Connection:
    """Answers with what it is given, one after the other; then nobody is there. `seconds` is how long was waited."""

    def __init__(self, *answers: Answer | EraError, retries: int = 3) -> None:
        self.retries = retries
        self.asked: list[int] = []
        self.seconds = 0.0
        self._answers = list(answers)

    def open(self, call: Call) -> Answer:
        assert call.method == "GET"
        self.asked.append(int(call.target.rpartition("after=")[2]))
        answer = self._answers.pop(0) if self._answers else ServerAway("Nobody is there.")
        if isinstance(answer, EraError):
            raise answer
        return answer

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


def follow(
    connection: Connection, first: Answer, monkeypatch: pytest.MonkeyPatch, path: str | None = "/events", after: int = 0
) -> Iterator[dict[str, Any]]:
    monkeypatch.setattr(streams, "sleep", connection.sleep)
    monkeypatch.setattr(streams, "monotonic", lambda: connection.seconds)
    stream = EventStream(connection, path, first, last="done", after=after)  # type: ignore[arg-type]  # scripted ones
    return stream.events()


def test_a_server_that_is_away_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    away = [ServerAway("Nobody is there.")] * 9
    connection = Connection(*away, Answer(event(3)[:5]), Answer(event(3), event(4, "done"), breaks=False))
    got = list(follow(connection, Answer(event(1), event(2), event(3)[:9]), monkeypatch))
    assert [each["number"] for each in got] == [1, 2, 3, 4]
    assert connection.asked == [2] * 11
    assert 10 < connection.seconds < 60


def test_patience_ends_a_minute_after_the_last_event(monkeypatch: pytest.MonkeyPatch) -> None:
    connection = Connection(*[ServerAway("Nobody is there.")] * 15, Answer(event(2)))
    got = follow(connection, Answer(event(1)), monkeypatch)
    assert [next(got)["number"], next(got)["number"]] == [1, 2]
    since = connection.seconds
    with pytest.raises(ServerAway):
        next(got)
    assert 60 < connection.seconds - since < 65


def test_a_break_before_the_first_event_goes_on_where_the_caller_began(monkeypatch: pytest.MonkeyPatch) -> None:
    connection = Connection(Answer(event(18, "done"), breaks=False))
    assert [each["number"] for each in follow(connection, Answer(), monkeypatch, after=17)] == [18]
    assert connection.asked == [17]


def test_an_end_without_the_last_event_is_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    connection = Connection(Answer(event(2, "done"), breaks=False))
    got = follow(connection, Answer(event(1), breaks=False), monkeypatch)
    assert [each["number"] for each in got] == [1, 2]


@pytest.mark.parametrize(("retries", "path"), [(0, "/events"), (3, None)])
def test_what_can_not_be_taken_up_again_says_so_at_once(
    monkeypatch: pytest.MonkeyPatch, retries: int, path: str | None
) -> None:
    connection = Connection(Answer(event(2, "done")), retries=retries)
    with pytest.raises(ConnectionLost):
        list(follow(connection, Answer(event(1)), monkeypatch, path))
    assert (connection.asked, connection.seconds) == ([], 0)


def test_an_error_ends_what_came_before_it_in_the_class_of_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    for code, kind in (("run_lost", RunLost), ("internal", EraError), ("something_new", Unavailable)):
        told = json.dumps({"type": "error", "error": "So it is.", "code": code})
        got = follow(Connection(), Answer(event(1) + event(2) + f"data: {told}\n\n".encode()), monkeypatch)
        assert [next(got)["number"], next(got)["number"]] == [1, 2]
        with pytest.raises(kind) as raised:
            next(got)
        assert type(raised.value) is kind


def test_the_position_is_that_of_the_event_which_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many came in the same piece."""
    stream = EventStream(Connection(), None, Answer(event(1) + event(2)), last="done")  # type: ignore[arg-type]  # as above
    next(stream.events())
    assert stream.position == 1


def test_what_the_server_refuses_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    connection = Connection(Unavailable("No."))
    with pytest.raises(Unavailable):
        list(follow(connection, Answer(event(1)), monkeypatch))
