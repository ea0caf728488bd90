"""Watches of a live session's files over HTTP, on real sandboxes."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx

from tests.api.answers import refused
from tests.api.files_api import delete, put
from tests.api.live import ended, start
from tests.conftest import MakeSession, Server, eventually

SECONDS = 60.0


class Seen:
    """The events of a watch, as they come."""

    def __init__(self) -> None:
        self.coming: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.all: list[dict[str, Any]] = []
        self.last = 0
        """The number of the newest event that has come."""

    def until(self, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """All events so far, once one of them is as wanted."""
        is_there = any(map(wanted, self.all))
        while not is_there:
            event = self.coming.get(timeout=SECONDS)
            assert event is not None, self.all[-100:]
            self.all.append(event)
            is_there = wanted(event)
        return self.all

    def settle(self, quiet: float) -> None:
        """Wait until nothing has come for so many seconds: what happens now finds the kernel's queue empty."""
        try:
            while (event := self.coming.get(timeout=quiet)) is not None:
                self.all.append(event)
        except queue.Empty:
            return
        raise AssertionError(self.all[-100:])

    def has(self, **event: str) -> bool:
        return event in self.until(lambda each: each == event)


@contextmanager
def watch(server: Server, where: str, *, key: str = "", **query: Any) -> Iterator[Seen]:
    """A watch that is in force within the block."""
    headers = {"Authorization": f"Bearer {key}"} if key else None
    seen = Seen()

    def follow(answer: httpx.Response) -> None:
        try:
            for line in answer.iter_lines():
                if line.startswith("id: "):
                    seen.last = int(line.removeprefix("id: "))
                elif line.startswith("data: "):
                    seen.coming.put(json.loads(line.removeprefix("data: ")))
        except httpx.TransportError:
            pass
        seen.coming.put(None)

    path = f"/api/sessions/{where}/watch"
    with server.client() as client, client.stream("GET", path, params=query, headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        thread = threading.Thread(target=follow, args=(answer,), daemon=True)
        thread.start()
        assert seen.has(type="watching", path=query.get("path", "").removeprefix("."))
        yield seen


def shell(client: httpx.Client, where: str, command: str) -> None:
    ended(client, where, start(client, where, command))


def test_a_watch_tells_what_processes_and_clients_change(
    client: httpx.Client, session: MakeSession, server: Server
) -> None:
    where = session()
    start(client, where, "sleep 1000")
    shell(client, where, "mkdir d; touch d/old")
    with watch(server, where, recursive=True) as seen:
        shell(client, where, "echo 1 > d/new; chmod 600 d/old; mv d/old d/older; rm d/older; mkdir -p e/f")
        assert seen.has(type="create", path="d/new")
        assert seen.has(type="write", path="d/new")
        assert seen.has(type="chmod", path="d/old")
        assert seen.has(type="rename", path="d/old", to="d/older")
        assert seen.has(type="remove", path="d/older")
        assert seen.has(type="create", path="e/f")
        shell(client, where, "touch e/f/deep; mv e moved")
        assert seen.has(type="create", path="e/f/deep")
        assert seen.has(type="rename", path="e", to="moved")
        shell(client, where, "touch moved/f/there")
        assert seen.has(type="create", path="moved/f/there"), "a directory that moves stays watched"
        assert put(client, where, "d/put", b"1").is_success
        assert seen.has(type="create", path="d/put")
        assert delete(client, where, "d/put").is_success
        assert seen.has(type="remove", path="d/put")
        assert not [each for each in seen.all if ".era-" in each.get("path", "")], "drafts aren't told"


def test_a_watch_says_that_it_has_lost_events(client: httpx.Client, session: MakeSession, server: Server) -> None:
    where = session()
    start(client, where, "sleep 1000")
    burst = "import os\nwhile True:\n    os.close(os.open('f', os.O_CREAT)); os.remove('f')\n"
    with watch(server, where) as seen:
        name = start(client, where, ["python3", "-c", burst])
        assert seen.until(lambda each: each["type"] in ("overflow", "gap"))
        assert client.delete(f"/api/sessions/{where}/processes/{name}").is_success
        seen.settle(2)
        assert put(client, where, "after", b"").is_success
        assert seen.has(type="create", path="after"), "it goes on"


def test_a_watch_ends_with_the_live_session(client: httpx.Client, session: MakeSession, server: Server) -> None:
    where = session()
    start(client, where, "sleep 1000")
    with watch(server, where) as seen:
        assert client.post(f"/api/sessions/{where}/stop").is_success
        [*_, last] = seen.until(lambda each: each["type"] == "error")
        assert last["code"] == "not_live"


def test_bad_watches_are_refused(client: httpx.Client, session: MakeSession, server: Server) -> None:
    where = session()
    start(client, where, "sleep 1000")
    shell(client, where, "mkdir d; ln -s /etc link")
    for query, status, code in (
        ({"path": "none"}, 404, "no_file"),
        ({"path": "link/passwd"}, 409, "is_a_link"),
        ({"path": "../x"}, 400, "bad_path"),
        ({"recursive": "perhaps"}, 400, "invalid_field"),
    ):
        assert refused(client.get(f"/api/sessions/{where}/watch", params=query), status)["code"] == code
    shell(client, where, "mkdir -p " + " ".join(f"n/{number}" for number in range(9)))
    with ExitStack() as stack:
        for number in range(8):
            stack.enter_context(watch(server, where, path=f"n/{number}"))
        stack.enter_context(watch(server, where, path="n/0"))  # one more reader of the same watch
        answer = client.get(f"/api/sessions/{where}/watch", params={"path": "n/8"})
        assert refused(answer, 409)["code"] == "too_many_watches"

    def is_watched() -> bool:
        for number in range(8):  # that a reader has left is seen when it is told something
            put(client, where, f"n/{number}/f", b"")
        with client.stream("GET", f"/api/sessions/{where}/watch", params={"path": "n/8"}) as answer:
            return answer.status_code == 200

    assert eventually(is_watched), "those that nobody reads make way"


def test_reader_is_refused_when_a_session_has_as_many_as_it_may(
    client: httpx.Client, session: MakeSession, server: Server
) -> None:
    """Each is sent all changes, which is the event loop's work: 80 readers of a storm made others' runs wait."""
    where, other = session(), session()
    for each in (where, other):
        start(client, each, "sleep 1000")
        shell(client, each, "mkdir d e")
    with ExitStack() as stack:
        for number in range(32):
            stack.enter_context(watch(server, where, path="de"[number % 2]))
        answer = client.get(f"/api/sessions/{where}/watch", params={"path": "d"})
        assert refused(answer, 409)["code"] == "too_many_watches"
        assert "32 readers" in answer.json()["error"]
        with watch(server, other, path="d") as seen:
            shell(client, other, "touch d/a")
            assert seen.has(type="create", path="d/a")
