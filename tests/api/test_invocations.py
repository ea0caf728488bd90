"""How runs are called, over HTTP: arguments, standard input, directory, commands, the language shell."""

from __future__ import annotations

import json
from typing import Any

import httpx

from tests.api.answers import refused
from tests.api.event_streams import event_data
from tests.conftest import MakeSession
from tests.table import table

SHOW = "import os, sys; print(sys.argv[1:], os.getcwd(), repr(sys.stdin.read()))"


def _streamed(client: httpx.Client, session_id: str, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    answer = client.post(f"/api/sessions/{session_id}/stream", json=body)
    assert answer.status_code == 200, answer.text
    events = list(event_data(answer))
    assert events[-1]["type"] == "done"
    return "".join(event["content"] for event in events[:-1] if event["type"] == "stdout"), events[-1]


@table("way", ["run", "stream", "stored", "execute"])
def test_every_call_that_runs_code_takes_them(client: httpx.Client, session: MakeSession, way: str) -> None:
    body: dict[str, Any] = {"args": ["a", "b c"], "stdin": "grüße\n", "cwd": "in/side", "code": SHOW}
    session_id = session()
    assert client.put(f"/api/sessions/{session_id}/files/in/side/x", content=b"").status_code == 200
    if way == "execute":
        answer = client.post("/api/execute", json={**body, "language": "python", "files": {"in/side/x": ""}}).json()
    elif way == "stream":
        stdout, answer = _streamed(client, session_id, body)
        answer["stdout"] = stdout
    else:
        if way == "stored":
            client.put(f"/api/sessions/{session_id}/code", json={"code": body.pop("code")}).raise_for_status()
        answer = client.post(f"/api/sessions/{session_id}/run", json=body).json()
    assert (answer["exit_code"], answer["stdout"]) == (0, "['a', 'b c'] /workspace/in/side 'grüße\\n'\n"), answer


@table("command", [["sh", "-c", 'echo "$0"; cat', "zero"], "echo zero; cat"])
def test_a_command_runs_in_place_of_code_and_what_it_leaves_is_kept(
    client: httpx.Client, session: MakeSession, command: list[str] | str
) -> None:
    session_id = session(data={"n": 1})
    answer = client.post(f"/api/sessions/{session_id}/run", json={"command": command, "stdin": "one\n"}).json()
    assert (answer["stdout"], answer["status"], answer["data"]) == ("zero\none\n", "ok", {"n": 1})
    line = """echo '{"n": 2}' > .session_data.json; echo kept > note; exit 3"""
    answer = client.post(f"/api/sessions/{session_id}/run", json={"command": line}).json()
    assert (answer["exit_code"], answer["status"], answer["data"]) == (3, "failed", {"n": 2})
    assert answer["state"]["committed"]
    assert client.get(f"/api/sessions/{session_id}/files/note").text == "kept\n"


def test_a_command_that_is_not_there_says_so(client: httpx.Client, session: MakeSession) -> None:
    answer = client.post(f"/api/sessions/{session()}/run", json={"command": ["no-such-program", "x"]}).json()
    assert (answer["exit_code"], answer["status"]) == (127, "failed")
    assert "no-such-program" in answer["stderr"]


def test_a_session_of_the_shell(client: httpx.Client, session: MakeSession) -> None:
    session_id = session("bash", data={"n": 41})
    assert client.get(f"/api/sessions/{session_id}").json()["language"] == "shell"
    code = """
words=("$@")
echo "${#words[@]} ${words[1]}"
n=$(tr -dc 0-9 < .session_data.json)
echo "{\\"n\\": $((n + 1))}" > .session_data.json
ls -a
"""
    answer = client.post(f"/api/sessions/{session_id}/run", json={"code": code, "args": ["a", "b c"]}).json()
    assert answer["stdout"].splitlines() == ["2 b c", ".", "..", ".session_data.json", "main.sh"], answer
    assert answer["data"] == {"n": 42}
    assert client.get(f"/api/sessions/{session_id}/files").json()["count"] == 0


@table(
    "body, status, words",
    [
        ({"code": "1", "command": "ls"}, 400, ["both"]),
        ({"command": "ls", "args": ["-l"]}, 400, ["'command'"]),
        ({"command": ""}, 400, ["no program"]),
        ({"command": "  "}, 400, ["no program"]),
        ({"command": []}, 400, ["command", "names no program"]),
        ({"command": ["", "x"]}, 400, ["no program"]),
        ({"command": ["ls", "a\0b"]}, 400, ["NUL"]),
        ({"code": "1", "args": ["a\0b"]}, 400, ["NUL"]),
        ({"code": "1", "args": "a b"}, 400, ["args"]),
        ({"code": "1", "args": [1]}, 400, ["args"]),
        ({"code": "1", "args": ["a"] * 1001}, 400, ["args"]),
        ({"code": "1", "args": ["a" * (128 << 10)]}, 413, ["128 KiB"]),
        ({"code": "1", "args": ["a" * 60_000] * 20}, 413, ["1 MiB"]),
        ({"code": "1", "args": ["\ud800"]}, 400, ["surrogate"]),
        ({"code": "1", "stdin": "\ud800"}, 400, ["surrogate"]),
        ({"code": "1", "stdin": 5}, 400, ["stdin"]),
        ({"code": "1", "cwd": "/etc"}, 400, ["path"]),
        ({"code": "1", "cwd": "/"}, 400, ["path"]),
        ({"code": "1", "cwd": "../other"}, 400, [".."]),
        ({"code": "1", "cwd": "a/../.."}, 400, [".."]),
        ({"code": "1", "cwd": "a//b"}, 400, ["empty part"]),
        ({"code": "1", "cwd": "a\0b"}, 400, ["NUL"]),
        ({"code": "1", "cwd": "\ud800"}, 400, ["surrogate"]),
    ],
)
@table("way", ["run", "execute"])
def test_what_no_program_can_be_called_with_is_refused(
    client: httpx.Client, session: MakeSession, way: str, body: dict[str, Any], status: int, words: list[str]
) -> None:
    if way == "execute":
        path, body = "/api/execute", {"language": "python", **body}
    else:
        path = f"/api/sessions/{session()}/run"
    answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    refused(answer, status, *words)


def test_an_execute_call_needs_code_or_a_command(client: httpx.Client) -> None:
    refused(client.post("/api/execute", json={"language": "python"}), 400, "code", "command")


def test_input_of_one_run_is_gone_in_the_next(client: httpx.Client, session: MakeSession) -> None:
    session_id = session()
    answer = client.post(f"/api/sessions/{session_id}/run", json={"code": SHOW, "stdin": "canary", "args": ["x"]})
    assert "canary" in answer.json()["stdout"]
    look = "import os, sys; print(sys.argv, repr(sys.stdin.read()), sorted(os.listdir('/proc/self/fd')))"
    answer = client.post(f"/api/sessions/{session_id}/run", json={"code": look}).json()
    assert answer["stdout"] == "['main.py'] '' ['0', '1', '2', '3']\n"  # 3 is the directory that is listed
