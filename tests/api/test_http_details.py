"""Details of HTTP and of the schema: statuses, integers, Allow, fields of answers."""

from __future__ import annotations

import json
from typing import Any

import httpx

from tests.api.answers import refused, run_record, send_json
from tests.conftest import MakeSession, Server
from tests.table import table


@table("length", [65_500, 65_536, 66_000, 200_000])
def test_a_long_query_is_431(server: Server, length: int) -> None:
    head = b"GET /health?_=" + b"x" * length + b" HTTP/1.1\r\nHost: SELF\r\nConnection: close\r\n\r\n"
    answer = server.exchange(head)
    status = b"200" if length == 65_500 else b"431"
    assert answer.startswith(b"HTTP/1.1 " + status), answer[:300]


def test_every_route_documents_431(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    without = [
        path
        for path, item in paths.items()
        for operation in item.values()
        if path.startswith("/api/") and "431" not in operation["responses"]
    ]
    assert without == []


def test_a_float_without_a_fraction_is_an_integer(client: httpx.Client, session: MakeSession) -> None:
    body = b'{"language": "python", "ttl": 60.0, "limits": {"pids": 32.0}, "data": {"f": 3.0, "i": 3}}'
    answer = send_json(client, "POST", "/api/sessions", body)
    assert answer.status_code == 201, answer.text
    made = answer.json()
    where = made["id"]
    assert (type(made["ttl"]), type(made["limits"]["pids"])) == (int, int)
    assert '{"f":3.0,"i":3}' in answer.text, "numbers of data come back as they were sent"
    rolled = send_json(client, "POST", f"/api/sessions/{where}/rollback", b'{"version": 1.0}')
    assert rolled.is_success, rolled.text
    for field in ('"ttl": 60.5', '"ttl": "60"', '"ttl": true', '"limits": {"pids": 32.5}', '"ttl": 1e400'):
        refused(send_json(client, "PATCH", f"/api/sessions/{where}", "{" + field + "}"), 400)


def test_bounds_that_the_code_checks_are_in_the_schema(client: httpx.Client) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]

    def constraints(body: str, field: str) -> str:
        return json.dumps(schemas[body]["properties"][field])

    for body in ("RunBody", "ExecuteBody", "CodeBody"):
        assert '"maxLength": 4194304' in constraints(body, "code")
    for body in ("RunBody", "ExecuteBody", "StartProcess"):
        env: dict[str, Any] = schemas[body]["properties"]["env"]
        assert env["propertyNames"]["pattern"] == r"^[^=\u0000]+$"
        assert env["additionalProperties"]["maxLength"] == 131072
    for body in ("CreateSession", "ChangeSession"):
        assert '"maxProperties": 1000' in constraints(body, "metadata")


def test_patch_shows_the_session_under_both_names(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    changed = client.patch(f"/api/sessions/{where}", json={"metadata": {"a": "b"}}).json()
    assert changed["session"] == changed["metadata"] == client.get(f"/api/sessions/{where}").json()


def test_runs_have_their_duration_as_a_number(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    outcome = client.post(f"/api/sessions/{where}/run", json={"code": "import time; time.sleep(0.05)"}).json()
    once = client.post("/api/execute", json={"language": "python", "code": ""}).json()
    record = run_record(client, where, outcome["run_id"])
    for each in (outcome, once, record):
        assert each["duration"] == f"{each['duration_ms'] / 1000:.3f}s"
    assert outcome["duration_ms"] >= 50


def test_a_run_under_way_has_nulls_in_its_record(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    run = {"code": "import time; time.sleep(600)", "background": True}
    name = client.post(f"/api/sessions/{where}/run", json=run).json()["run_id"]
    record = run_record(client, where, name)
    assert [record[field] for field in ("ended_at", "duration", "duration_ms", "exit_code")] == [None] * 4
    assert client.delete(f"/api/sessions/{where}/runs/{name}").is_success
