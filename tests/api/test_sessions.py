"""Sessions over HTTP: creating, reading, listing, changing and deleting, each answer to the letter."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from era.wire.sessions import ChangedAnswer, DeletedAllAnswer, DeletedAnswer, SessionAnswer, SessionsAnswer
from tests.api.answers import SESSION_KEYS, assert_recent, checked, refused
from tests.api.told import WAITS, tell
from tests.conftest import MakeSession, Run, eventually
from tests.table import table


def test_a_session_created_with_nothing_but_a_language_has_the_defaults(client: httpx.Client) -> None:
    body = checked(client.post("/api/sessions", json={"language": "python"}), SessionAnswer, SESSION_KEYS, status=201)
    assert re.fullmatch(r"sess_\d{13}_[a-z0-9]{9}", body["id"])
    assert_recent(body["created_at"])
    assert {key: value for key, value in body.items() if key not in ("id", "session_id", "created_at")} == {
        "last_run_at": "",
        "language": "python",
        "persistent": True,
        "file_count": 0,
        "total_size_bytes": 0,
        "metadata": {},
        "data": {},
        "setup": None,
        "allowInternetAccess": True,
        "allowPublicAccess": True,
        "default_timeout": 30,
        "version": 1,
        "ttl": None,
        "expires_at": None,
        "limits": {
            "memory_mb": 512,
            "cpus": 1.0,
            "pids": 256,
            "disk_mb": 4096,
            "files": 200_000,
            "output_bytes": 10 << 20,
        },
        "isolation": "auto",
        "egress": {"allow": []},
        "service": None,
        "storage": True,
        "record_code": True,
        "status": "idle",
        "processes": 0,
    }
    assert body["session_id"] == body["id"]
    assert checked(client.get(f"/api/sessions/{body['id']}"), SessionAnswer, SESSION_KEYS) == body


def test_a_session_created_with_everything_gives_it_back(client: httpx.Client) -> None:
    fields = {
        "language": "typescript",
        "session_id": "All_of-it:1",
        "persistent": False,
        "data": {"a": [1, 2.5, None, True, "ü😀"]},
        "metadata": {"b": {"c": "d"}},
        "allowInternetAccess": False,
        "allowPublicAccess": False,
        "default_timeout": 2.5,
        "egress": {"allow": ["api.example.com", "*.example.org", "203.0.113.0/24", "2001:db8::1"]},
    }
    body = checked(client.post("/api/sessions", json={**fields, "setup": None}), SessionAnswer, SESSION_KEYS, 201)
    assert {key: body[key] for key in fields} == fields
    refused(client.post("/api/sessions", json=fields), 409, "All_of-it:1", "exists")
    assert body == client.get("/api/sessions/All_of-it:1").json()


@table(
    "alias, language",
    [
        ("python", "python"),
        ("py", "python"),
        ("node", "node"),
        ("javascript", "node"),
        ("js", "node"),
        ("nodejs", "node"),
        ("typescript", "typescript"),
        ("ts", "typescript"),
    ],
)
def test_languages_have_aliases(client: httpx.Client, alias: str, language: str) -> None:
    assert client.post("/api/sessions", json={"language": alias}).json()["language"] == language


def test_a_run_shows_in_the_session(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    run(where, "import os; os.mkdir('d'); open('d/a.txt', 'w').write('12345'); open('ü', 'w').write('67')")
    body = checked(client.get(f"/api/sessions/{where}"), SessionAnswer, SESSION_KEYS)
    assert_recent(body["last_run_at"])
    assert body["last_run_at"] >= body["created_at"]
    assert (body["file_count"], body["total_size_bytes"], body["version"]) == (2, 7, 2)
    listed = checked(client.get(f"/api/sessions/{where}?include=files"), SessionAnswer, SESSION_KEYS | {"files"})
    assert [(file["path"], file["size"], file["uploaded"]) for file in listed["files"]] == [
        ("d/a.txt", 5, False),
        ("ü", 2, False),
    ]
    for file in listed["files"]:
        assert file.keys() - {"link"} == {"path", "size", "modified_at", "uploaded", "etag", "type", "mode"}
        assert_recent(file["modified_at"])


def test_labels_have_a_bound(client: httpx.Client, session: MakeSession) -> None:
    """Each is a row: while 100,000 were written the runs of all other sessions waited for seven seconds."""
    most = {str(number): number for number in range(1000)}
    where = session(metadata=most)
    assert client.get("/api/sessions?metadata.999=999&fields=id").json()["sessions"] == [{"id": where}]
    for answer in (
        client.post("/api/sessions", json={"language": "python", "metadata": {**most, "more": 1}}),
        client.patch(f"/api/sessions/{where}", json={"metadata": {**most, "more": 1}}),
    ):
        refused(answer, 413, "1001 labels")


def test_the_list_is_newest_first_and_comes_in_pages(client: httpx.Client, session: MakeSession) -> None:
    ids = [session(session_id=f"page-{number}") for number in range(7)]
    whole = checked(client.get("/api/sessions"), SessionsAnswer, {"sessions", "count", "next_cursor"})
    assert [item["id"] for item in whole["sessions"]] == ids[::-1]
    assert (whole["count"], whole["next_cursor"]) == (7, None)
    assert all(item.keys() == SESSION_KEYS for item in whole["sessions"])
    pages: list[list[str]] = []
    cursor = None
    while cursor is not None or not pages:
        page = client.get("/api/sessions", params={"limit": 3, **({"cursor": cursor} if cursor else {})}).json()
        assert page["count"] == len(page["sessions"])
        pages.append([item["id"] for item in page["sessions"]])
        cursor = page["next_cursor"]
        session()  # sessions made meanwhile do not shift the pages
    assert pages == [ids[6:3:-1], ids[3:0:-1], ids[:1]]


@table(
    "query, expected",
    [
        ("language=node", ["c"]),
        ("language=js", ["c"]),
        ("metadata.team=red", ["d", "a"]),
        ("metadata.team=red&metadata.stage=live", ["d"]),
        ("metadata.dotted.key=1", ["b"]),
        ("metadata.team=red&language=python&limit=1", ["d"]),
        ("metadata.team=re", []),
        ("metadata.none=red", []),
        ("metadata.%00=%27%22%25", []),
        ("status=idle&language=node", ["c"]),
        ("status=running", []),
    ],
)
def test_the_list_can_be_filtered(client: httpx.Client, session: MakeSession, query: str, expected: list[str]) -> None:
    if client.get("/api/sessions").json()["count"] == 0:
        session(session_id="a", metadata={"team": "red"})
        session(session_id="b", metadata={"team": "blue", "dotted.key": "1"})
        session("node", session_id="c", metadata={})
        session(session_id="d", metadata={"team": "red", "stage": "live"})
    assert [item["id"] for item in client.get(f"/api/sessions?{query}").json()["sessions"]] == expected


def test_a_session_is_running_while_it_runs(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where, other = session(), session()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, where, WAITS, timeout=120)
        assert eventually(lambda: client.get(f"/api/sessions/{where}").json()["status"] == "running")
        ids = [item["id"] for item in client.get("/api/sessions?status=running").json()["sessions"]]
        idle = [item["id"] for item in client.get("/api/sessions?status=idle").json()["sessions"]]
        assert (ids, idle) == ([where], [other])
        tell(client)
        running.result()
    assert client.get(f"/api/sessions/{where}").json()["status"] == "idle"


@table(
    "change, version",
    [
        ({}, 1),
        ({"default_timeout": 0.5}, 1),
        ({"default_timeout": 7}, 1),
        ({"allowInternetAccess": False}, 1),
        ({"allowPublicAccess": False}, 1),
        ({"metadata": {"new": 1}}, 1),
        ({"metadata": {}}, 1),
        ({"data": {"new": [1]}}, 2),
        ({"data": {}, "metadata": {"x": "y"}, "default_timeout": 9.5}, 2),
    ],
)
def test_patch_replaces_what_it_names_and_nothing_else(
    client: httpx.Client, session: MakeSession, run: Run, change: dict[str, Any], version: int
) -> None:
    where = session(data={"old": 1}, metadata={"m": 1})
    before = client.get(f"/api/sessions/{where}").json()
    answer = client.patch(f"/api/sessions/{where}", json=change)
    body = checked(answer, ChangedAnswer, {"success", "id", "session", "metadata", "updated_at"})
    assert (body["success"], body["id"]) == (True, where)
    assert_recent(body["updated_at"])
    assert body["metadata"] == {**before, **change, "version": version}
    assert client.get(f"/api/sessions/{where}").json() == body["metadata"]
    if "data" in change:
        seen = run(where, "import json; print(json.dumps(json.load(open('.session_data.json'))))")["stdout"]
        assert json.loads(seen) == change["data"]


def test_a_deleted_session_is_gone_and_its_id_is_free(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session(session_id="brief", data={"n": 1})
    run(where, "open('left', 'w')")
    body = checked(client.delete(f"/api/sessions/{where}"), DeletedAnswer, {"success", "id", "deleted_at"})
    assert (body["success"], body["id"]) == (True, where)
    assert_recent(body["deleted_at"])
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/code"), ("POST", "/run"), ("POST", "/stream")):
        answer = client.request(
            method, f"/api/sessions/{where}{path}", json={"code": "1"} if method == "POST" else None
        )
        assert refused(answer, 404, "brief")["code"] == "not_found"
    session(session_id="brief")
    assert run(where, "import os; print(os.listdir())")["stdout"] == "['.session_data.json', 'main.py']\n"


def test_delete_all_deletes_all(client: httpx.Client, session: MakeSession) -> None:
    made = {session() for _ in range(3)}
    keys = {"success", "deleted_count", "deleted_sessions", "deleted_at"}
    body = checked(client.delete("/api/sessions"), DeletedAllAnswer, keys)
    assert (body["success"], body["deleted_count"], set(body["deleted_sessions"])) == (True, 3, made)
    assert_recent(body["deleted_at"])
    assert client.get("/api/sessions").json() == {"sessions": [], "count": 0, "next_cursor": None}
    assert client.delete("/api/sessions").json()["deleted_count"] == 0


@table("path", ["/api/sessions/", "/api/sessions//", "//api/sessions", "/api//sessions"])
def test_a_delete_with_an_empty_id_does_not_delete_all(client: httpx.Client, session: MakeSession, path: str) -> None:
    spared = session()
    url = f"{str(client.base_url).rstrip('/')}{path}"
    refused(client.delete(url, follow_redirects=True), 404)
    assert client.get(f"/api/sessions/{spared}").status_code == 200
