"""The HTTP contract: every route's answer to the letter, and every refusal in one shape."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import httpx
import jsonschema_rs
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

from era.wire.base import ErrorAnswer
from era.wire.runs import CodeAnswer, CodeStoredAnswer, ExecuteAnswer, RunAnswer
from era.wire.sessions import ChangedAnswer, DeletedAllAnswer, DeletedAnswer, SessionAnswer, SessionsAnswer
from tests.conftest import Run, Server, eventually

type MakeSession = Callable[..., str]
type MakeServer = Callable[..., Server]

JSON = {"content-type": "application/json"}
SESSION_KEYS = {
    "id", "session_id", "created_at", "last_run_at", "language", "persistent", "file_count", "total_size_bytes",
    "metadata", "data", "setup", "allowInternetAccess", "allowPublicAccess", "default_timeout", "version",
    "ttl", "expires_at", "limits", "isolation", "egress", "service", "storage", "status",
}  # fmt: skip
RUN_KEYS = {
    "exit_code", "stdout", "stderr", "duration", "session_id", "data", "run_id", "status", "stdout_truncated",
    "stderr_truncated", "state", "artifacts", "artifacts_more",
}  # fmt: skip


def checked(answer: httpx.Response, model: type[BaseModel], keys: set[str], status: int = 200) -> dict[str, Any]:
    """The answer's body: exactly `keys`, and what `model` documents, without any conversion."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert re.fullmatch("req_[0-9a-f]{16}", answer.headers["x-request-id"])
    body: dict[str, Any] = answer.json()
    assert body.keys() == keys
    model.model_validate(body, strict=True, extra="forbid")
    return body


def refused(answer: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    """The body of an error: in the contract's shape, with `words` in its sentence or its hint."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body: dict[str, Any] = answer.json()
    assert body.keys() - {"details"} == {"error", "code", "hint", "request_id"}
    ErrorAnswer.model_validate(body, strict=True, extra="forbid")
    assert re.fullmatch("[a-z]+(_[a-z]+)*", body["code"])
    assert body["request_id"] == answer.headers["x-request-id"]
    assert len(body["error"]) > 10
    assert len(body["hint"]) > 10
    for word in words:
        assert word in body["error"] + body["hint"], body
    return body


def assert_recent(text: str) -> None:
    """RFC 3339 in UTC, and just now."""
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", text)
    assert abs((datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds()) < 60


def send(client: httpx.Client, method: str, path: str, body: str | bytes) -> httpx.Response:
    return client.request(method, path, content=body, headers=JSON)


# -- sessions ---------------------------------------------------------------------------------------------------


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
        "status": "idle",
    }
    assert body["session_id"] == body["id"]
    assert checked(client.get(f"/api/sessions/{body['id']}"), SessionAnswer, SESSION_KEYS) == body


def test_a_session_created_with_everything_gives_it_back(client: httpx.Client) -> None:
    given = {
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
    body = checked(client.post("/api/sessions", json={**given, "setup": None}), SessionAnswer, SESSION_KEYS, 201)
    assert {key: body[key] for key in given} == given
    refused(client.post("/api/sessions", json=given), 409, "All_of-it:1", "exists")
    assert body == client.get("/api/sessions/All_of-it:1").json()


@pytest.mark.parametrize(
    ("alias", "language"),
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
        assert file.keys() == {"path", "size", "modified_at", "uploaded", "etag"}
        assert_recent(file["modified_at"])


def test_the_list_is_newest_first_and_comes_in_pages(client: httpx.Client, session: MakeSession) -> None:
    made = [session(session_id=f"page-{number}") for number in range(7)]
    whole = checked(client.get("/api/sessions"), SessionsAnswer, {"sessions", "count", "next_cursor"})
    assert [item["id"] for item in whole["sessions"]] == made[::-1]
    assert (whole["count"], whole["next_cursor"]) == (7, None)
    assert all(item.keys() == SESSION_KEYS for item in whole["sessions"])
    pages: list[list[str]] = []
    cursor = None
    while cursor is not None or not pages:
        page = client.get("/api/sessions", params={"limit": 3, **({"cursor": cursor} if cursor else {})}).json()
        assert page["count"] == len(page["sessions"])
        pages.append([item["id"] for item in page["sessions"]])
        cursor = page["next_cursor"]
        session()  # what is made meanwhile does not shift the pages
    assert pages == [made[6:3:-1], made[3:0:-1], made[:1]]


@pytest.mark.parametrize(
    ("query", "expected"),
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
    session(session_id="a", metadata={"team": "red"})
    session(session_id="b", metadata={"team": "blue", "dotted.key": "1"})
    session("node", session_id="c", metadata={})
    session(session_id="d", metadata={"team": "red", "stage": "live"})
    assert [item["id"] for item in client.get(f"/api/sessions?{query}").json()["sessions"]] == expected


def test_a_session_is_running_while_it_runs(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where, other = session(), session()
    with ThreadPoolExecutor(1) as pool:
        active_runs = pool.submit(run, where, "import time; time.sleep(0.5)")
        assert eventually(lambda: client.get(f"/api/sessions/{where}").json()["status"] == "running")
        ids = [item["id"] for item in client.get("/api/sessions?status=running").json()["sessions"]]
        idle = [item["id"] for item in client.get("/api/sessions?status=idle").json()["sessions"]]
        assert (ids, idle) == ([where], [other])
        active_runs.result()
    assert client.get(f"/api/sessions/{where}").json()["status"] == "idle"


@pytest.mark.parametrize(
    ("change", "version"),
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
    body = checked(answer, ChangedAnswer, {"success", "id", "metadata", "updated_at"})
    assert (body["success"], body["id"]) == (True, where)
    assert_recent(body["updated_at"])
    assert body["metadata"] == {**before, **change, "version": version}
    assert client.get(f"/api/sessions/{where}").json() == body["metadata"]
    if "data" in change:
        seen = run(where, "import json; print(json.dumps(json.load(open('.session_data.json'))))")["stdout"]
        assert json.loads(seen) == change["data"]


def test_a_patched_default_timeout_is_in_force(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    client.patch(f"/api/sessions/{where}", json={"default_timeout": 0.2})
    assert run(where, "import time; time.sleep(30)")["exit_code"] == 124
    assert run(where, "import time; time.sleep(0.3)", timeout=20)["exit_code"] == 0


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


@pytest.mark.parametrize("path", ["/api/sessions/", "/api/sessions//", "//api/sessions", "/api//sessions"])
def test_a_delete_with_an_empty_id_does_not_delete_all(client: httpx.Client, session: MakeSession, path: str) -> None:
    session(session_id="spared")
    url = f"{str(client.base_url).rstrip('/')}{path}"
    refused(client.delete(url, follow_redirects=True), 404)
    assert client.get("/api/sessions/spared").status_code == 200


# -- runs -------------------------------------------------------------------------------------------------------


def test_a_run_answers_with_all_it_promises(client: httpx.Client, session: MakeSession) -> None:
    where = session(data={"n": 1})
    code = "import sys, time; print('out'); print('err', file=sys.stderr); time.sleep(0.1); sys.exit(3)"
    body = checked(client.post(f"/api/sessions/{where}/run", json={"code": code}), RunAnswer, RUN_KEYS)
    assert re.fullmatch(r"\d+\.\d{3}s", body["duration"])
    assert 0.1 <= float(body["duration"].removesuffix("s")) < 5
    assert re.fullmatch(r"run_\d{13}_[a-z0-9]{9}", body["run_id"])
    assert {key: value for key, value in body.items() if key not in ("duration", "run_id")} == {
        "exit_code": 3,
        "stdout": "out\n",
        "stderr": "err\n",
        "session_id": where,
        "data": {"n": 1},
        "status": "failed",
        "stdout_truncated": False,
        "stderr_truncated": False,
        "state": {"version": 2, "committed": True, "reason": None},
        "artifacts": [],
        "artifacts_more": 0,
    }


@pytest.mark.parametrize(("persistent", "second"), [(True, "True 1\n"), (False, "False 1\n")])
def test_files_outlive_a_run_of_a_persistent_session_only_and_data_always(
    client: httpx.Client, session: MakeSession, run: Run, persistent: bool, second: str
) -> None:
    where = session(persistent=persistent, data={"n": 0})
    run(where, "open('kept', 'w').write('x'); open('.session_data.json', 'w').write('{\"n\": 1}')")
    code = "import os, json; print(os.path.exists('kept'), json.load(open('.session_data.json'))['n'])"
    assert run(where, code)["stdout"] == second
    assert client.get(f"/api/sessions/{where}").json()["file_count"] == int(persistent)


def test_stored_code_runs_and_is_seen_by_clients_only(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session(data={"n": 1})
    path = f"/api/sessions/{where}"
    assert refused(client.get(f"{path}/code"), 404)["error"] == "no code stored"
    nothing = refused(client.post(f"{path}/run", json={}), 400)
    assert nothing["hint"] == "Use PUT /api/sessions/{id}/code to store code"

    code = "print(open('.session_data.json').read())"
    stored = client.put(f"{path}/code", json={"code": code, "description": "shows the state"})
    body = checked(stored, CodeStoredAnswer, {"success", "code_length", "updated_at"})
    assert (body["success"], body["code_length"]) == (True, len(code))
    assert_recent(body["updated_at"])
    shown = checked(client.get(f"{path}/code"), CodeAnswer, {"code", "description", "updated_at", "code_length"})
    assert shown == {
        "code": code,
        "description": "shows the state",
        "updated_at": body["updated_at"],
        "code_length": len(code),
    }
    seen = {
        "n": 1,
        "code": code,
        "code_description": "shows the state",
        "code_updated_at": body["updated_at"],
    }
    assert client.get(path).json()["data"] == seen
    assert client.get("/api/sessions").json()["sessions"][0]["data"] == seen

    for fields in ({}, {"code": None}):
        ran = run(where, **fields)
        assert (json.loads(ran["stdout"]), ran["data"]) == ({"n": 1}, seen)
    assert run(where, "print('own')")["stdout"] == "own\n"
    assert run(where, "")["stdout"] == ""
    # A client that reads data, changes a part and sends it back stores no code in it.
    client.patch(path, json={"data": {**seen, "n": 2}})
    assert json.loads(run(where)["stdout"]) == {"n": 2}
    # Stored anew it replaces all of the old.
    client.put(f"{path}/code", json={"code": "print('new')"})
    assert client.get(f"{path}/code").json()["description"] is None
    assert client.get(path).json()["data"]["code_description"] is None
    assert run(where)["stdout"] == "new\n"


HELLO = {
    "python": "import os; print('hi', open('d/in.txt').read(), os.environ['ERA_LANGUAGE'], os.environ['A'])",
    "node": "console.log('hi', require('fs').readFileSync('d/in.txt') + '', process.env.ERA_LANGUAGE, process.env.A)",
    "typescript": "import fs from 'fs'; const a: string = process.env.A!;\n"
    "console.log('hi', fs.readFileSync('d/in.txt', 'utf8'), process.env.ERA_LANGUAGE, a)",
}
EXECUTE_KEYS = RUN_KEYS - {"session_id", "data", "state", "artifacts", "artifacts_more"} | {"language", "vm_id"}


@pytest.mark.parametrize(
    ("name", "language"), [("python", "python"), ("py", "python"), ("js", "node"), ("ts", "typescript")]
)
def test_execute_runs_once_and_leaves_nothing(client: httpx.Client, name: str, language: str) -> None:
    wanted = {"language": name, "code": HELLO[language], "files": {"d/in.txt": "ü"}, "env": {"A": "b"}}
    bodies = [checked(client.post("/api/execute", json=wanted), ExecuteAnswer, EXECUTE_KEYS) for _ in range(2)]
    for body in bodies:
        assert (body["stdout"], body["stderr"], body["exit_code"]) == (f"hi ü {language} b\n", "", 0)
        assert (body["language"], body["status"]) == (language, "ok")
        assert re.fullmatch(r"\d+\.\d{3}s", body["duration"])
    assert bodies[0]["vm_id"] != bodies[1]["vm_id"]
    assert len(bodies[0]["vm_id"]) > 8
    assert client.get("/api/sessions").json()["count"] == 0


def test_execute_keeps_its_timeout_and_its_own_files(client: httpx.Client) -> None:
    code = """
import os, time
print(os.path.exists('left'))
open('left', 'w').close()
print(open('main.py').read(), flush=True)
time.sleep(30)
"""
    wanted = {"language": "python", "code": code, "timeout": 0.3, "files": {"main.py": "a file of mine"}}
    for _ in range(2):
        body = client.post("/api/execute", json=wanted).json()
        assert (body["exit_code"], body["status"]) == (124, "timeout")
        assert body["stdout"] == "False\na file of mine\n"


# -- streams ----------------------------------------------------------------------------------------------------


def events(answer: httpx.Response) -> Iterator[tuple[float, str, dict[str, Any]]]:
    """Time, name and data of each event, as they come."""
    name = ""
    for line in answer.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line:
            assert line.startswith("data: ")
            yield time.monotonic(), name, json.loads(line.removeprefix("data: "))


def streamed(client: httpx.Client, where: str, code: str, **fields: Any) -> list[tuple[float, str, dict[str, Any]]]:
    with client.stream("POST", f"/api/sessions/{where}/stream", json={"code": code, **fields}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        found = list(events(answer))
    assert all(name == data["type"] for _, name, data in found)
    assert [name for _, name, _ in found].count("done") == 1
    return found


def test_a_stream_has_output_as_it_is_written_and_done_last(client: httpx.Client, session: MakeSession) -> None:
    where = session(data={"n": 1})
    code = """
import sys, time
for number in range(3):
    print('out', number, flush=True)
    time.sleep(0.15)
    print('err', number, file=sys.stderr, flush=True)
    time.sleep(0.15)
sys.exit(5)
"""
    found = streamed(client, where, code)
    assert [(name, data.get("content")) for _, name, data in found[:-1]] == [
        (f"std{kind}", f"{kind} {number}\n") for number in range(3) for kind in ("out", "err")
    ]
    assert all(data.keys() == {"type", "content"} for _, _, data in found[:-1])
    times = [moment for moment, _, _ in found]
    assert times[-1] - times[0] > 0.7, "it all came at the end"
    _, name, done = found[-1]
    assert name == "done"
    assert done.keys() == RUN_KEYS - {"stdout", "stderr"} | {"type"}
    RunAnswer.model_validate(
        {**{key: value for key, value in done.items() if key != "type"}, "stdout": "", "stderr": ""},
        strict=True,
        extra="forbid",
    )
    assert (done["exit_code"], done["status"], done["data"]) == (5, "failed", {"n": 1})
    assert client.get(f"/api/sessions/{where}").json()["version"] == done["state"]["version"] == 2


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (
            "import os, time\nfor byte in 'é😀\\n'.encode():\n    os.write(1, bytes([byte])); time.sleep(0.02)",
            "é😀\n",
        ),
        ("import os, time; os.write(1, b'a\\xc3'); time.sleep(0.05); os.write(1, b'b')", "a\ufffdb"),
        ("import os; os.write(1, b'tail \\xf0\\x9f')", "tail \ufffd"),
        ("import os; os.write(1, b'a\\r\\nb\\n\\ndata: x\\n\\0')", "a\r\nb\n\ndata: x\n\0"),
        ("import os\nfor _ in range(40): os.write(1, '😀'.encode() * 4097)", "😀" * 4097 * 40),
        ("", ""),
    ],
    ids=["split", "invalid", "unfinished", "control", "large", "none"],
)
def test_text_in_a_stream_is_whole(client: httpx.Client, session: MakeSession, code: str, expected: str) -> None:
    found = streamed(client, session(), code)
    assert "".join(data["content"] for _, name, data in found if name == "stdout") == expected
    assert found[-1][1] == "done"


def test_a_stream_that_times_out_is_done_with_124(client: httpx.Client, session: MakeSession) -> None:
    found = streamed(client, session(), "import time; print('half'); time.sleep(60)", timeout=0.3)
    assert [data.get("content") for _, _, data in found[:-1]] == ["half\n"]
    assert (found[-1][2]["exit_code"], found[-1][2]["status"]) == (124, "timeout")


def test_a_run_goes_on_when_the_reader_of_its_stream_hangs_up(
    client: httpx.Client, session: MakeSession, run: Run
) -> None:
    where = session()
    code = "import time; print('begun'); time.sleep(0.4); open('.session_data.json', 'w').write('{\"end\": 1}')"
    with client.stream("POST", f"/api/sessions/{where}/stream", json={"code": code}) as answer:
        next(events(answer))
    assert run(where, "")["data"] == {"end": 1}


@pytest.mark.parametrize("route", ["run", "stream"])
@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({}, 400, "no code"),
        ({"code": 5}, 400, "'code'"),
        ({"code": "1", "codes": "1"}, 400, "'codes'"),
        ({"code": "1", "env": {"A": 1}}, 400, "'env.A'"),
        ({"code": "1", "timeout": 0}, 400, "'timeout'"),
        ({"code": "x" * (4 * 2**20 + 1)}, 413, "'code'"),
    ],
    ids=["nothing", "type", "unknown", "env", "timeout", "large"],
)
def test_errors_before_a_run_have_their_status_in_a_stream_too(
    client: httpx.Client, session: MakeSession, route: str, body: dict[str, Any], status: int, word: str
) -> None:
    where = session()
    refused(client.post(f"/api/sessions/{where}/{route}", json=body), status, word)
    refused(client.post(f"/api/sessions/missing/{route}", json={"code": "1"}), 404, "missing")
    assert client.get(f"/api/sessions/{where}").json()["last_run_at"] == ""


# -- refusals ---------------------------------------------------------------------------------------------------

ID = "/api/sessions/there"
CREATE = ("POST", "/api/sessions")
RUN = ("POST", f"{ID}/run")
PATCH = ("PATCH", ID)
CODE = ("PUT", f"{ID}/code")
EXECUTE = ("POST", "/api/execute")
DEEP = '{"a":' * 64 + "{}" + "}" * 64
MANY = '{"a":' * 100_000 + "1" + "}" * 100_000
LARGE = '{"a":"' + "x" * 2**20 + '"}'

BODIES: dict[str, tuple[tuple[str, str], str, int, str]] = {
    # unknown fields
    "create, unknown": (CREATE, '{"language":"python","lang":"x"}', 400, "'lang'"),
    "run, unknown": (RUN, '{"code":"1","files":{}}', 400, "'files'"),
    "patch, unknown": (PATCH, '{"language":"node"}', 400, "'language'"),
    "code, unknown": (CODE, '{"code":"1","name":"x"}', 400, "'name'"),
    "execute, unknown": (EXECUTE, '{"language":"python","code":"1","session_id":"x"}', 400, "'session_id'"),
    # missing fields
    "create, no language": (CREATE, "{}", 400, "'language' is missing"),
    "code, no code": (CODE, "{}", 400, "'code' is missing"),
    "execute, no code": (EXECUTE, '{"language":"python"}', 400, "'code' is missing"),
    # types
    "language, number": (CREATE, '{"language":5}', 400, "'language'"),
    "language, null": (CREATE, '{"language":null}', 400, "'language'"),
    "persistent, string": (CREATE, '{"language":"python","persistent":"true"}', 400, "'persistent'"),
    "persistent, number": (CREATE, '{"language":"python","persistent":1}', 400, "'persistent'"),
    "internet, null": (CREATE, '{"language":"python","allowInternetAccess":null}', 400, "'allowInternetAccess'"),
    "data, list": (CREATE, '{"language":"python","data":[]}', 400, "'data'"),
    "data, null": (CREATE, '{"language":"python","data":null}', 400, "'data'"),
    "data, string": (PATCH, '{"data":"{}"}', 400, "'data'"),
    "metadata, list": (PATCH, '{"metadata":[]}', 400, "'metadata'"),
    "timeout of a session, string": (CREATE, '{"language":"python","default_timeout":"5"}', 400, "'default_timeout'"),
    "timeout, true": (RUN, '{"code":"1","timeout":true}', 400, "'timeout'"),
    "timeout, list": (RUN, '{"code":"1","timeout":[1]}', 400, "'timeout'"),
    "env, list": (RUN, '{"code":"1","env":["A=1"]}', 400, "'env'"),
    "env, number": (RUN, '{"code":"1","env":{"A":1}}', 400, "'env.A'"),
    "env, boolean": (RUN, '{"code":"1","env":{"A":true}}', 400, "'env.A'"),
    "env, null": (RUN, '{"code":"1","env":{"A":null}}', 400, "'env.A'"),
    "description, number": (CODE, '{"code":"1","description":1}', 400, "'description'"),
    "files, bytes": (EXECUTE, '{"language":"python","code":"1","files":{"a":1}}', 400, "'files.a'"),
    # values
    "language, unknown": (CREATE, '{"language":"cobol"}', 400, "'cobol'"),
    "language, empty": (CREATE, '{"language":""}', 400, "language"),
    "execute, unknown language": (EXECUTE, '{"language":"cobol","code":"1"}', 400, "'cobol'"),
    "timeout, zero": (RUN, '{"code":"1","timeout":0}', 400, "'timeout'"),
    "timeout, negative": (RUN, '{"code":"1","timeout":-1}', 400, "'timeout'"),
    "timeout, endless": (RUN, '{"code":"1","timeout":1e300}', 400, "'timeout'"),
    "timeout, digits": (RUN, '{"code":"1","timeout":1' + "0" * 400 + "}", 400, "'timeout'"),
    "default timeout, zero": (PATCH, '{"default_timeout":0}', 400, "'default_timeout'"),
    "default timeout, negative": (CREATE, '{"language":"python","default_timeout":-3}', 400, "'default_timeout'"),
    "env, name with =": (RUN, '{"code":"1","env":{"A=B":"1"}}', 400, "'A=B'"),
    "env, no name": (RUN, '{"code":"1","env":{"":"1"}}', 400, "name"),
    "env, NUL in a name": (RUN, '{"code":"1","env":{"A\\u0000":"1"}}', 400, "name"),
    "env, NUL in a value": (RUN, '{"code":"1","env":{"A":"1\\u0000"}}', 400, "'env.A'"),
    "setup": (CREATE, '{"language":"python","setup":{"pip":["-r x"]}}', 400, "'setup.pip'"),
    "id, slash": (CREATE, '{"language":"python","session_id":"a/b"}', 400, "'session_id'"),
    "id, dots": (CREATE, '{"language":"python","session_id":".."}', 400, "'session_id'"),
    "id, newline at the end": (CREATE, '{"language":"python","session_id":"a\\n"}', 400, "'session_id'"),
    "id, NUL": (CREATE, '{"language":"python","session_id":"a\\u0000"}', 400, "'session_id'"),
    "id, not ASCII": (CREATE, '{"language":"python","session_id":"é"}', 400, "'session_id'"),
    "id, digits of another script": (CREATE, '{"language":"python","session_id":"١"}', 400, "'session_id'"),
    "id, empty": (CREATE, '{"language":"python","session_id":""}', 400, "'session_id'"),
    "id, 129 characters": (CREATE, '{"language":"python","session_id":"' + "x" * 129 + '"}', 400, "'session_id'"),
    "id, 10 KB": (CREATE, '{"language":"python","session_id":"' + "x" * 10_000 + '"}', 400, "'session_id'"),
    "files, up": (EXECUTE, '{"language":"python","code":"1","files":{"../a":""}}', 400, "'../a'"),
    "files, up in the middle": (EXECUTE, '{"language":"python","code":"1","files":{"a/../../b":""}}', 400, "'files'"),
    "files, absolute": (EXECUTE, '{"language":"python","code":"1","files":{"/etc/x":""}}', 400, "'/etc/x'"),
    "files, empty": (EXECUTE, '{"language":"python","code":"1","files":{"":""}}', 400, "'files'"),
    "files, NUL": (EXECUTE, '{"language":"python","code":"1","files":{"a\\u0000b":""}}', 400, "'files'"),
    "files, a directory": (EXECUTE, '{"language":"python","code":"1","files":{"a":"","a/b":""}}', 400, "'a'"),
    # sizes and depths
    "data, 1 MiB": (CREATE, '{"language":"python","data":' + LARGE + "}", 413, "files"),
    "data, deep": (CREATE, '{"language":"python","data":' + DEEP + "}", 413, "files"),
    "data, 1 MiB, patched": (PATCH, '{"data":' + LARGE + "}", 413, "files"),
    "data, deep, patched": (PATCH, '{"data":' + DEEP + "}", 413, "files"),
    "metadata, 1 MiB": (CREATE, '{"language":"python","metadata":' + LARGE + "}", 413, "'metadata'"),
    "metadata, deep": (PATCH, '{"metadata":' + DEEP + "}", 413, "'metadata'"),
    "body, deep": (CREATE, '{"language":"python","data":' + MANY + "}", 413, "deeper"),
    "body, deep lists": (RUN, "[" * 100_000 + "]" * 100_000, 413, "deeper"),
    "code, large": (CODE, '{"code":"' + "x" * (4 * 2**20 + 1) + '"}', 413, "'code'"),
    "execute, large": (EXECUTE, '{"language":"python","code":"' + "x" * (4 * 2**20 + 1) + '"}', 413, "'code'"),
    "env, one large": (RUN, '{"code":"1","env":{"A":"' + "x" * 200_000 + '"}}', 413, "'env'"),
    "files, many": (
        EXECUTE,
        json.dumps({"language": "python", "code": "1", "files": dict.fromkeys(map(str, range(1001)), "")}),
        413,
        "'files'",
    ),
    # not JSON as we read it
    "empty": (CREATE, "", 400, "JSON"),
    "blank": (CREATE, "  ", 400, "empty"),
    "malformed": (CREATE, '{"language":', 400, "is not JSON"),
    "malformed, Python": (RUN, "{'code': '1'}", 400, "is not JSON"),
    "two documents": (RUN, '{"code":"1"}{}', 400, "is not JSON"),
    "list": (RUN, '[{"code":"1"}]', 400, "object"),
    "string": (RUN, '"code"', 400, "object"),
    "null": (RUN, "null", 400, "object"),
    "NaN": (CREATE, '{"language":"python","data":{"a":NaN}}', 400, "NaN"),
    "Infinity": (RUN, '{"code":"1","timeout":Infinity}', 400, "Infinity"),
    "1e400": (CREATE, '{"language":"python","metadata":{"a":1e400}}', 400, "out of range"),
    "5,000 digits": (PATCH, '{"data":{"a":' + "9" * 5000 + "}}", 400, "digits"),
    "lone surrogate in code": (RUN, '{"code":"\\ud800"}', 400, "surrogate"),
    "lone surrogate in data": (PATCH, '{"data":{"\\udfff":1}}', 400, "surrogate"),
    "lone surrogate in env": (RUN, '{"code":"1","env":{"A":"\\ud800"}}', 400, "surrogate"),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_not_right_is_refused(client: httpx.Client, session: MakeSession, name: str) -> None:
    (method, path), body, status, word = BODIES[name]
    session(session_id="there", data={"n": 1})
    before = client.get("/api/sessions").json()
    refused(send(client, method, path, body), status, word)
    assert client.get("/api/sessions").json() == before


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b'\xef\xbb\xbf{"language":"python"}', "byte order mark"),
        ('{"language":"python"}'.encode("utf-16"), "UTF-8"),
        (b'{"language":"py\xff"}', "UTF-8"),
        (b'{"language":"py\xed\xa0\x80"}', "UTF-8"),
    ],
)
def test_a_body_that_is_not_utf8_is_refused(client: httpx.Client, body: bytes, word: str) -> None:
    refused(send(client, "POST", "/api/sessions", body), 400, word)


@pytest.mark.parametrize("kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_body_counts_only_as_json(client: httpx.Client, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    refused(client.post("/api/sessions", content=b'{"language":"python"}', headers=headers), 400, "Content-Type")
    assert client.get("/api/sessions").json()["count"] == 0


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_16_mib_is_refused_whether_its_length_is_told_or_not(client: httpx.Client, chunked: bool) -> None:
    pieces = [b'{"language":"python","data":"', *[b"x" * 2**20] * 16, b'"}']
    content: Any = iter(pieces) if chunked else b"".join(pieces)
    refused(client.post("/api/sessions", content=content, headers=JSON), 413, "bytes")
    assert client.get("/health").json()["status"] == "ok"


BAD_IDS = ["a/b", "a\nb", "a\n", "\n", "a\0b", "\0", "a b", "é", "..", ".", "a.b", "%", "x" * 129, "x" * 10_000]


@pytest.mark.parametrize("bad", BAD_IDS, ids=lambda bad: f"{bad[:3]!r}, {len(bad)}")
def test_an_id_that_no_session_can_have_is_not_found(client: httpx.Client, bad: str) -> None:
    escaped = quote(bad, safe="").replace(".", "%2E")  # or clients would follow the dots themselves
    calls = [("GET", ""), ("DELETE", ""), ("PATCH", ""), ("POST", "/run"), ("POST", "/stream"), ("GET", "/code")]
    for method, rest in calls:
        body = {"POST": {"code": "1"}, "PATCH": {}}.get(method)
        refused(client.request(method, f"/api/sessions/{escaped}{rest}", json=body), 404)


@pytest.mark.parametrize("good", ["a", "A_b-c:1", "0", "-", "x" * 128], ids=lambda good: good[:9])
def test_an_id_of_the_documented_form_is_taken(client: httpx.Client, session: MakeSession, good: str) -> None:
    assert session(session_id=good) == good
    assert client.get(f"/api/sessions/{quote(good)}").json()["id"] == good


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=-1", "limit=1001", "limit=x", "limit=1.5", f"limit={'9' * 5000}", "cursor=!", "cursor=LTE",
     "cursor=" + "9" * 64, "cursor=" + "x" * 65, "status=done", "language=cobol", "include=all"],
    ids=lambda query: query[:12],
)  # fmt: skip
def test_a_query_that_is_not_right_is_refused(client: httpx.Client, session: MakeSession, query: str) -> None:
    path = f"/api/sessions/{session()}" if query.startswith("include") else "/api/sessions"
    refused(client.get(f"{path}?{query}"), 400, query.partition("=")[0])


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/api/sessions", {"GET", "POST", "DELETE"}),
        ("POST", "/api/sessions/x", {"GET", "PATCH", "DELETE"}),
        ("GET", "/api/sessions/x/run", {"POST"}),
        ("DELETE", "/api/sessions/x/code", {"GET", "PUT"}),
        ("GET", "/api/execute", {"POST"}),
        ("POST", "/health", {"GET"}),
        ("BREW", "/health", {"GET"}),
    ],
)
def test_a_method_that_a_path_does_not_have_is_405(
    client: httpx.Client, method: str, path: str, allowed: set[str]
) -> None:
    answer = client.request(method, path)
    if method == "BREW":
        assert answer.status_code in (400, 405)
        return
    assert refused(answer, 405, method)["code"] == "method_not_allowed"
    told = {name.strip() for name in answer.headers["allow"].split(",")}
    assert told - {"HEAD"} <= allowed
    assert told


@pytest.mark.parametrize("path", ["/api", "/api/nothing", "/api/sessions/x/nothing", "/nothing", "/api/execute/"])
def test_a_path_that_is_none_is_404(client: httpx.Client, path: str) -> None:
    refused(client.get(path), 404)


def test_bytes_that_are_no_request_are_400(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for request in (b"GET /api/sessions/\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n", b"\0\0\0\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(request)
            assert connection.recv(100).startswith(b"HTTP/1.1 400 ")


SECRET = "s3cr3t-in-env"


LEAKS = {
    "beside a number": f'{{"code":"1","env":{{"A":"{SECRET}","B":5}}}}',
    "in a list": f'{{"code":"1","env":{{"A":["{SECRET}"]}}}}',
    "in a key": f'{{"code":"1","env":{{"A":{{"{SECRET}":1}}}}}}',
    "instead of env": f'{{"code":"1","env":"{SECRET}"}}',
    "list instead of env": f'{{"code":"1","env":["{SECRET}"]}}',
    "NUL": f'{{"code":"1","env":{{"A":"{SECRET}\\u0000"}}}}',
    "large": f'{{"code":"1","env":{{"A":"{SECRET}{"x" * 140_000}"}}}}',
    "unknown field": f'{{"code":"1","env":{{"A":"{SECRET}"}},"more":1}}',
    "bad timeout": f'{{"code":"1","env":{{"A":"{SECRET}"}},"timeout":-1}}',
    "trailing comma": f'{{"code":"1","env":{{"A":"{SECRET}"}},}}',
    "raw newline": f'{{"code":"1","env":{{"A":"{SECRET}\n"}}}}',
    "surrogate": f'{{"code":"1","env":{{"A":"{SECRET}\\ud800"}}}}',
    "no code": f'{{"env":{{"A":"{SECRET}"}}}}',
    "a list": f'["{SECRET}"]',
    "a string": f'"{SECRET}"',
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_value_of_env_is_in_no_error_and_no_log(
    server: Server, client: httpx.Client, session: MakeSession, name: str
) -> None:
    where = session()
    for path in (f"/api/sessions/{where}/run", f"/api/sessions/{where}/stream", "/api/execute", "/api/sessions"):
        answer = send(client, "POST", path, LEAKS[name])
        assert 400 <= answer.status_code < 500
        assert SECRET not in answer.text + str(answer.headers)
    assert SECRET not in server.log


def test_more_runs_than_may_wait_are_429(own_server: MakeServer) -> None:
    server = own_server(max_waiting="2", spares="0")
    with server.client() as client, ThreadPoolExecutor(3) as pool:
        client.post("/api/sessions", json={"language": "python", "session_id": "busy"})
        client.post("/api/sessions", json={"language": "python", "session_id": "free"})
        begun, lock = [], threading.Lock()

        def work(_: int) -> int:
            with lock:
                begun.append(1)
            with server.client() as own:
                return own.post("/api/sessions/busy/run", json={"code": "import time; time.sleep(0.6)"}).status_code

        running = [pool.submit(work, number) for number in range(3)]
        assert eventually(lambda: len(begun) == 3)
        assert eventually(lambda: client.get("/api/sessions/busy").json()["status"] == "running")
        time.sleep(0.2)
        for route in ("run", "stream"):
            answer = client.post(f"/api/sessions/busy/{route}", json={"code": "1"})
            refused(answer, 429, "busy")
            assert int(answer.headers["retry-after"]) >= 1
        # Nobody else is kept waiting, and the session's settings can still be read.
        assert client.post("/api/sessions/free/run", json={"code": "print(1)"}).status_code == 200
        assert client.get("/api/sessions/busy").status_code == 200
        assert [future.result() for future in running] == [200, 200, 200]
        assert client.post("/api/sessions/busy/run", json={"code": "1"}).status_code == 200


# -- health and documents ---------------------------------------------------------------------------------------


def test_health_tells_that_it_is_well(client: httpx.Client) -> None:
    body = client.get("/health").json()
    assert body["status"] == "ok"
    assert body["languages"] == ["deno", "go", "node", "python", "typescript"]
    assert body["isolation"]["driver"] == "bubblewrap"
    assert len(body["isolation"]["summary"]) > 20


def samples(client: httpx.Client) -> dict[tuple[str, tuple[str, ...]], float]:
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_metrics_count_sessions_and_runs(client: httpx.Client, session: MakeSession, run: Run) -> None:
    assert samples(client)["era_sessions", ()] == 0
    where = session()
    before = samples(client)
    run(where, "1/0")
    after = samples(client)
    assert after["era_sessions", ()] == 1
    assert after["era_sandboxes", ("live",)] == 1
    key = ("era_runs", ("failed",))
    assert after[key] - before.get(key, 0) == 1


def test_the_description_of_the_api_is_valid_and_whole(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert re.fullmatch(r"3\.1\.\d+", document["openapi"])
    for name, schema in document["components"]["schemas"].items():
        jsonschema_rs.Draft202012Validator({**schema, "components": document["components"]}), name
    references = re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', json.dumps(document))
    assert set(references) == set(document["components"]["schemas"])
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            statuses = operation["responses"].keys()
            assert "422" not in statuses, (method, path)
            assert {"200", "201"} & statuses, (method, path)
            if path.startswith("/api/"):
                assert {"400", "401", "403"} <= statuses, (method, path)
                assert operation["summary"]
                assert operation["description"]
    for expected in ("/api/sessions", "/api/sessions/{session_id}", "/api/sessions/{session_id}/run", "/api/execute"):
        assert expected in document["paths"]


def test_documented_models_refuse_unknown_fields(client: httpx.Client) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    for name in ("CreateSession", "ChangeSession", "RunBody", "ExecuteBody", "CodeBody"):
        assert schemas[name]["additionalProperties"] is False


def test_docs_are_served(client: httpx.Client) -> None:
    answer = client.get("/docs")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
