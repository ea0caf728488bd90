"""Lists that show what was asked for: the runs of all sessions, and sessions with some of their fields."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import httpx
import jsonschema_rs
import pytest

from tests.api.answers import refused
from tests.api.live import start
from tests.api.owners import Owners, client_with_key, new_key
from tests.conftest import MakeServer, MakeSession, Run
from tests.soaking import soak_the_rest


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


@pytest.mark.parametrize(
    ("query", "word"),
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


SHORT_PAGES = """
from era.api import sessions as listed
from era.core import sessions
listed._LISTED_AT_ONCE = 10
sessions._DELETED_AT_ONCE = 20
"""


@pytest.mark.parametrize("count", soak_the_rest([24, 600], 1))
def test_a_list_of_all_and_their_end_are_whole_however_many_there_are(own_server: MakeServer, count: int) -> None:
    """They are looked up and told page by page: few on short pages, many on those that there are."""
    with own_server(weakness=SHORT_PAGES if count == 24 else "").client() as client:
        names = [f"all-{number:04}" for number in range(count)]
        for number, name in enumerate(names):
            body = {"session_id": name, "language": "python", "metadata": {"part": str(number % 3)}}
            assert client.post("/api/sessions", json=body).status_code == 201
        listed = client.get("/api/sessions").json()
        assert [each["id"] for each in listed["sessions"]] == names[::-1]
        assert (listed["count"], listed["next_cursor"]) == (count, None)
        assert listed["sessions"][7] == client.get(f"/api/sessions/{names[-8]}").json() | {"data": {}}
        few = client.get("/api/sessions?metadata.part=1&fields=id").json()
        assert few["sessions"] == [{"id": name} for name in names[::-1][1::3]]
        assert client.get("/api/sessions?status=running").json() == {"sessions": [], "count": 0, "next_cursor": None}
        page = client.get(f"/api/sessions?limit={count - 1}").json()
        rest = client.get("/api/sessions", params={"cursor": page["next_cursor"]}).json()
        assert [each["id"] for each in rest["sessions"]] == names[:1]
        gone = client.request("DELETE", "/api/sessions?purge=true").json()
        assert (sorted(gone["deleted_sessions"]), gone["deleted_count"]) == (names, count)
        assert client.get("/api/sessions").json() == {"sessions": [], "count": 0, "next_cursor": None}


def test_lists_of_large_sessions_are_whole(owners: Owners) -> None:
    """They are read, parsed and told a few at a time: 250 of them at once took gigabytes, and kept others waiting."""
    with client_with_key(owners.server, new_key(owners.server, "large-lister")["key"]) as client:
        names = [f"large-{number}" for number in range(7)]
        for name in names:
            body = {"session_id": name, "language": "python", "data": {"text": name * 80_000}}
            assert client.post("/api/sessions", json=body).status_code == 201
        listed = client.get("/api/sessions").json()
        assert [each["id"] for each in listed["sessions"]] == names[::-1]
        assert [each["data"]["text"] for each in listed["sessions"]] == [name * 80_000 for name in names[::-1]]
        pages = []
        cursor: str | None = ""
        while cursor is not None:
            page = client.get(f"/api/sessions?limit=3&fields=id{cursor and '&cursor='}{cursor}").json()
            assert page["count"] == len(page["sessions"])
            pages.append([each["id"] for each in page["sessions"]])
            cursor = page["next_cursor"]
        assert pages == [names[:3:-1], names[3:0:-1], names[:1]]
        assert client.request("DELETE", "/api/sessions?purge=true").json()["deleted_count"] == 7


def test_pages_of_sessions_by_status_are_full(client: httpx.Client, session: MakeSession) -> None:
    """Filtered first, then paged: a page is short only where the list ends."""
    ids = [session(metadata={"of": "pages"}) for _ in range(6)][::-1]
    live = [ids[2], ids[5]]
    for where in live:
        start(client, where, "sleep 600")

    def pages(query: str) -> list[list[str]]:
        found, cursor = [], ""
        while True:
            answer = client.get(f"/api/sessions?{query}&metadata.of=pages{cursor}").json()
            found.append([each["id"] for each in answer["sessions"]])
            if answer["next_cursor"] is None:
                return found
            cursor = f"&cursor={answer['next_cursor']}"

    assert pages("status=live&limit=1") == [[ids[2]], [ids[5]]]
    assert pages("status=live") == [live]
    assert pages("status=idle&limit=2") == [[ids[0], ids[1]], [ids[3], ids[4]]]
    assert pages("status=running&limit=1") == [[]]
    first = client.get("/api/sessions?status=live&limit=1&language=python").json()
    assert [each["id"] for each in first["sessions"]] == [ids[2]]
    deleted = client.delete("/api/sessions?status=live&metadata.of=pages").json()["deleted_sessions"]
    assert sorted(deleted) == sorted(live)
