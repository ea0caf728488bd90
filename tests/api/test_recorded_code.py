"""The code or command that ran, in the records of runs."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.api.answers import refused
from tests.api.guest_servers import HTTP_SERVER
from tests.api.test_inbox import store
from tests.api.test_service import put, runs
from tests.conftest import MakeServer, MakeSession, Server
from tests.table import table

FIELDS = ("code", "command", "args", "code_truncated")
NOTHING: tuple[Any, ...] = (None, None, [], False)


def recorded(record: dict[str, Any]) -> tuple[Any, ...]:
    """The fields of a record that say what ran."""
    return tuple(record[name] for name in FIELDS)


def post_run(client: httpx.Client, where: str, **body: Any) -> tuple[Any, ...]:
    """Run something; returns what its record says of it."""
    answer = client.post(f"/api/sessions/{where}/run", json=body)
    assert answer.status_code == 200, answer.text
    return recorded(client.get(f"/api/sessions/{where}/runs/{answer.json()['run_id']}").json())


@pytest.fixture
def storing(client: httpx.Client, session: MakeSession) -> MakeSession:
    """Makes a session that stores code; returns its id."""

    def make(code: str = "print('stored')", **fields: Any) -> str:
        where = session(**fields)
        store(client, where, code)
        return where

    return make


def database(server: Server) -> bytes:
    """The content of the server's database."""
    return b"".join(path.read_bytes() for path in server.content_dir.glob("era.sqlite*"))


WAYS_TO_RUN: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "code": ({"code": "print('ü')"}, ("print('ü')", None, [], False)),
    "code with arguments": ({"code": "print(1)", "args": ["-v", ""]}, ("print(1)", None, ["-v", ""], False)),
    "no code": ({"code": ""}, ("", None, [], False)),
    "command line": ({"command": "echo 1 | cat"}, (None, "echo 1 | cat", [], False)),
    "words of a command": ({"command": ["echo", "a b"]}, (None, ["echo", "a b"], [], False)),
    "command that is missing": ({"command": ["no-such-command"]}, (None, ["no-such-command"], [], False)),
    "stored code": ({}, ("print('stored')", None, [], False)),
    "stored code with arguments": ({"args": ["x"]}, ("print('stored')", None, ["x"], False)),
    "cell of a context": ({"code": "1 + 1", "context": "main"}, ("1 + 1", None, [], False)),
    "code with a NUL": ({"code": "# a\0b"}, ("# a\N{REPLACEMENT CHARACTER}b", None, [], False)),
}


@table("way", WAYS_TO_RUN)
def test_the_record_has_what_a_call_ran(way: str, client: httpx.Client, storing: MakeSession) -> None:
    body, expected = WAYS_TO_RUN[way]
    where = storing(code="print('stored')")
    assert post_run(client, where, **body) == expected
    assert recorded(runs(client, where)[0]) == expected
    assert recorded(client.get("/api/runs", params={"session": where}).json()["runs"][0]) == expected


@table("service", ["exec python3 app.py", ["python3", "app.py"]])
def test_the_record_of_a_service_has_its_command(
    service: str | list[str], client: httpx.Client, session: MakeSession
) -> None:
    where = session(service=service)
    put(client, where, HTTP_SERVER)
    assert client.get(f"/proxy/{where}/4321/").status_code == 200
    assert [recorded(record) for record in runs(client, where)] == [(None, service, [], False)]


# -- bounds -----------------------------------------------------------------------------------------------------------


# -- record_code: false -----------------------------------------------------------------------------------------------


@table("way", ["code with arguments", "command line", "stored code", "cell of a context"])
def test_a_run_with_record_code_false_leaves_nothing_of_what_ran(
    way: str, client: httpx.Client, storing: MakeSession
) -> None:
    where = storing(code="print('stored')")
    body = WAYS_TO_RUN[way][0]
    assert post_run(client, where, record_code=False, **body) == NOTHING
    assert post_run(client, where, record_code=True, **body) != NOTHING
    assert [record["code_truncated"] for record in runs(client, where)] == [False, False]


def test_code_that_is_not_to_be_recorded_is_in_no_row(own_server: MakeServer) -> None:
    server = own_server()
    with server.client() as client:
        for name, fields in (("of-a-session", {"record_code": False}), ("of-runs", {})):
            body = {"language": "python", "session_id": name, **fields}
            assert client.post("/api/sessions", json=body).status_code == 201
            way: dict[str, Any] = {} if fields else {"record_code": False}
            for key, more in (("1", {"code": "print('canary-', 1)"}), ("2", {"command": "echo canary- 2"})):
                answer = client.post(
                    f"/api/sessions/{name}/run", json={**way, **more}, headers={"Idempotency-Key": key}
                )
                assert answer.json()["stdout"] == f"canary- {key}\n"
        rows = database(server)
        assert b"of-runs" in rows
        assert b"print('canary-" not in rows
        assert b"echo canary-" not in rows
        client.post("/api/sessions/of-runs/run", json={"code": "# canary-of-the-test"})
        assert b"canary-of-the-test" in database(server)


def test_record_code_of_session_is_changed_and_copied(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    assert client.get(f"/api/sessions/{where}").json()["record_code"] is True
    assert post_run(client, where, code="1")[0] == "1"
    changed = client.patch(f"/api/sessions/{where}", json={"record_code": False}).json()
    assert changed["session"]["record_code"] is False
    assert post_run(client, where, code="2") == post_run(client, where, code="3", record_code=True) == NOTHING
    assert [record["code"] for record in runs(client, where)] == [None, None, "1"]
    copy = client.post(f"/api/sessions/{where}/duplicate", json={}).json()
    assert copy["record_code"] is False
    assert post_run(client, copy["id"], code="4") == NOTHING
    client.patch(f"/api/sessions/{where}", json={"record_code": True})
    assert post_run(client, where, code="5")[0] == "5"
    assert post_run(client, copy["id"], code="6") == NOTHING
    made = session(record_code=False)
    assert client.get(f"/api/sessions/{made}").json()["record_code"] is False
    assert post_run(client, made, command="true") == NOTHING


@table("bad", ["no", 0, None])
def test_record_code_is_true_or_false(bad: Any, client: httpx.Client, session: MakeSession) -> None:
    where = session()
    refused(client.post(f"/api/sessions/{where}/run", json={"code": "", "record_code": bad}), 400, "record_code")
    refused(client.post("/api/sessions", json={"language": "python", "record_code": bad}), 400, "record_code")
    assert runs(client, where) == []


# -- what is never recorded -------------------------------------------------------------------------------------------


def test_env_secrets_and_input_are_never_recorded(own_server: MakeServer) -> None:
    server = own_server()
    never: dict[str, Any] = {
        "env": {"VARIABLE": "canary-of-env"},
        "secrets": {"SECRET": {"value": "canary-of-secrets", "hosts": ["example.org"]}},
        "stdin": "canary-of-stdin",
    }
    code = "import os, sys; print(len(sys.stdin.read()), len(os.environ['VARIABLE']), 'SECRET' in os.environ)"
    ways: list[dict[str, Any]] = [
        {"code": code, "args": ["--flag"]},
        {"command": "wc -c > /dev/null; echo ${#VARIABLE}"},
        {},
    ]
    with server.client() as client:
        assert client.post("/api/sessions", json={"language": "python", "session_id": "s"}).status_code == 201
        assert client.put("/api/sessions/s/code", json={"code": code}).status_code == 200
        for way in ways:
            answer = client.post("/api/sessions/s/run", json={**way, **never})
            assert answer.json()["status"] == "ok", answer.text
            assert "13" in answer.json()["stdout"]
            record = client.get(f"/api/sessions/s/runs/{answer.json()['run_id']}")
            assert record.json()["code"] == (None if "command" in way else code)
            assert "canary" not in record.text
        assert "canary" not in client.get("/api/sessions/s/runs").text
        assert "canary" not in client.get("/api/runs").text
        capsule = client.get("/api/sessions/s/capsule").content
    assert b"os.environ" in capsule
    assert b"canary" not in capsule
    assert b"canary" not in database(server)
    assert "canary" not in server.log
    assert "os.environ" not in server.log
