"""Sessions choose their isolation, and are told which was in force."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.api.test_contract import refused
from tests.conftest import Run, Server, eventually

type MakeSession = Callable[..., str]
type MakeServer = Callable[..., Server]

HAS_GVISOR = shutil.which("runsc", path="/usr/bin") is not None
needs_gvisor = pytest.mark.skipif(
    not HAS_GVISOR, reason="gVisor's runsc is not installed (as root: scripts/setup --test)"
)


def in_force(client: httpx.Client, where: str) -> Any:
    return client.get(f"/api/sessions/{where}/runs?limit=1").json()["runs"][0]["enforced"]


@needs_gvisor
def test_a_session_can_have_gvisor_and_change_its_mind(own_server: MakeServer) -> None:
    server = own_server()
    with server.client() as client:
        made = client.post("/api/sessions", json={"language": "python", "session_id": "s", "isolation": "gvisor"})
        assert made.json()["isolation"] == "gvisor"

        def run(code: str) -> dict[str, Any]:
            answer = client.post("/api/sessions/s/run", json={"code": code})
            assert answer.status_code == 200, answer.text
            told: dict[str, Any] = answer.json()
            return told

        assert "gvisor" not in client.get("/health").json()["isolation"]["available"], "proved only when needed"
        assert run("open('kept', 'w').write('1'); print(open('/proc/version').read())")["status"] == "ok"
        assert (in_force(client, "s")["driver"], in_force(client, "s")["platform"]) == ("gvisor", "systrap")
        assert client.get("/health").json()["isolation"]["available"] == ["bubblewrap", "gvisor"]
        changed = client.patch("/api/sessions/s", json={"isolation": "bubblewrap"}).json()
        assert changed["metadata"]["isolation"] == "bubblewrap"
        assert run("print(open('kept').read())")["stdout"] == "1\n"
        assert in_force(client, "s")["driver"] == "bubblewrap"
        copy = client.post("/api/sessions/s/duplicate", json={}).json()
        assert copy["isolation"] == "bubblewrap"
        body = {"language": "node", "code": "console.log(1)", "isolation": "gvisor"}
        assert client.post("/api/execute", json=body).json()["stdout"] == "1\n"


@needs_gvisor
def test_auto_is_gvisor_where_it_works(own_server: MakeServer) -> None:
    server = own_server(isolation="auto")
    with server.client() as client:
        assert client.get("/health").json()["isolation"]["default"] == "gvisor"
        client.post("/api/sessions", json={"language": "typescript", "session_id": "s"})
        told = client.post("/api/sessions/s/run", json={"code": "const n: number = 1; console.log(n)"}).json()
        assert told["stdout"] == "1\n"
        assert in_force(client, "s")["driver"] == "gvisor"


@needs_gvisor
def test_nothing_of_gvisor_outlives_kill_9(own_server: MakeServer) -> None:
    server = own_server(isolation="gvisor")
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s", "data": {"n": 1}})
        client.post("/api/sessions/s/run", json={"code": "open('kept', 'w').write('1')"})
    processes = server.descendants()
    server.stop(9)
    server.start()
    with server.client() as client:
        assert client.post("/api/sessions/s/run", json={"code": "print(open('kept').read())"}).json()["stdout"] == "1\n"
    left = [pid for pid in processes if eventually(lambda pid=pid: not _exists(pid)) is False]  # type: ignore[misc]
    assert left == []


def _exists(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"runsc" in file.read()
    except OSError:
        return False


@pytest.mark.skipif(HAS_GVISOR and os.geteuid() != 0, reason="only root can hide gVisor from a server")
def test_what_can_t_be_had_is_refused(own_server: MakeServer) -> None:
    """A machine whose runsc doesn't work: the session that asks for it gets no other sandbox."""
    server = own_server(hidden="/usr/bin/runsc") if HAS_GVISOR else own_server()
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s", "isolation": "gvisor"})
        body = refused(client.post("/api/sessions/s/run", json={"code": "print(1)"}), 503)
        assert body["code"] == "no_isolation"
        records = client.get("/api/sessions/s/runs").json()["runs"]
        assert [record["status"] for record in records] == ["failed"]
        assert client.patch("/api/sessions/s", json={"isolation": "auto"}).status_code == 200
        assert client.post("/api/sessions/s/run", json={"code": "print(1)"}).json()["stdout"] == "1\n"


@pytest.mark.parametrize("isolation", ["none", "", None, 1, "Bubblewrap"])
def test_what_is_no_isolation_is_refused(client: httpx.Client, isolation: Any) -> None:
    body = {"language": "python", "isolation": isolation}
    refused(client.post("/api/sessions", json=body), 400, "isolation")


def test_the_usual_is_told(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    run(where, "")
    assert in_force(client, where)["driver"] == "bubblewrap"
    assert client.get("/health").json()["isolation"]["default"] == "bubblewrap"
