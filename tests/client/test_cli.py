"""The `era` command as its users type it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from tests.client.command import environment, era, era_bytes
from tests.conftest import ERA, Server


def test_a_file_runs_and_the_command_leaves_with_its_exit_code(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "bye.py"
    file.write_text("import sys, os; print('out'); print(os.environ['WHO'], file=sys.stderr); sys.exit(3)")
    done = era(server, "run", "--env", "WHO=Ada", str(file))
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "Ada\n", 3)


def test_arguments_and_standard_input(server: Server, tmp_path: Path) -> None:
    file, given = tmp_path / "show.py", tmp_path / "given.txt"
    file.write_text("import sys; print(sys.argv[1:], repr(sys.stdin.read()))")
    given.write_text("süß\n")
    done = era(server, "run", "--stdin", given, file, "one", "--two", "--", "-s", "three four", code=0)
    assert done.stdout == "['one', '--two', '--', '-s', 'three four'] 'süß\\n'\n"
    done = era(server, "run", "--session", "called", file, stdin="piped", code=0)
    assert done.stdout == "[] 'piped'\n"
    done = era(server, "run", "-c", "import sys; print(sys.argv[1:], sys.stdin.read())", "-x", stdin="piped", code=0)
    assert done.stdout == "['-x'] piped\n"
    assert era(server, "exec", "called", "cat", stdin="piped", code=0).stdout == "piped"
    assert "both" in era(server, "run", "--stdin", "-", "-l", "py", "-", stdin="x", code=2).stderr


def test_a_silent_pipe_is_waited_for_with_a_notice(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cat.py").write_text("import sys; print(sys.stdin.read())")
    command = [str(ERA), "run", str(tmp_path / "cat.py")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment(server), stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stderr is not None
        assert "waiting for the end of standard input" in process.stderr.readline()
        out, _ = process.communicate("at last", timeout=60)
    assert (out, process.returncode) == ("at last\n", 0)


def test_an_idempotency_key_runs_once(server: Server) -> None:
    words = ("run", "-l", "py", "-s", "keyed", "--idempotency-key", "k1", "-c", "open('n', 'a').write('x')")
    for _ in range(2):
        era(server, *words, code=0)
    assert era(server, "files", "read", "keyed", "n", code=0).stdout == "x"


def test_texts_keep_their_line_ends(server: Server, tmp_path: Path) -> None:
    given = tmp_path / "given.csv"
    given.write_bytes(b"a\r\nb\r")
    code = "import sys; print(sys.stdin.buffer.read(), open('beside', 'rb').read())"
    words = ("run", "--once", "-l", "py", "--stdin", given, "--file", f"beside={given}", "-")
    assert era(server, *words, stdin=code, code=0).stdout == r"b'a\r\nb\r' b'a\r\nb\r'" + "\n"
    era(server, "storage", "kv", "set", "texts", "crlf", stdin="a\r\nb\r", code=0)
    assert era_bytes(server, "storage", "kv", "get", "texts", "crlf", code=0).stdout == b"a\r\nb\r\n"


@pytest.mark.parametrize("words", [("storage", "kv", "set", "n", "k"), ("run", "-l", "py", "-")])
def test_standard_input_that_is_no_text_is_refused(server: Server, words: tuple[str, ...]) -> None:
    assert b"- can't be read" in era_bytes(server, *words, stdin=b"\xff", code=2).stderr


@pytest.mark.parametrize("kind", ["kv", "r2"])
def test_what_is_not_stored_is_no_success(server: Server, kind: str) -> None:
    words = ("storage", kind, "get", "empty", "nokey")
    assert "There is no" in era(server, *words, code=2).stderr
    done = era(server, *words, "--json", code=2)
    assert (done.stdout, json.loads(done.stderr)["code"]) == ("null\n", "not_found")


@pytest.mark.parametrize("session", [".", "..", "../health"])
def test_an_id_is_never_another_path(server: Server, session: str) -> None:
    done = era(server, "run", "-l", "py", "-s", session, "-", stdin="print(1)", code=2)
    assert "session" in done.stderr


@pytest.mark.parametrize("ending", ["js", "ts"])
def test_the_ending_decides_the_language(server: Server, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"hello.{ending}"
    file.write_text("console.log(process.env.ERA_LANGUAGE)")
    assert era(server, "run", str(file)).stdout == {"js": "node\n", "ts": "typescript\n"}[ending]


def test_a_session_remembers(server: Server, client: httpx.Client) -> None:
    code = (
        "import json; data = json.load(open('.session_data.json')); data['n'] += 1\n"
        "json.dump(data, open('.session_data.json', 'w')); print(data['n'])"
    )
    words = ("run", "--language", "python", "--session", "counter")
    assert era(server, *words, "--data", '{"n": 5}', "-", stdin=code).stdout == "6\n"
    assert era(server, *words, "-", stdin=code).stdout == "7\n"
    assert era(server, *words, "--data", '{"n": 0}', "-", stdin=code).stdout == "1\n"
    assert client.get("/api/sessions/counter").json()["data"] == {"n": 1}


def test_a_failure_is_reported(server: Server, tmp_path: Path) -> None:
    lasts = tmp_path / "lasts.py"
    lasts.write_text("import time\nprint('so far', flush=True)\ntime.sleep(600)")
    done = era(server, "run", "--timeout", "5", str(lasts))
    assert (done.stdout, done.returncode) == ("so far\n", 124)
    assert "timeout" in done.stderr
    breaks = era(server, "run", "-l", "py", "-s", "s", "-", stdin="open('.session_data.json', 'w').write('{')")
    assert breaks.returncode == 0
    assert "nothing was kept" in breaks.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "/nonexistent.py"), "can't be read"),
        (("run", "-"), "--language"),
        (("run", "--language", "cobol", "-"), "not a language"),
        (("run", "--data", "{}", "-"), "--session"),
        (("run", "--data", "[1]", "--session", "s", "-"), "not a JSON object"),
        (("run", "--env", "SURELY_NOT_SET", "-l", "py", "-"), "no value"),
        (("run", "--session", "none", "--timeout", "1", "-"), "There is no session 'none'"),
    ],
)
def test_mistakes_are_reported(server: Server, words: tuple[str, ...], message: str) -> None:
    done = era(server, *words, stdin="print(1)", code=2)
    assert done.stderr.startswith("era: ")
    assert message in done.stderr


def test_no_server() -> None:
    done = era(None, "run", "-l", "py", "--server", "http://127.0.0.1:9", "-", stdin="1", code=2)
    assert "http://127.0.0.1:9" in done.stderr
    assert "era serve" in done.stderr


def test_a_server_with_a_key(own_server: Callable[..., Server], tmp_path: Path) -> None:
    server = own_server(api_key="sesame")
    file = tmp_path / "f.py"
    file.write_text("print('in')")
    assert era(server, "run", str(file), env={"ERA_API_KEY": "sesame"}).stdout == "in\n"
    refused = era(server, "run", str(file), code=2)
    assert "key" in refused.stderr


def test_doctor_reports_each_wall() -> None:
    done = era(None, "doctor", code=0)
    assert "\nbubblewrap: works" in done.stdout
    assert re.search(r"^ok       go \d+\.\d+", done.stdout, re.MULTILINE)
    assert "ok       programs start and run in deno, node, python, shell, typescript\n" in done.stdout
    uid = "ok       a host uid" if os.geteuid() == 0 else "missing  a host uid"
    assert uid in done.stdout
    for line, after in pairwise([*done.stdout.splitlines(), ""]):
        if line.startswith("missing"):
            assert len(after.strip()) > 20, f"no remedy for {line}"


NO_PARENT = {"ERA_CGROUP_PARENT": "/era-of-nobody"}
NOT_BOUNDED = "ERA_CGROUP_PARENT is /era-of-nobody, and sandboxes can't be bounded there"


def test_control_groups_where_no_parent_is_are_refused(tmp_path: Path) -> None:
    refused = era(None, "serve", "--data-dir", tmp_path / "d", "--port", "0", code=2, env=NO_PARENT)
    assert NOT_BOUNDED in refused.stderr


@pytest.mark.soak  # that doctor reports walls is shown above
def test_doctor_reports_control_groups_where_no_parent_is() -> None:
    assert "\nbubblewrap: can't be had\nmissing  " + NOT_BOUNDED in era(None, "doctor", code=1, env=NO_PARENT).stdout


@pytest.mark.parametrize(
    ("words", "env", "message"),
    [
        (("--host", "0.0.0.0"), {}, "Set ERA_API_KEY"),
        (("--host", "0.0.0.0"), {"ERA_API_KEY": ""}, "Set ERA_API_KEY"),
        ((), {"ERA_MEMORY_MB": "lots"}, "ERA_MEMORY_MB"),
        ((), {"ERA_PORT": "70000"}, "ERA_PORT"),
        (("--log-level", "loud"), {}, "ERA_LOG_LEVEL"),
        ((), {"ERA_CGROUP_PARENT": "/era/../other"}, "ERA_CGROUP_PARENT"),
    ],
)
def test_serve_refuses_wrong_settings(
    tmp_path: Path, words: tuple[str, ...], env: dict[str, str], message: str
) -> None:
    done = era(None, "serve", "--data-dir", tmp_path / "d", *words, code=2, env=env)
    assert message in done.stderr
