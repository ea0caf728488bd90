"""Sessions whose `service` is started by public calls, and ends when it isn't needed."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import pytest

from tests.api.guest_servers import HTTP_SERVER, WEBSOCKET_ECHO
from tests.api.websocket import WebSocket
from tests.conftest import MakeServer, MakeSession, Run, Server, eventually
from tests.table import table


def put(client: httpx.Client, where: str, code: str, name: str = "app.py") -> None:
    """Put a file into a session."""
    assert client.put(f"/api/sessions/{where}/files/{name}", content=code.encode()).status_code == 200


def runs(client: httpx.Client, where: str) -> list[dict[str, Any]]:
    """The records of a session's runs, newest first."""
    records: list[dict[str, Any]] = client.get(f"/api/sessions/{where}/runs").json()["runs"]
    return records


@pytest.fixture
def served(client: httpx.Client, session: MakeSession) -> MakeSession:
    """Makes a session with a service; returns its id."""

    def make(service: Any = "python3 app.py", code: str = HTTP_SERVER, **fields: Any) -> str:
        where = session(service=service, **fields)
        put(client, where, code)
        return where

    return make


@table("service", ["exec python3 app.py", ["python3", "app.py"], "cd . && python3 ./app.py"])
def test_a_call_starts_the_service(client: httpx.Client, served: MakeSession, service: Any) -> None:
    where = served(service)
    assert client.get(f"/api/sessions/{where}").json()["service"] == service
    assert runs(client, where) == []
    for port in (4321, 4321):
        answer = client.get(f"/proxy/{where}/{port}/x")
        assert (answer.status_code, answer.json()["path"]) == (200, "/x")
    [run] = runs(client, where)
    assert (run["status"], answer.headers["X-Era-Run"]) == ("running", run["run_id"])
    elsewhere = client.get(f"/proxy/{where}/4322/")
    assert (elsewhere.status_code, elsewhere.headers["X-Era-Run"]) == (502, run["run_id"])


def test_many_calls_start_the_service_once(client: httpx.Client, served: MakeSession, server: Server) -> None:
    where, answers = served(), []

    def call() -> None:
        with server.client() as other:
            answers.append(other.get(f"/proxy/{where}/3000/").status_code)

    threads = [threading.Thread(target=call) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 12
    assert len(runs(client, where)) == 1


def test_the_owners_calls_end_the_service(client: httpx.Client, served: MakeSession, run: Run) -> None:
    where = served()
    assert client.get(f"/proxy/{where}/3000/write").status_code == 200
    outcome = run(where, "print(open('written.txt').read())")  # the service has ended, and its file is there
    assert outcome["stdout"] == "x\n"
    assert client.get(f"/proxy/{where}/3000/write").status_code == 200  # it is started again with its files
    put(client, where, "changed", "other.txt")  # writing a file ends it too
    assert client.get(f"/api/sessions/{where}/files/written.txt").text == "xx"
    assert [one["status"] for one in runs(client, where)] == ["killed", "ok", "killed"]
    for change in ({"data": {"n": 1}}, {"metadata": {"a": "b"}}, {"service": None}):
        assert client.get(f"/proxy/{where}/3000/").status_code == 200
        assert client.patch(f"/api/sessions/{where}", json=change).status_code == 200
    assert client.get(f"/api/sessions/{where}").json()["data"] == {"n": 1}
    back = client.post(f"/api/sessions/{where}/rollback", json={"version": 2})
    assert back.status_code == 200
    assert client.get(f"/proxy/{where}/3000/").status_code == 400
    assert client.delete(f"/api/sessions/{where}").status_code == 200


@table(
    "service, status",
    [("echo 'secret trace' >&2; exit 7", "failed"), (["no-such-program"], "failed"), ("kill -9 $$", "killed")],
)
def test_a_service_that_fails_is_503(client: httpx.Client, served: MakeSession, service: Any, status: str) -> None:
    where = served(service)
    answer = client.get(f"/proxy/{where}/3000/")
    assert (answer.status_code, answer.json()["code"]) == (503, "service_failed")
    assert "did not listen" not in answer.text, "it was found to have ended, and not waited for"
    assert int(answer.headers["Retry-After"]) >= 1
    assert "secret" not in answer.text  # callers may be anybody
    [run] = runs(client, where)
    assert (answer.headers["X-Era-Run"], run["status"]) == (run["run_id"], status)
    if "secret" in service:
        assert client.get(f"/api/sessions/{where}/runs/{run['run_id']}/stderr").text == "secret trace\n"
    for _ in range(5):
        assert client.get(f"/proxy/{where}/3000/").status_code == 503
    assert len(runs(client, where)) <= 3  # it isn't restarted over and over


@table("service", ["", [], [""], ["a\0b"], 7, {"x": 1}, ["x"] * 65, "x" * 5000])
def test_invalid_services_are_refused(client: httpx.Client, session: MakeSession, service: Any) -> None:
    answer = client.post("/api/sessions", json={"language": "python", "service": service})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_field")
    where = session()
    assert client.patch(f"/api/sessions/{where}", json={"service": service}).status_code == 400
    assert client.get(f"/api/sessions/{where}").json()["service"] is None


def test_a_websocket_starts_the_service(client: httpx.Client, served: MakeSession, server: Server) -> None:
    where = served("exec node app.js", language="node")
    put(client, where, WEBSOCKET_ECHO, "app.js")
    websocket = WebSocket(server, f"/proxy/{where}/3000/")
    websocket.send(b"hello", 1)
    assert websocket.receive() == (1, b"hello")
    websocket.close()


def test_a_service_ends_when_idle_and_when_its_room_is_needed(own_server: MakeServer) -> None:
    server = own_server(idle_seconds="1", max_warm="2", max_timeout="10")
    with server.client() as client:
        for name in ("a", "b", "c"):
            client.post(
                "/api/sessions",
                json={"language": "python", "session_id": name, "service": "python3 app.py", "default_timeout": 10},
            )
            put(client, name, HTTP_SERVER)
        assert client.get("/proxy/a/3000/write").status_code == 200
        assert eventually(lambda: runs(client, "a")[0]["status"] == "killed")  # nobody has called for a second
        assert client.get("/api/sessions/a/files/written.txt").text == "x"

        for name in ("a", "b", "c"):  # more than there is room for
            assert client.get(f"/proxy/{name}/3000/write").status_code == 200
        assert client.get("/api/sessions/a/files/written.txt").text == "xx"

        with client.stream("GET", "/proxy/b/3000/events") as answer:  # neither ends a service that is answering
            lines = answer.iter_lines()
            assert next(lines) == "data: 0"
            time.sleep(1.5)
            assert runs(client, "b")[0]["status"] == "running"
            with pytest.raises(httpx.TransportError):  # max_timeout does
                list(lines)
        assert eventually(lambda: runs(client, "b")[0]["status"] in ("timeout",))
    assert server.stop() == 0
    assert "Traceback" not in server.log, server.log
