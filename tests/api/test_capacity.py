"""More sessions at a time than there is room for: who waits is served, and who can't be is told so soon."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.conftest import MakeServer, Server, eventually, metrics_now
from tests.soaking import soak_the_rest

SLEEP = {"code": "import time; time.sleep(250)", "background": True, "timeout": 280}


def _create_and_run(server: Server, number: int) -> tuple[int, int, str]:
    """The statuses of creating a session and of its first run, and the output."""
    with server.client() as client:
        created = client.post("/api/sessions", json={"language": "python"})
        where = created.json()["id"]
        answer = client.post(f"/api/sessions/{where}/run", json={"code": f"print({number})"}, timeout=300)
        return created.status_code, answer.status_code, answer.json().get("stdout", answer.text)


def test_first_runs_of_more_sessions_than_there_is_room_for(own_server: MakeServer) -> None:
    """Each sandbox that is idle makes way for who waits, whenever it becomes idle."""
    server = own_server(max_warm="3", weakness="from era.core.pool import pool; pool._PATIENCE = 60.0")
    began = time.monotonic()
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda number: _create_and_run(server, number), range(16)))
    assert answers == [(201, 200, f"{number}\n") for number in range(16)]
    with server.client(base_url=server.own_url) as at_home:
        assert at_home.get("/health").json()["sandboxes"] == {"live": 3, "busy": 0, "ready": 0}
    assert time.monotonic() - began < 120


@pytest.mark.one_host("a host that is full gives sessions to one that isn't")
def test_what_can_t_be_served_is_told_soon(own_server: MakeServer) -> None:
    server = own_server(max_warm="2")
    with server.client() as client:
        for name in "abcde":
            assert client.post("/api/sessions", json={"language": "python", "session_id": name}).status_code == 201
        runs = [client.post(f"/api/sessions/{name}/run", json=SLEEP).json()["run_id"] for name in ("a", "b")]
        began = time.monotonic()
        calls: dict[str, tuple[str, dict[str, Any]]] = {
            "k": ("/api/sessions/c/run", {"code": "print(1)"}),
            "l": ("/api/sessions/d/run", {"code": "print(1)", "background": True}),
            "m": ("/api/sessions/e/stream", {"code": "print(1)"}),
            "": ("/api/execute", {"language": "python", "code": "print(1)"}),
        }

        def call(key: str) -> httpx.Response:
            path, body = calls[key]
            return client.post(path, json=body, headers={"Idempotency-Key": key} if key else {})

        with ThreadPoolExecutor(len(calls)) as callers:
            answers = list(callers.map(call, calls))
        for answer in answers:
            assert (answer.status_code, answer.json()["code"]) == (429, "too_busy"), answer.text
            assert int(answer.headers["Retry-After"]) >= 1
            assert "ERA_MAX_WARM" in answer.json()["hint"]
        assert time.monotonic() - began < 60, "four answers, of which none takes half a minute"
        assert [client.get(f"/api/sessions/{name}").json()["version"] for name in "cde"] == [1, 1, 1]
        assert client.delete(f"/api/sessions/a/runs/{runs[0]}").status_code == 200
        again = client.post("/api/sessions/c/run", json={"code": "print(1)"}, headers={"Idempotency-Key": "k"})
        assert (again.status_code, again.json()["stdout"]) == (200, "1\n"), "its key is free, for nothing has run"


@pytest.mark.one_host("what has no session is run by the host that is asked")
@pytest.mark.parametrize("accept", soak_the_rest(["application/json", "text/event-stream"], 1))
def test_a_run_without_a_session_whose_caller_hangs_up_in_the_queue_never_begins(
    own_server: MakeServer, accept: str
) -> None:
    server = own_server(max_warm="1")
    with server.client() as client, server.client(base_url=server.own_url) as at_home:
        assert client.post("/api/sessions", json={"language": "python", "session_id": "a"}).status_code == 201
        assert client.post("/api/sessions/a/run", json=SLEEP).status_code == 202
        assert eventually(lambda: at_home.get("/health").json()["sandboxes"]["busy"] == 1)
        waits = client.build_request(
            "POST",
            "/api/execute",
            json={"language": "python", "code": "print(1)"},
            headers={"Accept": accept},
            timeout=0.5,
        )
        with pytest.raises(httpx.ReadTimeout):
            client.send(waits)
        (status,) = eventually(lambda: re.findall(r"route=/api/execute .*status=(\d+)", server.log_of_calls))
        assert status == "499", "told to nobody: the queue's own end would be a 429"
        assert "era_sandbox_places_waiting 0.0" in metrics_now(client)
        _end(client)


def _end(client: httpx.Client) -> None:
    assert client.delete("/api/sessions").status_code == 200
