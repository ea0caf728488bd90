"""Commands of a setup, and the events of a setup under way."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.answers import RUN_KEYS, refused
from tests.api.event_streams import event_data
from tests.api.setups import make, settled
from tests.conftest import MakeServer, Run, Server, eventually
from tests.gvisor import needs_gvisor, of_kind
from tests.packages.registry import serving, wheel
from tests.table import table


def version_causes(client: httpx.Client, where: str) -> list[str]:
    """The causes of a session's versions, oldest first."""
    found = client.get(f"/api/sessions/{where}/versions").json()["versions"]
    return [each["cause"] for each in reversed(found)]


@contextmanager
def following(client: httpx.Client, where: str) -> Iterator[Iterator[dict[str, Any]]]:
    """Follow a session's setup; yields an iterator of its events as they come."""
    with client.stream("GET", f"/api/sessions/{where}/setup/events", timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield event_data(answer)


def all_events(client: httpx.Client, where: str) -> list[dict[str, Any]]:
    """The events of a session's setup until its end."""
    with following(client, where) as events:
        return list(events)


@table("language", ["python", "node"])
def test_files_made_by_commands_are_the_sessions(client: httpx.Client, run: Run, language: str) -> None:
    commands = ["mkdir -p made && pwd > made/here", "ls -A; echo oops >&2", "yes | head -1 >> made/here"]
    commands += ['echo "$A $ERA_SESSION_ID" > named']
    where = make(client, {"commands": commands, "envs": {"A": "a b"}}, language)
    shown = settled(client, where)
    result = shown["setup_result"]
    assert (result["commands_run"], result["error"]) == (commands, None)
    assert result["stdout"].splitlines() == [
        *(f"$ {commands[0]}", f"$ {commands[1]}", ".session_data.json", "made"),
        *(f"$ {commands[2]}", f"$ {commands[3]}"),
    ]
    assert result["stderr"] == "oops\n"
    assert shown["version"] == 2
    assert version_causes(client, where) == ["create", "setup"]
    assert client.get(f"/api/sessions/{where}/files/made/here").text == "/workspace\ny\n"
    assert client.get(f"/api/sessions/{where}/files/named").text == f"a b {where}\n"
    code = "print(open('made/here').read())" if language == "python" else "console.log(require('fs').readdirSync('.'))"
    assert ("/workspace" if language == "python" else "'made'") in run(where, code)["stdout"]


def test_commands_have_packages_and_files(own_server: MakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as registry:
        registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))
        for name, value in registry.environment().items():
            monkeypatch.setenv(name, value)
        server = own_server()
        with server.client() as client:
            where = client.post("/api/sessions", json={"language": "python"}).json()["id"]
            client.put(
                f"/api/sessions/{where}/files/mine.py", content=b"import one; open('got', 'w').write(str(one.x))"
            )
            harm = "touch /opt/env/evil; touch $(dirname $(python3 -c 'import one; print(one.__file__)'))/evil; true"
            client.patch(
                f"/api/sessions/{where}", json={"setup": {"pip": ["one"], "commands": [harm, "python3 mine.py"]}}
            )
            events = all_events(client, where)
            assert (events[0]["type"], events[-1]["type"]) == ("status", "done")
            assert [event["setup_status"] for event in events if event["type"] == "status"][-1] == "running"
            lines = [event for event in events if event["type"] == "line"]
            assert {"type": "line", "stream": "stdout", "text": "$ python3 mine.py"} in lines
            assert {"type": "line", "stream": "stderr", "text": " + one==1.0"} in lines, "uv's own words"
            done = events[-1]
            assert done["setup_result"]["pip_packages"] == ["one==1.0"]
            assert done["setup_result"] == settled(client, where)["setup_result"]
            assert client.get(f"/api/sessions/{where}/files/got").text == "1"
            assert not [*server.data_dir.glob("environments/**/evil"), *server.data_dir.glob("cache/**/evil")]
            gap = {"type": "gap", "from": 1, "to": len(events) - 1}
            assert all_events(client, where) == [gap, done], "after the end there is only the last event"


@table(
    "command, words",
    [
        ("echo out; echo err >&2; exit 7", ["exit code 7", "PATCH"]),
        ("no-such-program", ["exit code 127"]),
        ("kill -9 $$", ["killed", "137"]),
    ],
)
def test_a_failed_command_keeps_nothing(client: httpx.Client, run: Run, command: str, words: list[str]) -> None:
    where = make(client, {"commands": ["echo 1 > first", command, "echo never"]})
    shown = settled(client, where, "failed")
    result = shown["setup_result"]
    assert [word for word in [*words, command, "Nothing of the commands is kept"] if word not in result["error"]] == []
    assert result["commands_run"] == ["echo 1 > first", command]
    assert "out" in result["stdout"] or "exit 7" not in command
    assert "err\n" in result["stderr"] or "exit 7" not in command
    assert version_causes(client, where) == ["create"]
    assert (
        run(where, "import os; print(os.path.exists('first'), os.path.exists('main.py'))")["stdout"] == "False True\n"
    )


def test_commands_have_the_sessions_limits_and_network(client: httpx.Client) -> None:
    full = make(client, {"commands": ["head -c 30000000 /dev/zero > big"]}, limits={"disk_mb": 8})
    assert "command" in settled(client, full, "failed")["setup_result"]["error"]
    # The errno of a connect to a private address: with internet it is refused, without it there's no route.
    code = "import errno, socket; print(socket.socket().connect_ex(('10.0.0.1', 80)) == errno.EACCES)"
    for internet in (True, False):
        where = make(client, {"commands": [f'python3 -c "{code}"']}, allowInternetAccess=internet)
        assert settled(client, where)["setup_result"]["stdout"].splitlines()[1] == str(internet)


@needs_gvisor
def test_commands_in_gvisor(client: httpx.Client, run: Run) -> None:
    where = make(client, {"commands": ["dmesg > kernel"]}, **of_kind("gvisor"))
    settled(client, where)
    assert "Starting gVisor" in client.get(f"/api/sessions/{where}/files/kernel").text
    assert run(where, "print(len(open('kernel').read()) > 0)")["stdout"] == "True\n"


@needs_gvisor
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can hide gVisor from a server")
def test_commands_run_in_no_other_sandbox_than_was_asked_for(own_server: MakeServer) -> None:
    server = own_server(hidden="/usr/bin/runsc")
    with server.client() as client:
        where = make(client, {"commands": ["true"]}, isolation="gvisor")
        shown = settled(client, where, "failed")
        assert "runsc" in shown["setup_result"]["error"]
        assert shown["setup_result"]["commands_run"] == []
        assert client.patch(f"/api/sessions/{where}", json={"isolation": "bubblewrap"}).is_success
        assert client.post(f"/api/sessions/{where}/setup").is_success
        settled(client, where)


def test_invalid_commands_are_refused(client: httpx.Client) -> None:
    bad: list[Any] = [[""], ["a\0b"], ["x" * (65 << 10)], ["true"] * 51, [1], "true"]
    for commands in bad:
        body = {"language": "python", "setup": {"commands": commands}}
        refused(client.post("/api/sessions", json=body), 400, "commands")
    setup = {"commands": ["true"]}
    answer = client.post("/api/sessions", json={"language": "python", "persistent": False, "setup": setup})
    assert refused(answer, 400, "persistent")["code"] == "not_persistent"
    where = client.post("/api/sessions", json={"language": "python", "persistent": False}).json()["id"]
    client.patch(f"/api/sessions/{where}", json={"setup": setup})
    assert "not persistent" in settled(client, where, "failed")["setup_result"]["error"]


def test_files_that_change_meanwhile_are_not_lost(client: httpx.Client, run: Run) -> None:
    """The commands run once more, on the new files."""
    command = "echo run >> /workspace/made; cp -r . /tmp/seen; echo began; test -f go || sleep 600"
    where = make(client, {"commands": [f"timeout 10 sh -c '{command}'; cat made"]})
    with following(client, where) as events:
        assert any(event.get("text") == "began" for event in events)
        assert client.put(f"/api/sessions/{where}/files/go", content=b"mine").is_success
    settled(client, where)
    assert client.get(f"/api/sessions/{where}/files/go").text == "mine"
    assert client.get(f"/api/sessions/{where}/files/made").text == "run\n", (
        "from the new version, not from what was left"
    )
    assert version_causes(client, where) == ["create", "files", "setup"]


def test_setup_events_are_streamed_and_replayed(client: httpx.Client, server: Server) -> None:
    where = make(client, {"commands": ["echo a; echo b >&2; while ! test -f /tmp/go; do sleep 0.1; done", "true"]})
    with following(client, where) as early:
        streamed: list[dict[str, Any]] = []
        while not {"a", "b"} <= {event.get("text") for event in streamed}:
            streamed.append(next(early))
        with following(client, where) as late:
            replayed: list[dict[str, Any]] = []
            while not {"a", "b"} <= {event.get("text") for event in replayed}:
                replayed.append(next(late))
        assert [event for event in replayed if event["type"] == "line"] == [
            event for event in streamed if event["type"] == "line"
        ]
        # Followers that hang up leave no connection.
        before = connections(server)
        for _ in range(20):
            with following(client, where) as others:
                next(others)
        assert eventually(lambda: connections(server) <= before)
        assert client.patch(f"/api/sessions/{where}", json={"setup": {"envs": {"A": "1"}}}).is_success
        assert list(early)[-1]["setup_status"] == "completed"


def connections(server: Server) -> int:
    """The number of a server's TCP connections. Other descriptors come and go with the sandboxes kept ready."""
    assert server.process is not None
    process = Path("/proc") / str(server.process.pid)
    tcp = {line.split()[9] for line in (process / "net/tcp").read_text().splitlines()[1:]}
    count = 0
    for link in (process / "fd").iterdir():
        with suppress(FileNotFoundError):
            count += os.readlink(link).removeprefix("socket:[").removesuffix("]") in tcp
    return count


def test_deleting_the_session_ends_its_setup(client: httpx.Client) -> None:
    where = make(client, {"commands": ["echo began; sleep 600"]})
    with following(client, where) as events:
        assert any(event.get("text") == "began" for event in events)
        deleting = threading.Thread(target=lambda: client.delete(f"/api/sessions/{where}?purge=true"))
        deleting.start()
        rest = list(events)
        deleting.join()
    assert rest[-1]["type"] == "error"
    assert rest[-1]["code"] == "not_found"


def test_a_run_after_a_failed_setup_says_so(client: httpx.Client, run: Run) -> None:
    where = make(client, {"commands": ["echo no wheels today >&2; exit 3"]})
    settled(client, where, "failed")
    outcome = run(where, "print(1)")
    assert outcome.keys() - RUN_KEYS == {"setup_status", "setup_error"}
    assert outcome["setup_status"] == "failed"
    assert "exit 3" in outcome["setup_error"]
    with client.stream("POST", f"/api/sessions/{where}/stream", json={"code": "1"}) as answer:
        assert '"setup_status": "failed"' in answer.read().decode()
    key = {"Idempotency-Key": "once"}
    first, again = (client.post(f"/api/sessions/{where}/run", json={"code": "1"}, headers=key) for _ in range(2))
    assert first.json() == again.json()
    assert again.json()["setup_status"] == "failed"
    client.patch(f"/api/sessions/{where}", json={"setup": None})
    assert run(where, "print(1)").keys() == RUN_KEYS
