"""A host of a cluster that has no room: sessions that need some move to another host, and no call about them fails."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.live import start
from tests.api.setups import settled
from tests.cluster import History
from tests.conftest import Server, assert_nothing_left, eventually, metrics_now, mounts
from tests.two_hosts import Home

COUNT = """\
import json
data = json.load(open('.session_data.json'))
data['n'] = data.get('n', 0) + 1
json.dump(data, open('.session_data.json', 'w'))
"""


@contextmanager
def full_home(directory: Path, others_warm: int, weakness: str = "", **settings: str) -> Iterator[Home]:
    """A home with room for two sandboxes, beside a host with room for so many. `weakness` is Python for both."""
    before = mounts()
    settings = {"ERA_MAX_WARM": "2", "ERA_LEASE_SECONDS": "20", **settings}
    home = Home(directory / "data", settings, weakness=weakness, of_other={"ERA_MAX_WARM": str(others_warm)}).start()
    try:
        wait_for_the_other(home)
        yield home
    finally:
        processes = home.descendants()
        assert home.stop(sandboxes_elsewhere=True) == 0, home.log
        assert "Traceback" not in home.log, home.log
        assert_nothing_left(before, processes, home.data_dir)


def beaten(home: Home, *, own: bool) -> int:
    """When the home, or the other host once it says where it is, has last sent a heartbeat."""
    query = f"SELECT heartbeat_at FROM hosts WHERE url <> '' AND id {'=' if own else '<>'} ?"
    with closing(sqlite3.connect(home.content_dir / "era.sqlite", timeout=60)) as database:
        row = database.execute(query, ((home.data_dir / "host-id").read_text(),)).fetchone()
    return 0 if row is None else int(row[0])


def wait_for_the_other(home: Home) -> None:
    """Wait until a heartbeat of the home has seen where the other host is."""
    assert eventually(lambda: beaten(home, own=False) > 0)
    said = beaten(home, own=False)
    assert eventually(lambda: beaten(home, own=True) > said)


def homes(home: Home) -> dict[str, tuple[bool, int]]:
    """Of each session that has a home, whether that is the full one, and the epoch."""
    query = "SELECT sessions.id, host_id, epoch FROM homes JOIN sessions ON sessions.key = session_key"
    with closing(sqlite3.connect(home.content_dir / "era.sqlite", timeout=60)) as database:
        host = (home.data_dir / "host-id").read_text()
        return {session: (where == host, epoch) for session, where, epoch in database.execute(query)}


def make(client: httpx.Client, *names: str) -> None:
    for name in names:
        assert client.post("/api/sessions", json={"session_id": name, "language": "python"}).status_code == 201


def count(client: httpx.Client, name: str) -> int:
    answer = client.post(f"/api/sessions/{name}/run", json={"code": COUNT})
    assert answer.status_code == 200, answer.text
    return int(answer.json()["data"]["n"])


def moved(server: Server) -> float:
    with server.client() as client:
        lines = metrics_now(client).splitlines()
    return float(next(line for line in lines if line.startswith("era_sessions_moved_total ")).split()[1])


def test_sessions_without_room_move_as_long_as_there_is_some_elsewhere(tmp_path: Path) -> None:
    with full_home(tmp_path, others_warm=4) as home, home.at_home().client() as client, home.client() as elsewhere:
        make(client, "a", "b", "c", "d", "e", "f")
        assert [count(client, name) for name in "abcd"] == [1, 1, 1, 1]
        here, there = (True, 1), (False, 2)
        assert homes(home) == {"a": here, "b": here, "c": there, "d": there, "e": here, "f": here}
        # Those that have a sandbox keep it, and those that have moved stay where they are, through either host.
        for _ in range(2):
            assert {count(each, name) for name in "abcd" for each in (client, elsewhere)} <= {2, 3, 4, 5}
        assert homes(home)["a"] == homes(home)["b"] == here
        # A host lets no more than three quarters of it be filled: from then on sandboxes make way, as on one server.
        assert [count(client, name) for name in "ef"] == [1, 1]
        assert homes(home) == {"a": here, "b": here, "c": there, "d": there, "e": there, "f": here}
        assert [count(client, name) for name in "abcdef"] == [6, 6, 6, 6, 2, 2]
        assert moved(home.at_home()) == 3


def test_a_session_that_cannot_be_live_here_is_live_elsewhere(tmp_path: Path) -> None:
    """Of three live sessions one owner alone may have two."""
    with full_home(tmp_path, 8, ERA_MAX_WARM="4") as home, home.at_home().client() as client:
        make(client, "a", "b", "c", "d")
        for name in "abcd":
            start(client, name, "exec sleep 600")
        here, there = (True, 1), (False, 2)
        assert homes(home) == {"a": here, "b": here, "c": there, "d": there}
        listed = client.get("/api/sessions").json()["sessions"]
        assert {each["id"]: each["processes"] for each in listed} == dict.fromkeys("abcd", 1)


def test_a_session_without_a_home_goes_where_its_packages_are(tmp_path: Path) -> None:
    with full_home(tmp_path, 8, ERA_MAX_WARM="8") as home, home.client() as elsewhere:
        made = elsewhere.post(
            "/api/sessions", json={"session_id": "p", "language": "python", "setup": {"pip": ["six"]}}
        )
        assert made.status_code == 201, made.text
        settled(elsewhere, "p")
        with closing(sqlite3.connect(home.content_dir / "era.sqlite", timeout=60)) as database:
            database.execute("DROP TRIGGER at_home")  # by which new sessions are at home there from the beginning
        for name in ("q", "r"):
            copied = elsewhere.post("/api/sessions/p/duplicate", json={"id": name})
            assert copied.status_code == 201, copied.text
        make(elsewhere, "s")
        for name in "qrs":
            code = "print(1)" if name == "s" else "import six; print(1)"
            ran = elsewhere.post(f"/api/sessions/{name}/run", json={"code": code})
            assert ran.json()["stdout"] == "1\n", ran.text
        here = (True, 2)
        assert homes(home) == {"p": (True, 1), "q": here, "r": here, "s": (False, 1)}
        assert not list((home.data_dir.parent / "data-other" / "environments").glob("?" * 64))


@pytest.mark.soak
def test_a_new_session_is_set_up_where_the_same_was_done_before(tmp_path: Path) -> None:
    six = {"language": "python", "setup": {"pip": ["six"]}}
    with full_home(tmp_path, 8, ERA_MAX_WARM="8") as home, home.client() as elsewhere:
        assert elsewhere.post("/api/sessions", json={"session_id": "p", **six}).status_code == 201
        settled(elsewhere, "p")
        with closing(sqlite3.connect(home.content_dir / "era.sqlite", timeout=60)) as database:
            database.execute("DROP TRIGGER at_home")  # by which new sessions are at home there from the beginning
        for name in ("q", "r"):
            assert elsewhere.post("/api/sessions", json={"session_id": name, **six}).status_code == 201
        # One is run at once, the other looked at.
        ran = elsewhere.post("/api/sessions/q/run", json={"code": "import six; print(1)"})
        assert ran.json()["stdout"] == "1\n", ran.text
        settled(elsewhere, "r")
        at_home = {name for name, (is_there, _) in homes(home).items() if is_there}
        assert at_home - {"q"} == {"p", "r"}
        # A session stays if it is called before its place is found.
        assert "q" not in at_home or not list((home.data_dir.parent / "data-other" / "environments").glob("?" * 64))


@dataclass
class Both:
    """The two hosts, as a history calls them."""

    home: Home

    def told(self) -> list[dict[str, Any]]:
        return [{}, {}]

    def server(self, number: int) -> Server:
        return self.home if number else self.home.at_home()


@pytest.mark.soak
def test_no_call_fails_while_sessions_move(tmp_path: Path) -> None:
    """Clients that append through both hosts are all answered, in one order a session."""
    with full_home(tmp_path, others_warm=6) as home, home.client() as client:
        names = [f"s{number}" for number in range(8)]
        make(client, *names)
        history = History(Both(home), names)
        clients = [threading.Thread(target=history.append, args=(seed, 12)) for seed in range(4)]
        for each in clients:
            each.start()
        for each in clients:
            each.join(300)
        assert (history.unknown, history.lost) == (0, [])
        assert len(history.answered) == 4 * 12
        history.check(client)
        assert moved(home.at_home()) >= 1
        # Nothing goes back and forth.
        assert max(epoch for _, epoch in homes(home).values()) <= 3
