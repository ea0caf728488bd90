"""Processes beside runs, over HTTP, on real sandboxes."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest

from tests.api.archives_api import member, tar
from tests.api.capsule_api import TAR
from tests.api.live import content, ended, events, output, process, start
from tests.conftest import MakeServer, MakeSession, Run, Server, eventually
from tests.gvisor import BOTH_KINDS, of_kind


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def test_a_server_and_tests_beside_it(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    start(client, where, "mkdir www; cd www; echo one > a; exec python3 -m http.server 8000", tag="web")
    fetch = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8000/a').read().decode(), end='')"
    assert eventually(lambda: run(where, fetch)["stdout"] == "one\n")
    assert run(where, "open('www/a', 'w').write('two')")["state"]["committed"]
    assert client.get(f"/proxy/{where}/8000/a").text == "two"
    nobody = client.get(f"/proxy/{where}/8001/")
    assert code_of(nobody) == (502, "nothing_listens")
    assert "/processes" in nobody.json()["hint"]
    shown = client.get(f"/api/sessions/{where}").json()
    assert (shown["status"], shown["processes"]) == ("live", 1)
    assert [s["id"] for s in client.get("/api/sessions?status=live").json()["sessions"]] == [where]
    stopped = client.post(f"/api/sessions/{where}/stop").json()
    assert (stopped["id"], stopped["status"], stopped["processes"]) == (where, "idle", 0)
    record = process(client, where, "web")
    assert (record["status"], record["reason"]) == ("ended", "The session was stopped.")
    assert client.get(f"/api/sessions/{where}/files/www/a").text == "two"
    assert code_of(client.get(f"/proxy/{where}/8000/a")) == (400, "no_code")


def test_runs_and_processes_are_apart(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    start(client, where, "exec sleep 1234", tag="sleeper", env={"P_TOKEN": "of-the-process"})
    look = """
import glob, os
seen = []
for path in glob.glob('/proc/[0-9]*/environ') + glob.glob('/proc/[0-9]*/cmdline'):
    try: seen.append(open(path, 'rb').read())
    except OSError: pass
print(any(b'of-the-process' in s or b'1234' in s for s in seen))
os.kill(-1, 0) if False else None
"""
    assert run(where, look)["stdout"] == "False\n"
    spy = (
        "for i in range(400):\n"
        "    for p in glob.glob('/proc/[0-9]*/environ'):\n"
        "        try:\n"
        "            if b'of-the-run' in open(p, 'rb').read(): print('seen', flush=True)\n"
        "        except OSError: pass\n"
        "    time.sleep(0.01)\n"
    )
    start(client, where, ["python3", "-uc", "import glob, time\nprint('up')\n" + spy], tag="spy")
    assert eventually(lambda: process(client, where, "spy")["output_bytes"])
    run(where, "import time; time.sleep(1)", env={"R_TOKEN": "of-the-run"})
    assert output(client, where, "spy") == b"up\n"
    assert process(client, where, "sleeper")["status"] == "running"


def test_output_can_be_read_from_any_byte_and_is_never_split(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    name = start(client, where, ["python3", "-uc", "import sys; print('äöü€' * 10); sys.stderr.write('err')"])
    whole = output(client, where, name)
    assert len(whole) == 94
    record = ended(client, where, name)
    assert (record["exit_code"], record["signal"], record["output_bytes"]) == (0, None, 94)
    for after in (0, 1, 50, 93, 94):
        assert output(client, where, name, after=after) == whole[after:]
    numbered = list(events(client, where, name))
    assert [event["encoding"] for _, event in numbered if "content" in event] == ["utf-8"] * (len(numbered) - 1)
    at = 0
    for number, event in numbered[:-1]:
        at += len(content(event))
        assert number == at
    assert numbered[-1] == (95, {"type": "exit", "exit_code": 0, "signal": None, "reason": None})
    assert list(events(client, where, name, after=95)) == []
    binary = start(client, where, ["python3", "-c", "import sys; sys.stdout.buffer.write(bytes(range(256)))"])
    assert output(client, where, binary) == bytes(range(256))


def test_input(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    start(client, where, "read a; echo got $a; cat; echo end", stdin=True, tag="c")
    url = f"/api/sessions/{where}/processes/c/stdin"
    assert client.post(url, content=b"one\n").json()["bytes"] == 4
    assert client.post(url, content=b"x" * 500_000).json()["bytes"] == 500_000
    assert client.delete(url).status_code == 200
    assert output(client, where, "c") == b"got one\n" + b"x" * 500_000 + b"end\n"
    assert code_of(client.post(url, content=b"more")) == (409, "process_ended")
    assert code_of(client.delete(url)) == (409, "process_ended")
    deaf = start(client, where, "exec sleep 1000")
    assert code_of(client.post(f"/api/sessions/{where}/processes/{deaf}/stdin", content=b"x")) == (409, "no_input")


def test_signals_timeouts_and_ends(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    url = f"/api/sessions/{where}/processes"
    deaf = "trap '' TERM INT; echo up; while true; do sleep 0.1; done"
    start(client, where, ["sh", "-c", "trap 'echo hup' HUP; echo up; while true; do sleep 0.05; done"], tag="a")
    assert eventually(lambda: process(client, where, "a")["output_bytes"] == 3)
    assert client.post(f"{url}/a/signal", json={"signal": "hup"}).status_code == 200
    assert eventually(lambda: process(client, where, "a")["output_bytes"] >= 7)
    assert client.post(f"{url}/a/signal", json={"signal": "SIGKILL"}).status_code == 200
    record = ended(client, where, "a")
    assert (record["exit_code"], record["signal"], record["reason"]) == (137, "KILL", None)
    assert code_of(client.post(f"{url}/a/signal", json={"signal": 15})) == (409, "process_ended")
    start(client, where, deaf, tag="b")
    assert eventually(lambda: process(client, where, "b")["output_bytes"])
    answer = client.delete(f"{url}/b").json()
    assert (answer["status"], answer["signal"], answer["reason"]) == ("ended", "KILL", "It was ended on request.")
    start(client, where, deaf, tag="c", timeout=5)
    record = ended(client, where, "c")
    assert (record["exit_code"], record["signal"]) == (124, "KILL")
    assert record["reason"] == "It reached its timeout of 5 seconds."


@pytest.mark.parametrize("isolation", BOTH_KINDS)
def test_commands_that_cannot_be_started(client: httpx.Client, session: MakeSession, isolation: str) -> None:
    where = session(**of_kind(isolation))
    assert ended(client, where, start(client, where, ["no-such-program"]))["exit_code"] == 127
    assert ended(client, where, start(client, where, ["/etc"]))["exit_code"] == 126
    assert output(client, where, start(client, where, "\n  echo lines\n")) == b"lines\n"
    last = start(client, where, ["no-such-program"])
    assert b"no-such-program" in output(client, where, last)


BAD: list[tuple[str, str, Any, int, str]] = [
    ("POST", "processes", {"command": ""}, 400, "bad_request"),
    ("POST", "processes", {"command": " \n"}, 400, "bad_request"),
    ("POST", "processes", {"command": []}, 400, "bad_request"),
    ("POST", "processes", {"command": ["", "x"]}, 400, "bad_request"),
    ("POST", "processes", {}, 400, "invalid_field"),
    ("POST", "processes", {"command": "x", "cwd": "../.."}, 400, "bad_path"),
    ("POST", "processes", {"command": "x", "cwd": "/etc"}, 400, "bad_path"),
    ("POST", "processes", {"command": "x", "tag": "a b"}, 400, "invalid_field"),
    ("POST", "processes", {"command": "x", "tag": "proc_1_abcdefghi"}, 400, "invalid_field"),
    ("POST", "processes", {"command": "x", "tag": "held"}, 409, "tag_in_use"),
    ("POST", "processes", {"command": "x", "pty": {"cols": 0}}, 400, "invalid_field"),
    ("POST", "processes", {"command": "x", "pty": {"cols": 80, "rows": 1001}}, 400, "invalid_field"),
    ("POST", "processes", {"command": "x", "timeout": 0}, 400, "invalid_field"),
    ("POST", "processes", {"command": "x", "timeout": 1e9}, 400, "bad_request"),
    ("POST", "processes", {"command": "x", "env": {"a=b": "1"}}, 400, "bad_request"),
    ("POST", "processes", {"command": "x\0y"}, 400, "bad_request"),
    ("GET", "processes/nobody", None, 404, "no_such_process"),
    ("GET", "processes/nobody/events", None, 404, "no_such_process"),
    ("GET", "processes/held/events?after=-1", None, 400, "invalid_field"),
    ("GET", "processes/held/events?before=1", None, 400, "invalid_field"),
    ("DELETE", "processes/nobody", None, 404, "no_such_process"),
    ("POST", "processes/held/signal", {"signal": "NOPE"}, 400, "invalid_field"),
    ("POST", "processes/held/signal", {"signal": 0}, 400, "invalid_field"),
    ("POST", "processes/held/signal", {"signal": 65}, 400, "invalid_field"),
    ("POST", "processes/held/signal", {"signal": "٣"}, 400, "invalid_field"),
    ("PATCH", "processes/held", {"pty": {"cols": 1001, "rows": 1}}, 400, "invalid_field"),
    ("PATCH", "processes/held", {"pty": {"cols": 10, "rows": 10}}, 400, "bad_request"),
    ("POST", "run", {"code": "1", "atomic": True}, 409, "session_live"),
    ("POST", "rollback", {"version": 1}, 409, "session_live"),
    ("GET", "terminal", None, 400, "not_a_websocket"),
    ("GET", "processes/held/attach", None, 400, "not_a_websocket"),
]


@pytest.mark.parametrize("isolation", BOTH_KINDS)
def test_bad_input_disturbs_nothing(client: httpx.Client, session: MakeSession, run: Run, isolation: str) -> None:
    where = session(**of_kind(isolation))
    start(client, where, "while true; do echo tick; sleep 0.05; done", tag="held")
    for method, path, body, status, code in BAD:
        answer = client.request(method, f"/api/sessions/{where}/{path}", json=body)
        assert code_of(answer) == (status, code), (path, body, answer.text)
        assert code != "session_live" or "/stop" in answer.json()["hint"], answer.text
    archive = client.put(
        f"/api/sessions/{where}/archive", content=b"\0" * 1024, headers={"Content-Type": "application/x-tar"}
    )
    assert code_of(archive) == (409, "session_live")
    assert "/stop" in archive.json()["hint"]
    before = process(client, where, "held")["output_bytes"]
    assert eventually(lambda: process(client, where, "held")["output_bytes"] > before)
    assert client.get(f"/api/sessions/{where}/processes").json()["count"] == 1
    assert run(where, "print(1)")["stdout"] == "1\n"


def test_keys_and_records(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    url, body = f"/api/sessions/{where}/processes", {"command": "exec sleep 1000", "env": {"A": "1"}}
    first = client.post(url, json=body, headers={"Idempotency-Key": "k"})
    again = client.post(url, json=body, headers={"Idempotency-Key": "k"})
    assert again.json()["process_id"] == first.json()["process_id"]
    assert again.headers["Idempotent-Replay"] == "true"
    other = client.post(url, json=body | {"env": {"A": "2"}}, headers={"Idempotency-Key": "k"})
    assert code_of(other) == (409, "idempotency_mismatch")
    assert "env" not in first.json()


def test_deletion_ends_processes_and_their_followers(
    client: httpx.Client, session: MakeSession, server: Server
) -> None:
    where = session()
    start(client, where, "echo up; exec sleep 1000", tag="p")
    heard: list[Any] = []

    def follow() -> None:
        with server.client() as own:
            for event in events(own, where, "p"):
                heard.append(event)  # noqa: PERF402  as it comes

    follower = threading.Thread(target=follow)
    follower.start()
    assert eventually(lambda: heard)
    assert client.delete(f"/api/sessions/{where}").status_code == 200
    follower.join(30)
    assert not follower.is_alive()
    assert heard[-1][1]["reason"] == "The session was deleted, or has expired."


LATE_LOOKS = "from era.core.trees import allowance; allowance._FIRST = 60.0"
"""Processes end before the disk space that they take is measured."""


def test_processes_have_the_sessions_variables_network_and_storage(client: httpx.Client, session: MakeSession) -> None:
    where = session(setup={"envs": {"OF_SETUP": "s"}})
    ask = "import os; print(*(os.environ.get(n) for n in ('ERA_SESSION_ID', 'OF_SETUP', 'MINE', 'ERA_LANGUAGE')))"
    name = start(client, where, ["python3", "-c", ask], env={"MINE": "m", "ERA_LANGUAGE": "no"})
    assert output(client, where, name).decode() == f"{where} s m python\n"
    keep = "from era_storage import kv; print(kv.set('processes', 'k', 'v'), kv.get('processes', 'k'))"
    assert output(client, where, start(client, where, ["python3", "-c", keep])) == b"True v\n"


ASKS_ON = """
import http.client, os, sys, time, urllib.parse
url = os.environ["ERA_STORAGE_URL"]
connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc)
def answers():
    connection.request("GET", "/api/storage/kv/processes/k")
    return connection.getresponse().read() != b""
assert answers()
open("url", "w").write(url)
connection.auto_open = False
try:
    while not os.path.exists("go"):  # a connection that is idle would be closed after some seconds
        answers()
        time.sleep(0.1)
    print(answers())
except OSError: print("closed")
"""
REACHES = """
import os, urllib.error, urllib.request
print(os.environ.get("ERA_STORAGE_URL") == open("url").read())
try: print(urllib.request.urlopen(open("url").read() + "/api/storage/kv/processes/k", timeout=10).status)
except urllib.error.HTTPError as answer: print(answer.code)
except OSError: print("nothing listens")
"""
NOT_FOLLOWED = """
from era.core.live.live_session import LiveSession
async def nothing(self, row): pass
LiveSession.follow = nothing
"""


@pytest.mark.parametrize("isolation", BOTH_KINDS)
@pytest.mark.parametrize("weakness", [None, NOT_FOLLOWED], ids=["followed", "not followed"])
def test_storage_that_is_turned_off_is_gone_for_processes_and_runs_beside_them(
    own_server: MakeServer, isolation: str, weakness: str | None
) -> None:
    server = own_server() if weakness is None else own_server(weakness=weakness)
    with server.client() as client:
        created = client.post("/api/sessions", json={"language": "python", "session_id": "s", **of_kind(isolation)})
        assert created.status_code == 201
        began = start(client, "s", ["python3", "-c", ASKS_ON])
        assert eventually(lambda: client.get("/api/sessions/s/files/url").status_code == 200)

        def reached() -> tuple[str, str]:
            """What a process finds that is started now, and a run."""
            run = client.post("/api/sessions/s/run", json={"code": REACHES}).json()["stdout"]
            return output(client, "s", start(client, "s", ["python3", "-c", REACHES])).decode(), run

        assert reached() == ("True\n404\n", "True\n404\n")
        assert client.patch("/api/sessions/s", json={"storage": False}).status_code == 200
        off = reached()
        client.put("/api/sessions/s/files/go", content=b"").raise_for_status()
        asked = output(client, "s", began)
        assert client.patch("/api/sessions/s", json={"storage": True}).status_code == 200
        assert reached() == ("True\n404\n", "True\n404\n")
    if weakness is None:
        assert (off, asked) == (("False\nnothing listens\n", "False\nnothing listens\n"), b"closed\n")
    else:
        assert (off, asked) == (("True\n404\n", "False\n404\n"), b"True\n")


def test_the_disk_limit_counts_for_processes(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session(limits={"disk_mb": 8})
    greedy = "i=0; while true; do head -c 1000000 /dev/zero > f$i; i=$((i+1)); sleep 0.02; done"
    start(client, where, greedy, tag="greedy")
    assert "disk space" in ended(client, where, "greedy")["reason"]


UNCHECKED = f"""{LATE_LOOKS}
from era.core.live.live_session import LiveSession
async def nothing(self, **_): pass
LiveSession.check_disk = nothing
"""


@pytest.mark.parametrize("isolation", BOTH_KINDS)
@pytest.mark.parametrize("weakness", [LATE_LOOKS, UNCHECKED], ids=["checked", "not checked"])
def test_short_processes_cannot_fill_the_disk(own_server: MakeServer, weakness: str, isolation: str) -> None:
    """A session of which too much is left is put away, and takes no room any more."""
    server = own_server(weakness=weakness)
    with server.client() as client:
        limits = {"disk_mb": 8}
        made = {"language": "python", "session_id": "s", "isolation": isolation, "limits": limits}
        assert client.post("/api/sessions", json=made).status_code == 201
        short = start(client, "s", "for name in a b; do head -c 5000000 /dev/zero > $name; done")
        assert ended(client, "s", short)["exit_code"] == 0
        seconds = 60.0 if weakness == LATE_LOOKS else 3.0
        is_put_away = eventually(lambda: client.get("/api/sessions/s").json()["status"] == "idle", seconds)
        assert is_put_away == (weakness == LATE_LOOKS)
        if is_put_away:
            look = {"code": "import os; print(sorted(os.listdir()))"}  # which may come just before it is
            left = [client.post("/api/sessions/s/run", json=look).json()["stdout"] for _ in range(2)]
            assert left[1] == "['.session_data.json', 'main.py']\n"


def test_rollback_and_atomic_run_when_processes_ended(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    path = f"/api/sessions/{where}"
    rollback = {"version": 1}
    ended(client, where, start(client, where, "echo left > file"))
    assert client.get(path).json()["status"] != "idle"  # or `running`, while a checkpoint is made
    assert run(where, "print(open('file').read(), end='')", atomic=True)["stdout"] == "left\n"
    ended(client, where, start(client, where, "echo more >> file"))
    added = client.put(f"{path}/archive", content=tar(member("new")), headers=TAR)
    assert added.status_code == 200, added.text
    assert client.get(f"{path}/files/file").text == "left\nmore\n"
    ended(client, where, start(client, where, "echo most >> file"))
    answer = client.post(f"{path}/rollback", json=rollback)
    assert (answer.status_code, answer.json()["file_count"], answer.json()["status"]) == (200, 0, "idle"), answer.text
    # What the last process left is the version before.
    [version] = client.get(f"{path}/versions?limit=2").json()["versions"][1:]
    assert client.get(f"{path}/versions/{version['version']}/files/file").text == "left\nmore\nmost\n"

    held = start(client, where, "echo held > file; sleep 600")
    assert code_of(client.post(f"{path}/rollback", json=rollback)) == (409, "session_live")
    assert code_of(client.post(f"{path}/rollback", json={"version": 99, "stop": True})) == (404, "no_such_version")
    assert process(client, where, held)["status"] == "running"
    answer = client.post(f"{path}/rollback", json={**rollback, "stop": True})
    assert (answer.status_code, answer.json()["file_count"], answer.json()["processes"]) == (200, 0, 0), answer.text
    assert process(client, where, held)["reason"] == "The session was stopped."
    assert code_of(client.get(f"{path}/files/file"))[0] == 404
