"""Sessions that expire, are deleted, restored or purged, over HTTP."""

from __future__ import annotations

import signal
import sqlite3
import threading
import time
from contextlib import closing
from datetime import datetime
from typing import Any

import httpx

from era.wire.sessions import SessionAnswer
from tests.api.answers import SESSION_KEYS, checked, refused
from tests.conftest import MakeServer, MakeSession, Run, Server, eventually


def gone(client: httpx.Client, where: str, status: str) -> bool:
    """Whether a session is listed with this status, `expired` or `deleted`."""
    listed = client.get(f"/api/sessions?status={status}").json()["sessions"]
    return any(each["id"] == where and each["status"] == status for each in listed)


def wait_until_expired(client: httpx.Client, where: str) -> None:
    assert eventually(lambda: gone(client, where, "expired"))


def test_a_ttl_is_shown_and_changed(client: httpx.Client, session: MakeSession) -> None:
    where = session(ttl=3600)
    body = checked(client.get(f"/api/sessions/{where}"), SessionAnswer, SESSION_KEYS)
    assert body["ttl"] == 3600
    assert 3500 < seconds_left(body) <= 3600
    body = client.patch(f"/api/sessions/{where}", json={"default_timeout": 3}).json()["metadata"]
    assert body["ttl"] == 3600, "left out is left alone"
    body = client.patch(f"/api/sessions/{where}", json={"ttl": 600}).json()["metadata"]
    assert body["ttl"] == 600
    assert 300 < seconds_left(body) <= 600
    body = client.patch(f"/api/sessions/{where}", json={"ttl": None}).json()["metadata"]
    assert (body["ttl"], body["expires_at"]) == (None, None)
    for bad in (0, -1, 1.5, "60", True, 1 << 63, 10**30):
        refused(client.patch(f"/api/sessions/{where}", json={"ttl": bad}), 400, "ttl")
        refused(client.post("/api/sessions", json={"language": "python", "ttl": bad}), 400, "ttl")


def seconds_left(body: dict[str, Any]) -> float:
    """Seconds until a session expires."""
    return datetime.fromisoformat(body["expires_at"]).timestamp() - time.time()


def test_a_session_expires_and_is_restored(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session(ttl=3600, data={"n": 1}, metadata={"who": "me"})
    client.put(f"/api/sessions/{where}/code", json={"code": "print(open('f').read())"})
    run(where, "open('f', 'w').write('kept')")
    before = client.patch(f"/api/sessions/{where}", json={"ttl": 5}).json()["metadata"]
    wait_until_expired(client, where)
    url = f"/api/sessions/{where}"
    calls = [
        client.get(url),
        client.patch(url, json={"data": {}}),
        client.delete(url),
        client.post(f"{url}/run", json={"code": ""}),
        client.post(f"{url}/stream", json={"code": ""}),
        client.post(f"{url}/run", json={"code": ""}, headers={"Idempotency-Key": "k"}),
        client.get(f"{url}/code"),
        client.put(f"{url}/code", json={"code": ""}),
        client.get(f"{url}/runs"),
        client.get(f"{url}/runs/x"),
        client.get(f"{url}/versions"),
        client.get(f"{url}/versions/1"),
        client.get(f"{url}/versions/1/diff"),
        client.post(f"{url}/rollback", json={"version": 1}),
        client.post(f"{url}/duplicate", json={}),
    ]
    for answer in calls:
        assert refused(answer, 410, "restore")["code"] == "expired"
    assert client.get("/api/sessions?metadata.who=me").json()["sessions"] == []
    body = checked(client.post(f"{url}/restore"), SessionAnswer, SESSION_KEYS)
    assert {**body, "expires_at": ""} == {**before, "expires_at": ""}
    assert 0 < seconds_left(body) <= 5
    client.patch(url, json={"ttl": None})
    assert run(where)["stdout"] == "kept\n"
    assert not gone(client, where, "expired")
    assert refused(client.post(f"{url}/restore"), 409)["code"] == "conflict"


def test_a_session_does_not_expire_during_a_run(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session(ttl=5)
    outcome = run(where, "import time; time.sleep(8); open('.session_data.json', 'w').write('{\"n\": 1}')")
    assert outcome["state"]["committed"]
    assert client.get(f"/api/sessions/{where}").json()["data"] == {"n": 1}


def test_a_deleted_session_can_be_restored(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session(data={"n": 1})
    outcome = run(where, "open('f', 'w').write('kept'); print('out')")
    client.delete(f"/api/sessions/{where}")
    assert "restore" in refused(client.get(f"/api/sessions/{where}"), 404, where)["hint"]
    refused(client.delete(f"/api/sessions/{where}"), 404)
    assert gone(client, where, "deleted")
    assert where not in [each["id"] for each in client.get("/api/sessions").json()["sessions"]]
    body = client.post(f"/api/sessions/{where}/restore").json()
    assert (body["status"], body["version"]) == ("idle", 2)
    assert client.get(f"/api/sessions/{where}/runs/{outcome['run_id']}/stdout").text == "out\n"
    assert run(where, "print(open('f').read())")["stdout"] == "kept\n"


def test_a_run_of_a_deleted_session_is_on_record_when_it_is_restored(
    client: httpx.Client, session: MakeSession
) -> None:
    where = session(data={"n": 1})
    code = "open('.session_data.json', 'w').write('{}'); import time; time.sleep(30)"
    answers: list[httpx.Response] = []
    body = {"code": code}
    thread = threading.Thread(target=lambda: answers.append(client.post(f"/api/sessions/{where}/run", json=body)))
    thread.start()
    assert eventually(lambda: client.get(f"/api/sessions/{where}/runs").json()["runs"])
    time.sleep(0.2)
    client.delete(f"/api/sessions/{where}")
    thread.join()
    assert refused(answers[0], 409)["code"] == "session_deleted"
    restored = client.post(f"/api/sessions/{where}/restore").json()
    assert (restored["data"], restored["version"], restored["status"]) == ({"n": 1}, 1, "idle")
    [record] = client.get(f"/api/sessions/{where}/runs").json()["runs"]
    assert record["status"] != "running"
    assert record["state"]["committed"] is False
    assert "deleted" in record["state"]["reason"]


def test_a_purged_session_can_not_be_restored(
    client: httpx.Client, session: MakeSession, shared_server: Server
) -> None:
    where = session(data={"secret": "hunter2"})
    refused(client.delete(f"/api/sessions/{where}?purge=maybe"), 400)
    client.delete(f"/api/sessions/{where}")
    session(session_id=where)
    assert client.delete(f"/api/sessions/{where}?purge=true").json()["success"]
    answer = refused(client.post(f"/api/sessions/{where}/restore"), 404)
    assert "restore" not in answer["hint"]
    assert not gone(client, where, "deleted")
    refused(client.delete(f"/api/sessions/{where}?purge=true"), 404)
    with closing(sqlite3.connect(shared_server.content_dir / "era.sqlite")) as database:
        assert "hunter2" not in "\n".join(database.iterdump())
    # A deleted session can be purged too.
    session(session_id=where)
    client.delete(f"/api/sessions/{where}")
    assert client.delete(f"/api/sessions/{where}?purge=true").status_code == 200
    refused(client.post(f"/api/sessions/{where}/restore"), 404)
    session(session_id=where)
    assert client.delete("/api/sessions?purge=true").json()["deleted_sessions"] == [where]
    refused(client.post(f"/api/sessions/{where}/restore"), 404)


def test_nothing_comes_back_after_the_grace_period(own_server: MakeServer) -> None:
    server = own_server(grace_seconds="1")
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s", "data": {"word": "hunter2"}})
        client.delete("/api/sessions/s")
        time.sleep(1.1)
        refused(client.post("/api/sessions/s/restore"), 404)
        assert client.get("/api/sessions?status=deleted").json()["count"] == 0

        def rows() -> int:
            with closing(sqlite3.connect(server.content_dir / "era.sqlite")) as database:
                return sum(
                    database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
                    for table in ("sessions", "versions")
                )

        assert eventually(lambda: rows() == 0)


def test_expiry_is_caught_up_after_a_restart(own_server: MakeServer) -> None:
    server = own_server()
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "short", "ttl": 1})
        client.post("/api/sessions", json={"language": "python", "session_id": "long", "ttl": 3600})
        client.post("/api/sessions", json={"language": "python", "session_id": "deleted"})
        client.delete("/api/sessions/deleted")
    server.stop(signal.SIGKILL)
    time.sleep(1.2)
    server.start()
    with server.client() as client:
        assert refused(client.get("/api/sessions/short"), 410)["code"] == "expired"
        assert client.get("/api/sessions/long").status_code == 200
        for where in ("short", "deleted"):
            assert client.post(f"/api/sessions/{where}/restore").status_code == 200
