"""Readiness: what load balancers are told."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import pytest

from era.core.operation.readiness import Readiness
from era.errors import Unavailable, Unready
from tests.conftest import MakeServer, eventually


def test_a_service_that_takes_runs_is_ready(own_server: MakeServer) -> None:
    server = own_server(api_key="k" * 32)
    with server.client() as anybody:
        answer = anybody.get("/ready")
        assert answer.status_code == 200
        ready = answer.json()
        places = ready["sandboxes"].pop("places")
        assert places > 0
        assert ready == {"status": "ready", "sandboxes": {"taken": 0, "waiting": 0}}
        head = anybody.head("/ready")
        assert (head.status_code, head.content) == (200, b"")
        assert anybody.get("/ready", headers={"Host": "balancer.example"}).status_code == 200
        assert anybody.post("/ready").headers["allow"] == "GET, HEAD"
    assert not list((server.data_dir / "uploads").iterdir())


def test_a_data_directory_that_cannot_be_written_to_is_told_until_it_can(own_server: MakeServer) -> None:
    server = own_server()
    uploads = server.data_dir / "uploads"
    with server.client(base_url=server.own_url) as client:
        assert client.get("/ready").status_code == 200
        uploads.rename(server.data_dir / "aside")
        assert eventually(lambda: client.get("/ready").status_code == 503)
        answer = client.get("/ready")
        assert answer.json()["code"] == "not_ready"
        assert answer.json()["details"] == {"reason": "storage"}
        assert int(answer.headers["retry-after"]) > 0
        assert client.get("/health").status_code == 200
        (server.data_dir / "aside").rename(uploads)
        assert eventually(lambda: client.get("/ready").status_code == 200)


def test_a_service_told_to_stop_says_so_and_goes_on_for_a_while(own_server: MakeServer) -> None:
    server = own_server(unready_seconds="8")
    with server.client(base_url=server.own_url) as client:
        assert client.get("/ready").status_code == 200
        os.kill(server.pid, signal.SIGTERM)
        assert eventually(lambda: client.get("/ready").status_code == 503)
        assert client.get("/ready").json()["details"] == {"reason": "stopping"}
        with server.client(base_url=server.own_url) as other:  # it still listens
            assert other.get("/health").status_code == 200
    assert server.stop() == 0


async def test_a_database_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    tries = 0

    async def write() -> None:
        nonlocal tries
        tries += 1
        raise Unavailable("the database failed")

    readiness = Readiness(tmp_path, write)
    for _ in range(50):
        with pytest.raises(Unready, match="database can't be written to"):
            await readiness.check()
    assert tries < 50, "what asking costs is bounded"


def test_programs_cannot_ask(client: httpx.Client) -> None:
    """They may call /health and public URLs only; /ready is for load balancers. Its path is no session's."""
    assert client.get("/ready/x").status_code == 404
