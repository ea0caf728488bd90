"""Versions, rollback, duplicates and atomic runs, over HTTP."""

from __future__ import annotations

from typing import Any

import httpx

from era.wire import versions
from era.wire.sessions import SessionAnswer
from tests.api.answers import SESSION_KEYS, assert_recent, checked, refused
from tests.conftest import MakeServer, MakeSession, Run
from tests.table import table

HEADER_KEYS = {"version", "name", "created_at", "cause", "run_id", "file_count", "total_size_bytes"}


def setting(data: dict[str, Any], **files: str) -> str:
    """Code that sets `data` and writes `files`."""
    code = f"import json, os\njson.dump({data!r}, open('.session_data.json', 'w'))\n"
    return code + "".join(f"open({name!r}, 'w').write({text!r})\n" for name, text in files.items())


def session_with_files(client: httpx.Client, session_id: str) -> dict[str, Any]:
    """The session with the list of its files."""
    answer = client.get(f"/api/sessions/{session_id}?include=files")
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_every_commit_is_a_version(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session(data={"n": 1})
    outcome = run(where, setting({"n": 2}, a="aa"))
    client.patch(f"/api/sessions/{where}", json={"data": {"n": 3}})
    client.patch(f"/api/sessions/{where}", json={"metadata": {"no": "version"}})
    body = checked(
        client.get(f"/api/sessions/{where}/versions"),
        versions.VersionsAnswer,
        {"versions", "count", "next_cursor"},
    )
    assert [(each["version"], each["cause"], each["run_id"], each["file_count"]) for each in body["versions"]] == [
        (3, "data", None, 1),
        (2, "run", outcome["run_id"], 1),
        (1, "create", None, 0),
    ]
    assert body["count"] == 3
    assert body["next_cursor"] is None
    assert_recent(body["versions"][0]["created_at"])

    one = checked(client.get(f"/api/sessions/{where}/versions/2"), versions.VersionAnswer, HEADER_KEYS | {"data"})
    assert (one["data"], one["total_size_bytes"]) == ({"n": 2}, 2)
    two = checked(
        client.get(f"/api/sessions/{where}/versions/2?include=files"),
        versions.VersionAnswer,
        HEADER_KEYS | {"data", "files"},
    )
    assert two["files"] == session_with_files(client, where)["files"]


def test_versions_come_in_pages(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    for n in range(4):
        client.patch(f"/api/sessions/{where}", json={"data": {"n": n}})
    numbers: list[int] = []
    cursor: str | None = ""
    pages = 0
    while cursor is not None:
        pages += 1
        answer = client.get(
            f"/api/sessions/{where}/versions", params={"limit": 2, **({"cursor": cursor} if cursor else {})}
        )
        numbers += [each["version"] for each in answer.json()["versions"]]
        cursor = answer.json()["next_cursor"]
    assert (numbers, pages) == ([5, 4, 3, 2, 1], 3)
    for bad in ("limit=0", "limit=1001", "cursor=x", "limit=a"):
        refused(client.get(f"/api/sessions/{where}/versions?{bad}"), 400)


def test_missing_and_invalid_versions_are_refused(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    for path in ("versions/2", "versions/2/diff"):
        assert refused(client.get(f"/api/sessions/{where}/{path}"), 404, "version 2")["code"] == "no_such_version"
    assert (
        refused(client.post(f"/api/sessions/{where}/rollback", json={"version": 2}), 404)["code"] == "no_such_version"
    )
    refused(client.post(f"/api/sessions/{where}/duplicate", json={"from_version": 2}), 404)
    for bad in ("0", "-1", "a", "1.5", str(1 << 63), "9" * 30):
        refused(client.get(f"/api/sessions/{where}/versions/{bad}"), 400)
        refused(client.get(f"/api/sessions/{where}/versions/{bad}/diff"), 400)
    bodies: list[dict[str, Any]]
    bodies = [{}, {"version": 0}, {"version": "1"}, {"version": True}, {"version": 1, "x": 1}, {"version": 1 << 63}]
    for body in bodies:
        refused(client.post(f"/api/sessions/{where}/rollback", json=body), 400)
    for path in ("versions", "versions/1", "versions/1/diff"):
        refused(client.get(f"/api/sessions/nobody/{path}"), 404, "nobody")
    refused(client.post("/api/sessions/nobody/rollback", json={"version": 1}), 404, "nobody")
    refused(client.post("/api/sessions/nobody/duplicate"), 404, "nobody")


def test_rollback_brings_back_data_and_files(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session(data={"n": 1})
    run(where, setting({"n": 2}, a="old", b="same"))
    run(where, "import os; os.remove('b'); open('a', 'w').write('new'); open('.session_data.json', 'w').write('{}')")
    body = checked(client.post(f"/api/sessions/{where}/rollback", json={"version": 2}), SessionAnswer, SESSION_KEYS)
    assert (body["version"], body["data"], body["file_count"]) == (4, {"n": 2}, 2)
    outcome = run(where, "print(open('a').read(), open('b').read(), open('.session_data.json').read())")
    assert outcome["stdout"] == 'old same {\n  "n": 2\n}\n'
    assert outcome["state"]["version"] == 4, "it changed nothing"
    assert client.get(f"/api/sessions/{where}/versions/4").json()["cause"] == "rollback"
    # A rollback loses no version.
    client.post(f"/api/sessions/{where}/rollback", json={"version": 3})
    assert run(where, "import os; print(open('a').read(), os.path.exists('b'))")["stdout"] == "new False\n"
    client.post(f"/api/sessions/{where}/rollback", json={"version": 1})
    assert run(where, "import os; print(os.path.exists('a'))")["stdout"] == "False\n"


def test_diffs_list_changes_of_data_and_files(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session(data={"kept": 1, "gone": [1], "a/b~c": {"x": [1, 2, 3]}, "one": 1})
    run(
        where,
        "import os; os.makedirs('d/e'); open('d/e/f', 'w').write('1'); open('g', 'w').write('22'); "
        "open('same', 'w').write('s'); os.symlink('g', 'link')",
    )
    run(where, setting({"kept": 1, "a/b~c": {"x": [1, 5]}, "new": None, "one": True}, h="333")
        + "os.remove('g'); open('d/e/f', 'w').write('1234'); open('same', 'w').write('s')")  # fmt: skip
    body = checked(
        client.get(f"/api/sessions/{where}/versions/3/diff"), versions.DiffAnswer, {"version", "data", "files"}
    )
    assert body["version"] == 3
    assert body["data"] == [
        {"path": "/gone", "op": "remove", "old": [1]},
        {"path": "/a~1b~0c/x/1", "op": "replace", "old": 2, "new": 5},
        {"path": "/a~1b~0c/x/2", "op": "remove", "old": 3},
        {"path": "/one", "op": "replace", "old": 1, "new": True},
        {"path": "/new", "op": "add", "new": None},
    ]
    assert body["files"] == {
        "added": [{"path": "h", "size": 3}],
        "changed": [{"path": "d/e/f", "size": 4, "old_size": 1}],
        "removed": [{"path": "g", "size": 2}],
    }
    first = client.get(f"/api/sessions/{where}/versions/1/diff").json()
    assert {change["op"] for change in first["data"]} == {"add"}
    assert first["files"] == {"added": [], "changed": [], "removed": []}
    second = client.get(f"/api/sessions/{where}/versions/2/diff").json()
    assert second["data"] == []
    assert [each["path"] for each in second["files"]["added"]] == ["d/e/f", "g", "link", "same"]


def test_a_duplicate_is_a_session_of_its_own(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session(
        "python", data={"n": 1}, metadata={"team": "blue"}, default_timeout=7, allowPublicAccess=False, session_id="src"
    )
    client.put("/api/sessions/src/code", json={"code": "print(open('f').read())", "description": "d"})
    run(where, setting({"n": 2}, f="file"))
    made = client.post("/api/sessions/src/duplicate", json={"id": "copy"})
    body = checked(made, SessionAnswer, SESSION_KEYS, 201)
    original = client.get("/api/sessions/src").json()
    own = {"id", "session_id", "created_at", "last_run_at", "version"}
    assert {key: value for key, value in body.items() if key not in own} == {
        key: value for key, value in original.items() if key not in own
    }
    assert (body["version"], body["last_run_at"]) == (1, "")
    assert run("copy")["stdout"] == "file\n"
    run("copy", setting({"n": 9}, f="changed"))
    assert run(where)["stdout"] == "file\n"
    assert client.get("/api/sessions/src").json()["data"]["n"] == 2
    assert [each["id"] for each in client.get("/api/sessions?metadata.team=blue").json()["sessions"]] == ["copy", "src"]
    causes = [each["cause"] for each in client.get("/api/sessions/copy/versions").json()["versions"]]
    assert causes == ["run", "duplicate"]
    client.delete("/api/sessions/src")
    assert run("copy")["stdout"] == "changed\n"


def test_duplicates_take_an_id_a_version_and_data(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session(data={"n": 1})
    client.put(f"/api/sessions/{where}/code", json={"code": "1"})
    run(where, setting({"n": 2}, f="file"))
    url = f"/api/sessions/{where}/duplicate"
    made = client.post(url).json()
    assert made["id"].startswith(f"{where}-copy-")
    assert made["id"].removeprefix(f"{where}-copy-").isdigit()
    assert client.post(url, json={"new_id": "other", "from_version": 1}).json()["file_count"] == 0
    both = client.post(
        url, json={"id": "both", "new_id": "both", "data": client.get("/api/sessions/other").json()["data"]}
    )
    assert both.status_code == 201
    assert client.get("/api/sessions/both/versions/1").json()["data"] == {"n": 1}, "what stored code adds is no data"
    assert both.json()["file_count"] == 1
    assert refused(client.post(url, json={"id": "both"}), 409, "both")["code"] == "conflict"
    refused(client.post(url, json={"id": "a", "new_id": "b"}), 400, "new_id")
    bad: list[dict[str, Any]]
    bad = [{"id": ""}, {"id": "a/b"}, {"id": "x" * 129}, {"data": []}, {"from_version": 0}, {"what": 1}]
    for body in bad:
        refused(client.post(url, json=body), 400)
    refused(client.post(url, json={"data": {"x": "x" * (1 << 20)}}), 413)


BAD_ENDS = {
    "exit": ("raise SystemExit(3)", {}, "failed", "exit code 3"),
    "error": ("1 / 0", {}, "failed", "exit code 1"),
    "signal": ("os.kill(os.getpid(), 9)", {}, "killed", "killed"),
    "timeout": ("while True: pass", {"timeout": 0.5}, "timeout", "timeout"),
}


@table("end", BAD_ENDS)
def test_an_atomic_run_that_ends_badly_leaves_nothing(
    end: str, client: httpx.Client, session: MakeSession, run: Run
) -> None:
    code, extra, status, word = BAD_ENDS[end]
    where = session(data={"n": 1})
    run(where, setting({"n": 2}, f="old"))
    outcome = run(where, setting({"n": 3}, f="new", g="new") + code, atomic=True, **extra)
    assert outcome["status"] == status
    assert outcome["data"] == {"n": 2}
    assert (outcome["state"]["version"], outcome["state"]["committed"]) == (2, False)
    assert outcome["state"]["reason"].startswith("atomic: ")
    assert word in outcome["state"]["reason"]
    seen = session_with_files(client, where)
    assert (seen["version"], seen["data"], [each["path"] for each in seen["files"]]) == (2, {"n": 2}, ["f"])
    assert run(where, "import os; print(open('f').read(), os.path.exists('g'))")["stdout"] == "old False\n"


def test_old_versions_are_dropped(own_server: MakeServer) -> None:
    server = own_server(versions_kept="3")
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
        for n in range(5):
            client.patch("/api/sessions/s", json={"data": {"n": n}})
        kept = [each["version"] for each in client.get("/api/sessions/s/versions").json()["versions"]]
        assert kept == [6, 5, 4]
        for path in ("versions/3", "versions/3/diff", "versions/4/diff"):
            body = refused(client.get(f"/api/sessions/s/{path}"), 404, "Version 3", "ERA_VERSIONS_KEPT")
            assert body["code"] == "version_gone"
        refused(client.post("/api/sessions/s/rollback", json={"version": 3}), 404, "kept")
        assert client.post("/api/sessions/s/rollback", json={"version": 4}).json()["data"] == {"n": 2}
