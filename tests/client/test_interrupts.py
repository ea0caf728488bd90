"""Ctrl-C while a run is followed asks it to stop, and shows what it still says; and other ends of a command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from tests.client.command import environment, era
from tests.client.test_start import imported
from tests.conftest import ERA, Server, eventually
from tests.sdk.cutter import Cutter, cut_once_after

STUBBORN = """import signal, sys, time
def end(*_):
    print("ending", flush=True)
    sys.exit(5)
signal.signal(signal.SIGTERM, end)
print("begun", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("words", [("-s", "kept"), ()], ids=["a session", "none"])
def test_ctrl_c_stops_the_run(server: Server, client: httpx.Client, tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "p.py").write_text(STUBBORN)
    command = [str(ERA), "run", "--timeout", "500", *words, "p.py"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(server),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out == "ending\n"
    assert "asking the run to stop" in err
    assert "Traceback" not in err
    assert process.returncode == 130
    if words:
        (record,) = client.get("/api/sessions/kept/runs").json()["runs"]
        assert record["status"] == "killed"
    else:
        assert client.get("/api/sessions").json()["count"] == 0


COUNTING = """import itertools, signal, sys, time
def end(*_):
    print("ending", flush=True)
    sys.exit(5)
signal.signal(signal.SIGTERM, end)
for n in itertools.count():
    print(n, flush=True)
    time.sleep(0.05)
"""


def test_ctrl_c_stops_a_run_whose_answer_is_printed_as_json(
    server: Server, client: httpx.Client, tmp_path: Path
) -> None:
    """With all that it has printed, also before."""
    (tmp_path / "p.py").write_text(COUNTING)
    command = [str(ERA), "run", "--timeout", "500", "-s", "kept", "-l", "python", "--json", "p.py"]
    cut, goes_on = cut_once_after(b"7\\n"), threading.Event()

    def watch(number: int, came: bytes) -> bool:
        if cut(number, came):
            return True
        if b"9\\n" in came:  # on another connection: so the command knows of the run
            goes_on.set()
        return False

    with (
        Cutter(server.url, watch) as way,
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment(None, ERA_SERVER=way.url),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert goes_on.wait(60)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    answer = json.loads(out)
    *numbers, last = answer["stdout"].splitlines()
    assert (numbers, last) == ([str(n) for n in range(len(numbers))], "ending")
    assert answer["status"] == "killed"
    (record,) = client.get("/api/sessions/kept/runs").json()["runs"]
    assert (record["run_id"], record["status"]) == (answer["run_id"], "killed")


ENDLESS = "import time\nwhile True:\n    print('on', flush=True)\n    time.sleep(0.05)"


@pytest.mark.parametrize("words", [("exec", "kept", "--timeout", "500", "--", "yes"), ("runs", "follow", "kept")])
def test_a_run_is_stopped_with_the_pipe_of_whoever_started_it(
    server: Server, client: httpx.Client, words: tuple[str, ...]
) -> None:
    client.post("/api/sessions", json={"language": "python", "session_id": "kept"}).raise_for_status()
    runs = "/api/sessions/kept/runs"
    if words[0] == "runs":
        begun = client.post("/api/sessions/kept/run", json={"code": ENDLESS, "timeout": 500, "background": True})
        words = (*words, begun.json()["run_id"])
    command = [str(ERA), *words]
    pipe, none = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, env=environment(server), stdin=none, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (128 + signal.SIGPIPE, b"")
    (record,) = client.get(runs).json()["runs"]
    if words[0] == "exec":
        assert record["status"] == "killed"
    else:
        assert record["status"] == "running"
        client.delete(f"{runs}/{record['run_id']}").raise_for_status()


def test_a_run_without_a_session_leaves_none(server: Server, client: httpx.Client) -> None:
    assert era(server, "run", "-l", "py", "-", stdin="print(1)", code=0).stdout == "1\n"
    assert era(server, "run", "-l", "py", "-", stdin="import sys; sys.exit('no')", code=1).stderr == "no\n"
    assert client.get("/api/sessions").json()["count"] == 0


def test_a_run_in_the_background(server: Server, client: httpx.Client) -> None:
    run = era(server, "run", "-l", "py", "-s", "back", "-b", "-", stdin="print('later')", code=0).stdout.strip()
    assert era(server, "runs", "follow", "back", run, code=0).stdout == "later\n"
    assert eventually(lambda: client.get(f"/api/sessions/back/runs/{run}").json()["status"] == "ok")


def test_errors_as_json(server: Server) -> None:
    told = json.loads(era(server, "sessions", "get", "none", "--json", code=2).stderr)
    assert told["code"] == "not_found"
    assert told["request_id"]
    assert json.loads(era(server, "sessions", "gte", "--json", code=2).stderr)["code"] == "usage"


def test_a_reader_that_has_enough(server: Server) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{ERA} --help | head -1"], capture_output=True, text=True, env=environment(server), timeout=60
    )
    assert (done.stdout, done.stderr) == ("usage: era COMMAND …\n", "")


def test_a_listing_can_do_nothing_to_a_terminal(server: Server, client: httpx.Client) -> None:
    client.post("/api/sessions", json={"language": "python", "session_id": "s"})
    client.put("/api/sessions/s/files/a%1B%5B31mb", content=b"")
    shown = era(server, "files", "list", "s", code=0).stdout
    assert "\x1b" not in shown
    assert "a\ufffd[31mb" in shown


SERVER_CODE = ("era.core", "era.api", "era.app", "era.wire", "era.store", "fastapi", "uvicorn", "sqlalchemy")
SLOW = ("httpx", "pydantic", "rich", "asyncio", "pathspec", "tarfile")


@pytest.mark.parametrize("words", [("run", "none.py"), ("sessions", "list"), ("files", "list", "s"), ("run", "--help")])
def test_commands_import_nothing_of_the_server_and_nothing_slow(words: tuple[str, ...]) -> None:
    _, modules, _ = imported(*words, ERA_SERVER="http://127.0.0.1:9")
    assert [name for name in modules if name.startswith(SERVER_CODE)] == []
    assert [name for name in modules if name.partition(".")[0] in SLOW] == []


def test_the_sdk_imports_nothing_of_the_server_and_nothing_slow() -> None:
    for name, slow in (("Era", SLOW), ("AsyncEra", ("pydantic", "tarfile"))):
        command = [sys.executable, "-X", "importtime", "-c", f"from era import {name}"]
        err = subprocess.run(command, capture_output=True, text=True, env=environment(None), timeout=60).stderr
        modules = {line.rpartition("|")[2].strip() for line in err.splitlines()}
        assert f"era.sdk.{'aio' if name == 'AsyncEra' else 'sync'}.sessions" in modules
        assert [name for name in modules if name.startswith(SERVER_CODE)] == []
        assert [name for name in modules if name.partition(".")[0] in slow] == []


@pytest.mark.parametrize(
    ("words", "variables"),
    [
        (("sessions", "list"), {"ERA_API_KEY": "a\nX-Evil: 1"}),
        (("sessions", "list"), {"ERA_API_KEY": "schlüssel"}),
        (("sessions", "list", "--server", "http://"), {}),
        (("sessions", "list", "--server", "http://[::1"), {}),
        (("sessions", "list", "--server", "http://x:99999"), {}),
        (("sessions", "list", "--server", "http://a b"), {}),
        (("sessions", "create", "python", "--data", "[" * 100_000), {}),
        (("sessions", "create", "python", "--data", '{"n": NaN}'), {}),
        (("sessions", "create", "python", "--metadata", "x"), {}),
        (("sessions", "list", "--limit", "x"), {}),
        (("sessions", "create", "python", "--data", '{"n": 1e999}'), {}),
        (("sessions", "update", "s", "--timeout", "nan"), {}),
        (("exec", "s", "--timeout", "inf", "true"), {}),
        (("login", "http://[::1"), {}),
        (("mcp", "--server", "http://[::1"), {}),
        (("run", "none.py"), {}),
        (("run", "-l", "py", "-", "a"), {}),
        ((b"sessions", b"get", b"\xff"), {}),
        ((b"storage", b"kv", b"set", b"n", b"k", b"\xff"), {}),
        (("files", "read", "s"), {}),
        (("export", "s", "--frobnicate"), {}),
    ],
)
def test_what_is_wrong_is_one_message(words: tuple[str | bytes, ...], variables: dict[str, str]) -> None:
    """Never a traceback, and never another exit code; there is no server."""
    env = environment(None, ERA_SERVER="http://127.0.0.1:9", **variables)
    done = subprocess.run([ERA, *words], capture_output=True, text=True, env=env, input="", timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("era: "), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
