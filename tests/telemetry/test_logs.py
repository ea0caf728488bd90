"""The log: what is in it, once, and what never is."""

from __future__ import annotations

import fcntl
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from era.telemetry import logs
from tests.api.owners import OPERATOR_KEY, client_with_key
from tests.conftest import Server, assert_nothing_left, eventually, mounts

CANARY = "canary-3f9a71"
"""Part of all that callers send in these tests but for ids."""

FAILING = """
import era.core.sessions.versions
async def list(self, session_id, *, limit, before):
    held = 'canary-3f9a71'
    raise RuntimeError('nobody expected this')
era.core.sessions.versions.Versions.list = list
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that logs JSON, and has a bug: versions can't be listed."""
    before, data_dir = mounts(), tmp_path_factory.mktemp("logs") / "data"
    settings = {"ERA_API_KEY": OPERATOR_KEY, "ERA_LOG_FORMAT": "json"}
    server = Server(data_dir, settings, weakness=FAILING)
    server.start()
    yield server
    processes = server.descendants()
    assert server.stop() == 0
    assert_nothing_left(before, processes, data_dir)


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with client_with_key(server, OPERATOR_KEY) as client:
        yield client
        client.delete("/api/sessions?purge=true")


def lines(server: Server) -> list[dict[str, Any]]:
    """The lines of the log."""
    return [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]


def of_request(server: Server, answer: httpx.Response) -> list[dict[str, Any]]:
    """The lines that this request brought about. They come before its answer has ended, or soon after."""
    request_id = answer.headers["X-Request-Id"]
    found = eventually(lambda: any(line["event"].startswith("request") for line in _of(server, request_id)))
    assert found, "the request is not in the log"
    return _of(server, request_id)


def _of(server: Server, request_id: str) -> list[dict[str, Any]]:
    return [line for line in lines(server) if line.get("request") == request_id]


def test_a_request_and_its_run_are_logged_once_each(server: Server, client: httpx.Client) -> None:
    client.post("/api/sessions", json={"language": "python", "session_id": "logged"})
    answer = client.post("/api/sessions/logged/run", json={"code": "import sys; sys.exit(3)"})
    run, request = of_request(server, answer)
    ids = {"session": "logged", "owner": "default"}
    assert run.items() >= {**ids, "event": "run", "run": answer.json()["run_id"], "kind": "run"}.items()
    assert run.items() >= {"language": "python", "outcome": "failed", "exit_code": 3, "committed": True}.items()
    stages = ["turn", "slot", "record", "sandbox", "program", "files", "outputs", "transaction"]
    assert all(run[f"{stage}_ms"] >= 0 for stage in stages)
    assert run["ms"] >= run["program_ms"] > 0
    route = "/api/sessions/{session_id}/run"
    assert request.items() >= {**ids, "event": "request", "method": "POST", "route": route, "status": 200}.items()
    assert request["key"] == "operator"
    assert request["ms"] >= run["ms"]


def test_a_refusal_says_which(server: Server, client: httpx.Client) -> None:
    run, request = of_request(server, client.post("/api/sessions/nobodys/run", json={"code": "1"}))
    assert run.items() >= {"event": "run", "outcome": "refused", "code": "not_found"}.items()
    assert request.items() >= {"event": "request", "level": "info", "status": 404, "code": "not_found"}.items()
    (request,) = of_request(server, httpx.get(f"{server.url}/api/sessions", trust_env=False))
    assert (request["status"], request["code"], "owner" in request) == (401, "unauthorized", False)


def test_a_bug_is_logged_once_with_its_traceback_and_without_values(server: Server, client: httpx.Client) -> None:
    client.post("/api/sessions", json={"language": "python", "session_id": "bug"})
    closed = {"Connection": "close"}  # the server closes it anyhow, soon after: no other request may be on its way
    answer = client.get("/api/sessions/bug/versions", headers=closed)
    assert answer.status_code == 500
    (line,) = of_request(server, answer)
    assert line.items() >= {"event": "request_failed", "level": "error", "status": 500, "session": "bug"}.items()
    assert "RuntimeError: nobody expected this" in line["exception"]
    assert server.log.count("nobody expected this") == 1
    assert CANARY not in server.log


def test_a_failure_of_the_servers_is_logged_once(server: Server, client: httpx.Client) -> None:
    client.post("/api/sessions", json={"language": "python", "session_id": "disk"})
    blobs = server.data_dir / "blobs"
    (server.data_dir / "blobs").rename(server.data_dir / "away")
    try:
        answer = client.post("/api/sessions/disk/run", json={"code": "open('new', 'w').write('text')"})
    finally:
        (server.data_dir / "away").rename(blobs)
    assert answer.status_code == 503
    run, request = of_request(server, answer)
    assert run.items() >= {"event": "run", "outcome": "not_committed", "code": "commit_failed"}.items()
    assert request.items() >= {"event": "request_failed", "level": "error", "code": "commit_failed"}.items()
    assert request["error"] == answer.json()["error"]
    assert [line["level"] for line in lines(server) if line.get("request") == request["request"]] == ["info", "error"]


def test_what_goes_on_besides_is_logged_too(server: Server, client: httpx.Client) -> None:
    fields = {"language": "python", "session_id": "besides", "allowPublicAccess": True}
    client.post("/api/sessions", json={**fields, "setup": {"commands": ["true"]}})
    client.put("/api/sessions/besides/code", json={"code": "pass"})
    client.put("/api/sessions/besides/inbox", json={"verify": None, "retries": 0})
    delivery = client.post("/proxy/besides/inbox", content=b"{}").json()["delivery_id"]

    def named(event: str, **fields: Any) -> list[dict[str, Any]]:
        return [line for line in lines(server) if line["event"] == event and line.items() >= fields.items()]

    ids = {"session": "besides", "owner": "default"}
    assert eventually(lambda: named("delivery", **ids, delivery=delivery, outcome="done", attempts=1))
    assert len(named("delivery", **ids)) == 1
    (setup,) = named("setup", **ids)
    assert (setup["outcome"], setup["commands"]) == ("completed", 1)
    (run,) = named("run", **ids)
    assert (run["kind"], run["run"]) == ("public", named("delivery", **ids)[0]["run"])
    assert named("sandbox_started", sandbox=run["sandbox"], use="session", language="python")
    client.delete("/api/sessions/besides")
    assert eventually(lambda: named("sandbox_closed", **ids, sandbox=run["sandbox"], reason="deleted"))


def test_nothing_that_is_users_is_in_the_log(server: Server, client: httpx.Client) -> None:
    """Not in one format alone: the other is made of the same fields."""
    where = "/api/sessions/silent"
    made = client.post(
        "/api/sessions",
        json={
            "language": "python",
            "session_id": "silent",
            "data": {"key": CANARY},
            "metadata": {"label": CANARY},
            "allowPublicAccess": True,
            "setup": {"envs": {"NAME": CANARY}, "commands": [f"echo {CANARY}; exit 1"]},
        },
    )
    assert made.status_code == 201, made.text
    assert eventually(lambda: client.get(where).json()["setup_status"] == "failed")
    code = f"""
import os, sys
print('{CANARY}', os.environ['VAR'], os.environ['TOKEN'])
open('{CANARY}', 'w').write('{CANARY}')
open('.session_data.json', 'w').write('{{"new": "{CANARY}"}}')
raise ValueError('{CANARY}')
"""
    secrets = {"TOKEN": {"value": CANARY, "hosts": ["api.example.test"]}}
    run = client.post(f"{where}/run", json={"code": code, "env": {"VAR": CANARY}, "secrets": secrets, "args": [CANARY]})
    assert run.json()["status"] == "failed", run.text
    assert CANARY in run.json()["stderr"]
    execute = {"language": "python", "code": f"print('{CANARY}')", "files": {CANARY: CANARY}}
    assert client.post("/api/execute", json=execute).is_success
    assert client.post(f"{where}/run", json={"code": f"not python {CANARY}", "stdin": CANARY}).is_success
    assert client.post(f"{where}/run", content=f'{{"code": "{CANARY}'.encode()).status_code == 400
    assert client.post(f"{where}/run", json={"code": "1", CANARY: 1}).status_code == 400
    assert client.post(f"{where}/run", json={"code": "1", "timeout": CANARY}).status_code == 400
    assert client.put(f"{where}/code", json={"code": f"print('{CANARY}')"}).is_success
    assert client.put(f"{where}/files/{CANARY}-dir/file", content=CANARY.encode()).is_success
    link = client.post(f"{where}/links", json={"path": f"{CANARY}-dir/file"}).json()["url"]
    assert httpx.get(link, trust_env=False).text == CANARY
    inbox = {"verify": {"scheme": "hmac", "secret": CANARY, "header": "X-Signature"}, "retries": 0}
    assert client.put(f"{where}/inbox", json=inbox).is_success
    for path in (f"/proxy/silent/{CANARY}?q={CANARY}", f"/proxy/silent/inbox/{CANARY}"):
        client.post(path, content=CANARY.encode(), headers={"X-Header": CANARY, "Cookie": f"a={CANARY}"})
    client.get(f"/api/{CANARY}?q={CANARY}")
    client.get(f"/api/sessions/{CANARY}%20x")
    client.get(f"/api/sessions?metadata.label={CANARY}")
    with server.client(headers={"Authorization": f"Bearer {CANARY}"}) as stranger:
        last = stranger.get("/api/sessions")
    token = link.rpartition("/")[2]
    assert of_request(server, last)
    assert len(lines(server)) > 20
    for secret in (CANARY, token, OPERATOR_KEY):
        assert secret not in server.log


IN_A_PROCESS = """
import logging, sys
from era.core.telemetry import Origin, RequestEnded, origin
from era.telemetry import logs
logs.log_from(sys.argv[1], sys.argv[2])
try:
    secret = "canary"
    raise ValueError("why")
except ValueError as error:
    failed = error
request = RequestEnded("req_1", "GET", "/api/x", 500, 0.0, 0.5, failure=failed)
logs.write(request)
logging.getLogger("uvicorn.error").error("Exception in ASGI application", exc_info=failed)
logging.getLogger("uvicorn.error").error("something else")
logging.getLogger("library").info("chatter")
origin.set(Origin("req_2"))
logs.log.warning("other", why="x")
"""


@pytest.mark.parametrize("form", ["console", "json"])
def test_libraries_log_in_the_same_form_and_repeat_no_traceback(form: str) -> None:
    command = [sys.executable, "-c", IN_A_PROCESS, "info", form]
    written = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert written.count("ValueError: why") == 1
    assert "canary\n" not in written
    assert "chatter" not in written
    if form == "console":
        assert "request_failed" in written
        assert "req_2" in written
    else:
        failed, library, other = map(json.loads, written.splitlines())
        assert (failed["event"], failed["level"], failed["request"]) == ("request_failed", "error", "req_1")
        assert (library["event"], library["level"]) == ("something else", "error")
        assert (other["event"], other["request"]) == ("other", "req_2")


PROBES = """
import sys
from era.core.telemetry import RequestEnded
from era.telemetry import logs
logs.log_from("info", "json")
for number, code in enumerate(["", "no_lease", "no_lease", "no_lease", "not_ready", "not_ready", "", "", "no_lease"]):
    status = 503 if code else 200
    for route in ("/ready", "/health"):
        logs.write(RequestEnded(f"{route} {number}", "GET", route, status, 0.0, 0.5, code=code or None))
"""


def test_a_probe_that_goes_on_failing_is_logged_once() -> None:
    written = subprocess.run([sys.executable, "-c", PROBES], capture_output=True, text=True, check=True).stderr
    lines = [(line["request"], line["event"]) for line in map(json.loads, written.splitlines())]
    for route in ("/ready", "/health"):
        assert [(request, event) for request, event in lines if request.startswith(route)] == [
            (f"{route} 1", "request_failed"),
            (f"{route} 4", "request_failed"),
            (f"{route} 6", "request"),
            (f"{route} 8", "request_failed"),
        ]


def test_levels_leave_out_what_is_less_severe() -> None:
    command = [sys.executable, "-c", IN_A_PROCESS, "error", "json"]
    written = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert [json.loads(line)["event"] for line in written.splitlines()] == ["request_failed", "something else"]


def test_a_log_that_cannot_be_written_stops_nothing() -> None:
    command = [sys.executable, "-c", IN_A_PROCESS + "print('went on')", "info", "json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, text=True, check=False)
    assert done.stdout == "went on\n"


def test_a_log_that_nobody_reads_stops_nothing() -> None:
    """Lines are left out for as long as there is no room, whole ones once there is some again."""
    code = IN_A_PROCESS.replace("logs.log.warning", "for _ in range(2000): logs.log.warning")
    code += "print('went on', flush=True)\nsys.stdin.read(1)\nlogs.log.warning('later', why='y' * 6000)\nprint('end')"
    command = [sys.executable, "-c", code, "info", "json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == b"went on\n"
        room = fcntl.fcntl(process.stderr.fileno(), fcntl.F_GETPIPE_SZ)  # one or two pages for a user with many pipes
        first = os.read(process.stderr.fileno(), 1 << 20)
        process.stdin.write(b"x")
        process.stdin.flush()
        assert process.stdout.readline() == b"end\n"
        *whole, _ = first.splitlines()
        events = [json.loads(line)["event"] for line in whole]
        assert (room - select.PIPE_BUF) * 0.9 < len(first) <= room  # the last page is written to, but not filled
        assert 0 < events.count("other") < 2000
        assert json.loads(process.stderr.read().splitlines()[-1])["event"] == "later"


def test_the_log_ends_quietly_with_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = logs._Unfailing(sys.stderr)
    monkeypatch.setattr(logs, "suppress", None)  # as names of modules are by the time that objects are closed
    stream.close()


def test_a_line_that_is_no_unicode_is_written_all_the_same() -> None:
    command = [sys.executable, "-c", IN_A_PROCESS + "logs.log.warning('odd', why='\\ud800')", "info", "json"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True)
    assert json.loads(done.stderr.splitlines()[-1])["why"] == "\ud800"
