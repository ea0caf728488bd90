"""A host of a cluster that loses its database: what it tells whom, and for how long."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.api.guest_servers import HTTP_SERVER, serve_in_background
from tests.api.live import Terminal, start
from tests.api.websocket import WebSocket
from tests.conftest import MakeServer, eventually
from tests.postgres import Postgres
from tests.soaking import soak_the_rest

LEASE_SECONDS = 15.0  # a busy machine lets a heartbeat wait for several


@contextmanager
def database_away(shared: Path) -> Iterator[None]:
    """Within the block nobody can write, so no heartbeat is sent."""
    with closing(sqlite3.connect(shared / "era.sqlite", isolation_level=None, timeout=60)) as database:
        database.execute("BEGIN IMMEDIATE")
        yield
        database.execute("ROLLBACK")


@pytest.mark.slow
def test_who_follows_something_is_hung_up_on_when_the_lease_is_over(own_server: MakeServer, tmp_path: Path) -> None:
    """As its sessions may be at home elsewhere by then. What lives there goes on, if nobody else has taken it."""
    shared = tmp_path / "shared"
    cluster = {"shared_dir": str(shared), "cluster_secret": "a secret of thirty-two characters"}
    server = own_server(lease_seconds=str(LEASE_SECONDS), **cluster)
    with server.client(timeout=120) as client:
        body = {"session_id": "s", "language": "python", "allowPublicAccess": True}
        assert client.post("/api/sessions", json=body).status_code == 201
        serve_in_background(client, "s", HTTP_SERVER)
        where = start(client, "s", "echo begun; exec sleep 1000")
        attached = Terminal(WebSocket(server, f"/api/sessions/s/processes/{where}/attach"))
        attached.until_event("stdout")
        heard: list[str] = []
        ended: list[str] = []

        def read(path: str) -> None:
            with server.client(timeout=120) as follower, follower.stream("GET", path) as answer:
                assert answer.status_code == 200
                heard.extend(path for _ in answer.iter_raw())

        def follow(path: str) -> None:
            with pytest.raises(httpx.HTTPError):
                read(path)
            ended.append(path)

        paths = [f"/api/sessions/s/processes/{where}/events", "/api/sessions/s/watch", "/proxy/s/3000/events"]
        threads = [threading.Thread(target=follow, args=(path,)) for path in paths]
        for thread in threads:
            thread.start()
        assert eventually(lambda: {*paths} == {*heard}), heard
        with database_away(shared):
            with pytest.raises(ConnectionError):
                attached.until_closed()
            attached.connection.close()
            for thread in threads:
                thread.join(60)
            assert sorted(ended) == sorted(paths)
            for path in ("/api/sessions/s", "/proxy/s/3000/status?200", "/api/sessions/s/files"):
                refused = client.get(path)
                assert (refused.status_code, refused.json()["code"]) == (503, "no_lease"), refused.text
                assert int(refused.headers["retry-after"]) > 0
        assert eventually(lambda: client.get("/ready").status_code == 200)
        again = Terminal(WebSocket(server, f"/api/sessions/s/processes/{where}/attach"))
        again.until_event("stdout")
        again.connection.close()
    assert "lease_over" in server.log


@pytest.mark.slow
@pytest.mark.parametrize("is_over", soak_the_rest([False, True], 1))
def test_calls_get_503_without_database_and_work_once_it_is_back(
    own_server: MakeServer, postgres: Postgres, postgres_url: str, tmp_path: Path, is_over: bool
) -> None:
    """Before the lease is over or after that."""
    cluster = {"shared_dir": str(tmp_path / "shared"), "cluster_secret": "a secret of thirty-two characters"}
    server = own_server(lease_seconds="40", database_url=postgres_url, **cluster)
    write = {"code": "open('f', 'w').write('kept')"}
    with server.client(timeout=120) as client:
        assert client.post("/api/sessions", json={"session_id": "s", "language": "python"}).status_code == 201
        assert client.post("/api/sessions/s/run", json=write).json()["status"] == "ok"
        before = client.get("/api/sessions/s").json()
        postgres.stop()
        try:
            for path in ("/api/sessions/s", "/api/sessions/s/files/f", "/api/sessions/s/files", "/api/sessions/other"):
                answer = client.get(path)
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "2"), answer.text
            answer = client.post("/api/sessions/s/run", json=write)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "2"), answer.text
            if is_over:
                assert eventually(lambda: client.get("/api/sessions/s").json()["code"] == "no_lease")
                assert client.get("/api/sessions/s").headers["retry-after"] == "1"
        finally:
            postgres.start()
        assert eventually(lambda: client.get("/ready").status_code == 200)
        assert client.get("/api/sessions/s").json() == before
        assert client.post("/api/sessions/s/run", json=write).json()["status"] == "ok"
