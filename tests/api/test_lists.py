"""Lists that show what was asked for: the runs of all sessions, and sessions with some of their fields."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import httpx
import jsonschema_rs

from tests.api.answers import refused
from tests.api.owners import Owners
from tests.conftest import MakeSession, Run
from tests.table import table


def test_runs_of_all_sessions_newest_first(client: httpx.Client, session: MakeSession, run: Run) -> None:
    one, two = session(), session()
    begun = datetime.now(UTC) - timedelta(seconds=1)
    ids = [run(where, f"raise SystemExit({n % 2})")["run_id"] for n, where in enumerate([one, two, two, one, two])]
    since = f"since={begun.isoformat().replace('+', '%2B')}"

    def listed(query: str) -> list[str]:
        answer = client.get(f"/api/runs?{query}")
        assert answer.status_code == 200, answer.text
        assert answer.json()["count"] == len(answer.json()["runs"])
        return [record["run_id"] for record in answer.json()["runs"] if record["run_id"] in ids]

    assert listed("") == listed(since) == ids[::-1]
    assert listed(f"session={two}") == [ids[4], ids[2], ids[1]]
    assert listed(f"session={one}&status=failed&{since}") == [ids[3]]
    assert listed(f"session={one}&status=running") == []
    assert listed("since=2999-01-01T00:00:00Z") == []
    assert listed(f"since={begun.isoformat()}") == ids[::-1], "a plus that nobody escaped"
    record = client.get(f"/api/runs?session={one}&limit=1").json()["runs"][0]
    assert record == client.get(f"/api/sessions/{one}/runs/{ids[3]}").json()
    pages: list[str] = []
    query: str | None = f"/api/runs?limit=2&{since}"
    while query is not None:
        page = client.get(query).json()
        pages += [record["run_id"] for record in page["runs"]]
        query = page["next_cursor"] and f"/api/runs?limit=2&{since}&cursor={page['next_cursor']}"
    assert pages == ids[::-1]
    client.delete(f"/api/sessions/{one}?purge=true")
    assert listed("") == [ids[4], ids[2], ids[1]]
    refused(client.get(f"/api/runs?session={one}"), 404)


@table(
    "query, word",
    [
        ("status=good", "'status'"),
        ("since=yesterday", "'since'"),
        ("since=2026-01-31", "'since'"),
        ("since=2026-01-31T12:00:00", "'since'"),
        ("since=", "'since'"),
        ("limit=0", "'limit'"),
        ("limit=1001", "'limit'"),
        ("cursor=x", "'cursor'"),
        ("sesion=x", "'sesion'"),
    ],
)
def test_bad_values_of_the_list_of_runs_are_refused(client: httpx.Client, query: str, word: str) -> None:
    refused(client.get(f"/api/runs?{query}"), 400, word)


def test_runs_of_somebody_else_are_not_listed(owners: Owners) -> None:
    theirs = owners.ada.post("/api/sessions", json={"language": "python"}).json()["id"]
    owners.ada.post(f"/api/sessions/{theirs}/run", json={"code": "pass"}).raise_for_status()
    assert theirs in {record["session_id"] for record in owners.ada.get("/api/runs").json()["runs"]}
    assert theirs not in {record["session_id"] for record in owners.mallory.get("/api/runs").json()["runs"]}
    refused(owners.mallory.get(f"/api/runs?session={theirs}"), 404)


def test_sessions_show_the_fields_that_were_asked_for(client: httpx.Client, session: MakeSession) -> None:
    where = session(data={"n": 1}, metadata={"list": "fields"})
    path = "/api/sessions?metadata.list=fields"
    [whole] = client.get(path).json()["sessions"]
    assert client.get(f"{path}&fields=id,version").json()["sessions"] == [{"id": where, "version": 1}]
    assert client.get(f"{path}&fields=id,status&status=idle").json()["sessions"] == [{"id": where, "status": "idle"}]
    assert client.get(f"{path}&fields=id&status=running").json()["sessions"] == []
    document = client.get("/openapi.json").json()
    described = document["paths"]["/api/sessions"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    described = jsonschema_rs.Draft202012Validator({**described, "components": document["components"]})
    for query in ("fields=id,version", "data=false", "limit=1"):
        described.validate(client.get(f"{path}&{query}").json())
    [without] = client.get(f"{path}&data=false").json()["sessions"]
    assert without == {name: value for name, value in whole.items() if name != "data"}
    for bad in ("ids", "id,", "", "id,,data"):
        refused(client.get(f"{path}&fields={bad}"), 400, "'fields'")
    refused(client.get(f"{path}&data=no-thanks"), 400, "'data'")
