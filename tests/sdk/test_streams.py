"""When an event stream that broke is taken up again, how long, and where: on a connection that is scripted."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from era import AsyncEra, Era
from era.errors import EraError, NotFound, RunLost, Unavailable
from era.sdk.calls import Call
from era.sdk.errors import ConnectionLost, ServerAway, answered_error
from era.sdk.sync import streams
from era.sdk.sync.streams import EventStream


def event(number: int, kind: str = "line") -> bytes:
    return f"id: {number}\ndata: {json.dumps({'type': kind, 'number': number})}\n\n".encode()


class Answer:
    """A body that comes in these pieces, and then breaks or ends."""

    headers: ClassVar = {"content-type": "text/event-stream; charset=utf-8"}

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
        self.answers = list(answers)

    def open(self, call: Call) -> Answer:
        assert call.method == "GET"
        self.asked.append(int(call.target.rpartition("after=")[2]))
        answer = self.answers.pop(0) if self.answers else ServerAway("Nobody is there.")
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
    with pytest.raises(ConnectionLost):  # not ServerAway, which says that nothing was done
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


@pytest.mark.parametrize("refusal", [NotFound("No."), answered_error(404, {}, None)])
def test_what_the_server_refuses_is_raised(monkeypatch: pytest.MonkeyPatch, refusal: EraError) -> None:
    connection = Connection(refusal)
    with pytest.raises(type(refusal)):
        list(follow(connection, Answer(event(1)), monkeypatch))
    assert connection.asked == [1]


@pytest.mark.parametrize(
    "away", [Unavailable("No."), *(answered_error(status, {}, None) for status in (502, 503, 504))]
)
def test_a_server_that_is_said_to_be_away_is_waited_for(monkeypatch: pytest.MonkeyPatch, away: EraError) -> None:
    """By itself, or by a proxy before it."""
    connection = Connection(*[away] * 9, Answer(event(2, "done")))
    assert [each["number"] for each in follow(connection, Answer(event(1)), monkeypatch)] == [1, 2]
    with pytest.raises(type(away)):
        list(follow(Connection(*[away] * 99), Answer(event(1)), monkeypatch))


def test_patience_begins_anew_with_a_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program may write nothing for long after a connection broke. Pauses grow until it does."""
    connection = Connection()
    heartbeat = b": heartbeat\n\n"

    class Quiet(Answer):
        def pieces(self) -> Iterator[bytes]:
            yield heartbeat
            connection.sleep(600)
            raise ConnectionLost("It broke.")

    connection.answers = [Quiet(), *[Answer(heartbeat)] * 40, Answer(event(2, "done"))]
    assert [each["number"] for each in follow(connection, Answer(event(1)), monkeypatch)] == [1, 2]
    assert 670 < connection.seconds < 690


def test_a_page_of_a_proxy_is_no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    class Page(Answer):
        headers: ClassVar = {"content-type": "text/html"}

    connection = Connection(*[Page(b"<h1>Back soon</h1>")] * 99)
    got = follow(connection, Answer(event(1)), monkeypatch)
    assert next(got)["number"] == 1
    with pytest.raises(ConnectionLost):
        next(got)
    assert 60 < connection.seconds < 65


async def test_an_event_is_waited_for_longer_than_an_answer() -> None:
    """Heartbeats come every 15 seconds, whatever `timeout` says."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"

    def serve(listener: socket.socket) -> None:
        for _ in range(2):
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(head)
                time.sleep(4)
                connection.sendall(event(1, "done"))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = threading.Thread(target=serve, args=(listener,))
        serving.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with Era(url, timeout=2.5, retries=0) as client:
            assert client.sessions.named("x").runs.get("r").stream().wait().number == 1
        async with AsyncEra(url, timeout=2.5, retries=0) as waiting:
            stream = await waiting.sessions.named("x").runs.get("r").stream()
            assert (await stream.wait()).number == 1
        serving.join()
