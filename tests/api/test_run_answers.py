"""What a run and `/api/execute` answer, and what stored code does."""

from __future__ import annotations

import json
import re
import time

import httpx

from era.wire.runs import CodeAnswer, CodeStoredAnswer, ExecuteAnswer, RunAnswer
from tests.api.answers import RUN_KEYS, assert_recent, checked, refused
from tests.api.event_streams import numbered
from tests.api.told import TELLS_ITS_END, has_ended
from tests.conftest import MakeSession, Run
from tests.table import table


def test_a_run_answers_with_all_it_promises(client: httpx.Client, session: MakeSession) -> None:
    where = session(data={"n": 1})
    code = "import sys, time; print('out'); print('err', file=sys.stderr); time.sleep(0.1); sys.exit(3)"
    began = time.monotonic()
    body = checked(client.post(f"/api/sessions/{where}/run", json={"code": code}), RunAnswer, RUN_KEYS)
    assert re.fullmatch(r"\d+\.\d{3}s", body["duration"])
    assert 0.1 <= float(body["duration"].removesuffix("s")) <= time.monotonic() - began
    assert re.fullmatch(r"run_\d{13}_[a-z0-9]{9}", body["run_id"])
    assert {key: value for key, value in body.items() if key not in ("duration", "duration_ms", "run_id")} == {
        "exit_code": 3,
        "stdout": "out\n",
        "stderr": "err\n",
        "session_id": where,
        "data": {"n": 1},
        "status": "failed",
        "stdout_truncated": False,
        "stderr_truncated": False,
        "state": {"version": 1, "committed": True, "reason": None},
        "artifacts": [],
        "artifacts_more": 0,
    }


@table("persistent, second", [(True, "True 1\n"), (False, "False 1\n")])
def test_files_outlive_a_run_of_a_persistent_session_only_and_data_always(
    client: httpx.Client, session: MakeSession, run: Run, persistent: bool, second: str
) -> None:
    where = session(persistent=persistent, data={"n": 0})
    run(where, "open('kept', 'w').write('x'); open('.session_data.json', 'w').write('{\"n\": 1}')")
    code = "import os, json; print(os.path.exists('kept'), json.load(open('.session_data.json'))['n'])"
    assert run(where, code)["stdout"] == second
    assert client.get(f"/api/sessions/{where}").json()["file_count"] == int(persistent)


def test_stored_code_is_in_data_of_sessions_not_of_runs(client: httpx.Client, session: MakeSession, run: Run) -> None:
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
    data = {
        "n": 1,
        "code": code,
        "code_description": "shows the state",
        "code_updated_at": body["updated_at"],
    }
    assert client.get(path).json()["data"] == data
    assert client.get("/api/sessions").json()["sessions"][0]["data"] == data

    for fields in ({}, {"code": None}):
        ran = run(where, **fields)
        assert (json.loads(ran["stdout"]), ran["data"]) == ({"n": 1}, {"n": 1})
    assert run(where, "print('own')")["stdout"] == "own\n"
    assert run(where, "")["stdout"] == ""
    # A client that reads data, changes a part and sends it back stores no code in it.
    assert client.patch(path, json={"data": {**data, "n": 2}}).json()["metadata"]["data"] == {**data, "n": 2}
    assert json.loads(run(where)["stdout"]) == {"n": 2}
    # Storing code replaces code and description.
    client.put(f"{path}/code", json={"code": "print('new')"})
    assert client.get(f"{path}/code").json()["description"] is None
    assert client.get(path).json()["data"]["code_description"] is None
    assert run(where)["stdout"] == "new\n"


ADD_ONE = "from era_state import state\nwith state() as data: data['n'] = data.get('n', 0) + 1"


def test_own_key_code_of_data_when_code_is_stored(client: httpx.Client, session: MakeSession, run: Run) -> None:
    own = {"code": "mine", "n": 0}
    where = session(data=own)
    path = f"/api/sessions/{where}"
    updated_at = client.put(f"{path}/code", json={"code": ADD_ONE}).json()["updated_at"]
    seen = {"code_description": None, "code_updated_at": updated_at}  # those that the user's data doesn't have

    def kept() -> object:
        """The session's data without a view."""
        version = client.get(path).json()["version"]
        return client.get(f"{path}/versions/{version}").json()["data"]

    assert client.get(path).json()["data"] == {**own, **seen}
    assert client.get("/api/sessions").json()["sessions"][0]["data"] == {**own, **seen}
    key = {"Idempotency-Key": "one"}
    ran = client.post(f"{path}/run", json={}, headers=key).json()
    assert ran["data"] == {"code": "mine", "n": 1} == kept()
    assert client.post(f"{path}/run", json={}, headers=key).json() == ran
    assert run(where, "print(open('.session_data.json').read())")["data"] == ran["data"]
    events = client.get(f"{path}/runs/{ran['run_id']}/events").text
    assert '"data":{"code":"mine","n":1}' in events.replace(": ", ":").replace(", ", ",")

    # What GET showed is sent back, also where the user's value happens to be that of the stored code.
    shown = client.get(path).json()["data"]
    assert client.patch(path, json={"data": {**shown, "n": 5}}).json()["metadata"]["data"] == {**shown, "n": 5}
    assert kept() == {"code": "mine", "n": 5}
    client.patch(path, json={"data": {"code": "theirs", "n": 5}})
    client.put(f"{path}/code", json={"code": "theirs"})
    client.patch(path, json={"data": client.get(path).json()["data"]})
    assert kept() == {"code": "theirs", "n": 5}
    # A program's own keys stay, whatever they are called.
    program = f"open('.session_data.json', 'w').write('{{\"code\": 1, \"code_updated_at\": \"{updated_at}\"}}')"
    left = {"code": 1, "code_updated_at": updated_at}
    assert run(where, program)["data"] == left == kept()
    assert client.get(path).json()["data"] == {**left, "code_description": None}


HELLO = {
    "python": "import os; print('hi', open('d/in.txt').read(), os.environ['ERA_LANGUAGE'], os.environ['A'])",
    "node": "console.log('hi', require('fs').readFileSync('d/in.txt') + '', process.env.ERA_LANGUAGE, process.env.A)",
    "typescript": "import fs from 'fs'; const a: string = process.env.A!;\n"
    "console.log('hi', fs.readFileSync('d/in.txt', 'utf8'), process.env.ERA_LANGUAGE, a)",
}

STREAMED = {"Accept": "text/event-stream"}
EXECUTE_KEYS = RUN_KEYS - {"session_id", "data", "state", "artifacts", "artifacts_more"} | {"language", "vm_id"}


@table("name, language", [("python", "python"), ("py", "python"), ("js", "node"), ("ts", "typescript")])
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
"""
    wanted = {"language": "python", "timeout": 3, "files": {"main.py": "a file of mine"}}
    for program, outcome in ((f"{code}time.sleep(30)", (124, "timeout")), (code, (0, "ok"))):
        body = client.post("/api/execute", json={**wanted, "code": program}).json()
        assert (body["exit_code"], body["status"]) == outcome
        assert body["stdout"] == "False\na file of mine\n"


def test_execute_streams_what_the_plain_answer_has(client: httpx.Client) -> None:
    code = "import sys, time; print('oüt', flush=True); time.sleep(0.1); print('err', file=sys.stderr); sys.exit(3)"
    wanted = {"language": "python", "code": code}
    with client.stream("POST", "/api/execute", json=wanted, headers=STREAMED) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = list(numbered(answer))
    assert [number for number, _, _ in events] == [1, 2, 3]
    assert [(kind, data.get("content")) for _, kind, data in events[:2]] == [("stdout", "oüt\n"), ("stderr", "err\n")]
    _, kind, done = events[-1]
    assert (kind, done["exit_code"], done["status"]) == ("done", 3, "failed")
    assert set(done) == EXECUTE_KEYS - {"stdout", "stderr"} | {"type"}


@table(
    "accept",
    [
        "application/json, text/event-stream",
        "text/event-stream;q=0.1, */*",
        "text/event-stream, */*",
        "text/event-stream;q=0, */*;q=0.1",
        "text/event-stream;charset=utf-8;q=0.5, application/json;q=0.50",
        "text/html, application/xhtml+xml, application/xml;q=0.9, */*;q=0.8",
        "text/plain",
        "*/*",
        "",
    ],
)
def test_execute_answers_json_to_whoever_takes_that(client: httpx.Client, accept: str) -> None:
    wanted = {"language": "python", "code": "print(1)"}
    answer = client.post("/api/execute", json=wanted, headers={"Accept": accept})
    assert checked(answer, ExecuteAnswer, EXECUTE_KEYS)["stdout"] == "1\n"


@table(
    "accept",
    [
        "text/event-stream, */*;q=0.9",
        "application/json; q=0.2, Text/Event-Stream; Q=0.3",
        "text/*",
        "*/*, application/json;q=0",
    ],
)
def test_execute_streams_to_whoever_wants_that_more(client: httpx.Client, accept: str) -> None:
    wanted = {"language": "python", "code": "print(1)"}
    with client.stream("POST", "/api/execute", json=wanted, headers={"Accept": accept}) as answer:
        assert [kind for _, kind, _ in numbered(answer)] == ["stdout", "done"]


def test_the_program_of_a_stream_that_nobody_reads_any_more_ends(client: httpx.Client) -> None:
    with client.stream(
        "POST", "/api/execute", json={"language": "python", "code": TELLS_ITS_END, "timeout": 300}, headers=STREAMED
    ) as answer:
        assert next(numbered(answer))[2]["content"] == "on\n"
        assert client.get("/api/storage/kv/ends/one").json()["value"] != "told"
    assert has_ended(client)
