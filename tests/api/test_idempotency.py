"""Idempotency keys over HTTP: a request that is repeated with its key is carried out once."""

from __future__ import annotations

import signal
import sqlite3
import threading
from contextlib import closing
from typing import Any

import httpx

from tests.api.answers import refused
from tests.conftest import MakeServer, MakeSession, built_with, eventually

COUNT = """
import json, os, sys
n = len(open('log').readlines()) if os.path.exists('log') else 0
open('log', 'a').write('x\\n')
json.dump({'n': n + 1}, open('.session_data.json', 'w'))
print('run', n, os.environ.get('SECRET', ''))
print('error', file=sys.stderr)
"""


def post(client: httpx.Client, path: str, key: str, body: Any) -> httpx.Response:
    """POST with an idempotency key."""
    return client.post(path, json=body, headers={"Idempotency-Key": key})


def assert_replayed(first: httpx.Response, again: httpx.Response) -> None:
    """Assert that `again` replays `first`."""
    assert "idempotent-replay" not in first.headers
    assert again.headers["idempotent-replay"] == "true"
    assert (again.status_code, again.content) == (first.status_code, first.content)


def test_a_repeated_run_request_runs_once(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    client.put(f"/api/sessions/{where}/code", json={"code": "stored"})
    url = f"/api/sessions/{where}/run"
    body = {"code": COUNT, "env": {"SECRET": "hunter2"}}
    first = post(client, url, "k1", body)
    assert (first.status_code, first.json()["stdout"]) == (200, "run 0 hunter2\n")
    other = client.post(url, json=body).json()
    assert other["data"]["n"] == 2
    client.put(f"/api/sessions/{where}/code", json={"code": "other"})
    assert_replayed(first, post(client, url, "k1", body))
    assert_replayed(first, post(client, url, "k1", dict(reversed(body.items()))))
    assert client.get(f"/api/sessions/{where}").json()["version"] == 3
    assert post(client, url, "k2", body).json()["stdout"] == "run 2 hunter2\n"


def test_another_request_with_the_key_is_refused(client: httpx.Client, session: MakeSession) -> None:
    where, other = session(), session()
    url = f"/api/sessions/{where}/run"
    post(client, url, "k", {"code": "print(1)", "env": {"A": "1"}})
    bodies: list[dict[str, Any]] = [
        {"code": "print(2)", "env": {"A": "1"}},
        {"code": "print(1)", "env": {"A": "2"}},
        {"code": "print(1)"},
        {"code": "print(1)", "env": {"A": "1"}, "timeout": 3},
        {"code": "print(1)", "env": {"A": "1"}, "atomic": True},
        {"env": {"A": "1"}, "code": ""},
    ]
    for body in bodies:
        assert refused(post(client, url, "k", body), 409, "'k'")["code"] == "idempotency_mismatch"
    # The same key in another session or route is another key.
    assert post(client, f"/api/sessions/{other}/run", "k", {"code": "print(2)"}).json()["stdout"] == "2\n"
    assert post(client, f"/api/sessions/{where}/duplicate", "k", {}).status_code == 201


def test_a_repeated_create_request_makes_one_session(client: httpx.Client) -> None:
    body = {"language": "python", "data": {"n": 1}, "metadata": {"made": "once"}}
    first = post(client, "/api/sessions", "make", body)
    client.patch(f"/api/sessions/{first.json()['id']}", json={"data": {"n": 2}})
    assert_replayed(first, post(client, "/api/sessions", "make", body))
    refused(post(client, "/api/sessions", "make", {**body, "data": {}}), 409)
    assert client.get("/api/sessions?metadata.made=once").json()["count"] == 1
    url = f"/api/sessions/{first.json()['id']}/duplicate"
    copied = post(client, url, "copy", {})
    assert_replayed(copied, post(client, url, "copy", {}))
    refused(post(client, url, "copy", {"data": {}}), 409)
    assert client.get("/api/sessions?metadata.made=once").json()["count"] == 2


def test_which_idempotency_keys_are_valid(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    for key in ("k", "~ " + "x" * 253, "a\"b'c;--"):
        assert post(client, f"/api/sessions/{where}/run", key, {"code": ""}).status_code == 200
    bad: list[Any] = [b"", b"x" * 256, "ü".encode(), b"a\tb"]
    for raw in bad:
        for path in (f"/api/sessions/{where}/run", "/api/sessions", f"/api/sessions/{where}/duplicate"):
            body = {"language": "python"} if path == "/api/sessions" else {}
            answer = client.post(path, json=body, headers={b"Idempotency-Key": raw})
            assert refused(answer, 400, "Idempotency-Key")["code"] == "bad_key"
    two = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    refused(client.post(f"/api/sessions/{where}/run", json={"code": ""}, headers=two), 400)


def test_answers_outlive_a_kill(own_server: MakeServer) -> None:
    server = own_server(outputs_kept="0", versions_kept="1")
    long = {"code": "import time; print('begun', flush=True); time.sleep(60)", "env": {"SECRET": "hunter2"}}
    with server.client() as client:
        created = post(client, "/api/sessions", "k", {"language": "python", "session_id": "s"})
        first = post(client, "/api/sessions/s/run", "k", {"code": COUNT + "print('x' * 30000)"})
        client.post("/api/sessions/s/run", json={"code": COUNT})
        thread = threading.Thread(target=_until_hangup, args=(server.url, long))
        thread.start()
        runs = eventually(lambda: [run for run in _runs(client) if run["status"] == "running"])
    server.stop(signal.SIGKILL)
    thread.join()
    with closing(sqlite3.connect(server.content_dir / "era.sqlite")) as database:
        assert "hunter2" not in "\n".join(database.iterdump())
    server.start()
    with server.client() as client:
        assert_replayed(created, post(client, "/api/sessions", "k", {"language": "python", "session_id": "s"}))
        assert_replayed(first, post(client, "/api/sessions/s/run", "k", {"code": COUNT + "print('x' * 30000)"}))
        lost = refused(post(client, "/api/sessions/s/run", "long", long), 409, runs[0]["run_id"])
        assert lost["code"] == "run_lost"
        assert len(_runs(client)) == 3
        # Its env is forgotten after the restart, so another env is the same request now; other differences still count.
        refused(post(client, "/api/sessions/s/run", "long", {"code": long["code"]}), 409, "stopped")
        assert refused(post(client, "/api/sessions/s/run", "long", {"code": ""}), 409)["code"] == "idempotency_mismatch"


def test_old_answers_go_where_a_session_s_take_too_much(own_server: MakeServer) -> None:
    server = own_server(weakness=built_with("era.server.bounds.Retention", answer_bytes=1 << 20), outputs_kept="1")
    noise = "import random; print(random.Random({0}).randbytes(600_000).hex())"
    bodies = [{"code": f"{COUNT}\n{noise.format(number)}"} for number in range(3)]
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
        answers = [post(client, "/api/sessions/s/run", f"k{number}", body) for number, body in enumerate(bodies)]
        gone = refused(post(client, "/api/sessions/s/run", "k0", bodies[0]), 409, answers[0].json()["run_id"])
        assert gone["code"] == "answer_gone"
        assert "1 GiB" in gone["hint"]
        refused(post(client, "/api/sessions/s/run", "k0", bodies[1]), 409)  # still another request
        assert refused(post(client, "/api/sessions/s/run", "k1", bodies[1]), 409)["code"] == "answer_gone"
        assert_replayed(answers[2], post(client, "/api/sessions/s/run", "k2", bodies[2]))
        assert len(_runs(client)) == 3
        assert all(run["status"] == "ok" for run in _runs(client))


def _runs(client: httpx.Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get("/api/sessions/s/runs").json()["runs"]
    return found


def _until_hangup(url: str, body: dict[str, Any]) -> None:
    """Run until the service is killed."""
    try:
        httpx.post(f"{url}/api/sessions/s/run", json=body, headers={"Idempotency-Key": "long"}, timeout=60)
    except httpx.TransportError:
        return
