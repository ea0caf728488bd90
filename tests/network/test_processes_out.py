"""Processes beside runs that reach the internet, while runs of the same session do so too."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from era.core.ports import SocketBroker
from era.network.connect_supervisor import ConnectHandler, ConnectSupervisor
from tests.api.event_streams import event_data
from tests.conftest import eventually
from tests.gvisor import BOTH_KINDS
from tests.network.conftest import NEEDS_GVISOR, Machine, NetServer, Session, new_session
from tests.network.test_connect_supervisor_walls import EVERYTHING, NOTHING, OFF
from tests.network.world import PUBLIC

FETCHES = """
import json, time, urllib.request
for _ in range(8):
    answer = json.load(urllib.request.urlopen('http://www.example.test/hello', timeout=20))
    print(answer['hello'], flush=True)
    time.sleep(0.05)
"""
REFUSED = """
import urllib.request
try: urllib.request.urlopen('http://10.0.0.1/', timeout=20); print('reached')
except OSError as problem: print(type(problem.reason).__name__)
"""
ASKS = r"""
import socket
question = b"\x12\x34\x01\x00\x00\x01" + bytes(6) + b"\x07example\x04test\x00\x00\x01\x00\x01"
for server in (open("/etc/resolv.conf").read().split()[1], "203.0.113.53"):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(2)
        for _ in range(10):  # as resolvers do: a message that another's relay has taken is lost where that just ends
            sock.sendto(question, (server, 53))
            try:
                answer, who = sock.recvfrom(1000)
            except TimeoutError:
                continue
            print(socket.inet_ntoa(answer[-4:]), who == (server, 53))
            break
"""

CONNECTS = """
import os, socket, time
while not os.path.exists('begun'): time.sleep(0.01)
try: socket.create_connection(('203.0.113.99', 80))
except OSError: print('nobody')
"""
FETCHES_ON = """
import json, urllib.request
for _ in range(100): print(json.load(urllib.request.urlopen('http://www.example.test/hello', timeout=20))['hello'])
"""

AS_ADA = "-c user.name=Ada -c user.email=ada@example.test"
CLONES = f"""
set -e
git clone -q http://www.example.test/git/KIND.git project
cd project
cat greeting
echo more >> greeting
git {AS_ADA} commit -qam 'More'
git push -q
git status -sb
"""
CHANGES = f"""
set -e
cd project
git pull -q
echo from a run >> greeting
git {AS_ADA} commit -qam 'Beside'
git push -q
git log --format=%s
"""

HOLDS = f"""
import os, socket, time
tcp = socket.create_connection(("www.example.test", 9000))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.connect(("{PUBLIC}", 9000))
for sock in (tcp, udp):
    sock.send(b"x")
    assert sock.recv(9) == b"x"
print("holds", flush=True)
"""
LOSES = (
    HOLDS
    + f"""
try: said = tcp.recv(9)
except OSError: said = b""
while not os.path.exists("go"): time.sleep(0.01)
udp.settimeout(0.3)
try: said += udp.recv(udp.send(b"x"))
except OSError: pass
print("lost" if not said else said)
PATIENCE = 0.3
{OFF}"""
)
STAYS = HOLDS + "time.sleep(1000)"
SENDS_UNASKED = f"""
import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(PATIENCE)
sock.sendmsg([b"x"], [], socket.MSG_NOSIGNAL, ("{PUBLIC}", 9000))
print(sock.recv(9))
"""
HEEDLESS = """
from era.core.live.live_sessions import LiveSessions
async def follow(self, session_id): pass
LiveSessions.follow = follow
"""
"""Lets processes go on as they began."""

KINDS = ["bubblewrap", pytest.param("gvisor", marks=NEEDS_GVISOR)]


def started(client: Any, session: str, program: str) -> str:
    """Start a process with a Python program; returns its id."""
    body = {"command": ["python3", "-c", program]}
    return str(client.post(f"/api/sessions/{session}/processes", json=body).json()["process_id"])


def ended(client: Any, session: str, process: str) -> tuple[str, Any]:
    """What a process has said once it has ended, and its record."""
    deadline = time.monotonic() + 60
    while (record := client.get(f"/api/sessions/{session}/processes/{process}").json())["status"] == "running":
        assert time.monotonic() < deadline, record
        time.sleep(0.05)
    with client.stream("GET", f"/api/sessions/{session}/processes/{process}/events") as events:
        data = list(event_data(events))
    return "".join(event.get("content", "") for event in data if event.get("type") == "stdout"), record


@pytest.mark.parametrize("kind", BOTH_KINDS)
def test_runs_and_processes_reach_the_internet_beside_each_other(served: NetServer, kind: str) -> None:
    with served.client() as client:
        one = new_session(client, isolation=kind)
        for _ in range(2):
            processes = [started(client, one.id, FETCHES) for _ in range(2)]
            assert one.says(FETCHES).split() == ["www.example.test"] * 8
            for process in processes:
                said, record = ended(client, one.id, process)
                assert (said.split(), record["exit_code"]) == (["www.example.test"] * 8, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_runs_and_processes_ask_for_names_beside_each_other(served: NetServer, kind: str) -> None:
    """By messages of their own, to the sandbox's nameserver and to another one."""
    with served.client() as client:
        one = new_session(client, isolation=kind)
        process = started(client, one.id, ASKS)
        assert one.says(ASKS).splitlines() == [f"{PUBLIC} True"] * 2
        assert ended(client, one.id, process)[0].splitlines() == [f"{PUBLIC} True"] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_connect_under_way_beside_a_run_outlives_it(served: NetServer, kind: str) -> None:
    with served.client() as client:
        one = new_session(client, isolation=kind)
        process = started(client, one.id, CONNECTS)
        one.says("import time; open('begun', 'w').close(); time.sleep(1)")
        assert ended(client, one.id, process)[0] == "nobody\n"


@pytest.mark.parametrize("kind", BOTH_KINDS)
def test_fetches_beside_runs_outlive_them(served: NetServer, kind: str) -> None:
    with served.client() as client:
        one = new_session(client, isolation=kind)
        process = started(client, one.id, FETCHES_ON)
        for _ in range(5):
            one.says("import time; time.sleep(0.2)")
        said, record = ended(client, one.id, process)
        assert (said.split(), record["exit_code"]) == (["www.example.test"] * 100, 0)


@pytest.mark.parametrize("kind", BOTH_KINDS)
def test_what_a_run_may_not_reach_a_process_may_not_either(served: NetServer, kind: str) -> None:
    with served.client() as client:
        one = new_session(client, isolation=kind)
        process = started(client, one.id, REFUSED)
        assert ended(client, one.id, process)[0] == "PermissionError\n"
        closed = new_session(client, isolation=kind, allowInternetAccess=False)
        process = started(client, closed.id, REFUSED)
        assert ended(client, closed.id, process)[0] == "OSError\n"


def holding(one: Session, program: str) -> str:
    """A process with this program, which reaches the internet by now."""
    process = started(one.client, one.id, program)
    where = f"/api/sessions/{one.id}/processes/{process}"
    assert eventually(lambda: one.client.get(where).json()["output_bytes"] >= len("holds\n"))
    return process


def reached(said: str) -> dict[str, str]:
    """What the program OFF has reached, which said this last."""
    found: dict[str, str] = json.loads(said.splitlines()[-1])
    del found["filters"]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_internet_that_is_turned_off_is_off_for_all_of_a_live_session(served: NetServer, kind: str) -> None:
    with served.client() as client:
        one = new_session(client, isolation=kind)
        process = holding(one, LOSES)
        one.change(allowInternetAccess=True, egress={"allow": []}, default_timeout=20)  # as it is
        assert client.get(f"/api/sessions/{one.id}/processes/{process}").json()["output_bytes"] == len("holds\n")
        one.change(allowInternetAccess=False)
        assert reached(one.says(f"PATIENCE = 0.3\n{OFF}\nopen('go', 'w').close()")) == NOTHING
        assert one.record()["enforced"]["network"] == "none"
        said, _ = ended(client, one.id, process)
        assert said.splitlines()[:2] == ["holds", "lost"]
        assert reached(said) == NOTHING
        assert reached(ended(client, one.id, started(client, one.id, f"PATIENCE = 0.3\n{OFF}"))[0]) == NOTHING
        one.change(allowInternetAccess=True)
        assert reached(one.says(f"PATIENCE = 20\n{OFF}")) == EVERYTHING
        assert reached(ended(client, one.id, started(client, one.id, f"PATIENCE = 20\n{OFF}"))[0]) == EVERYTHING


@pytest.mark.parametrize("kind", KINDS)
def test_an_allowlist_is_for_all_of_a_live_session(served: NetServer, kind: str) -> None:
    with served.client() as client:
        one = new_session(client, isolation=kind)
        process = holding(one, LOSES)
        one.change(egress={"allow": ["other.test"]})
        assert one.run(f"open('go', 'w').close()\nPATIENCE = 0.3\n{SENDS_UNASKED}")["status"] == "failed"
        said, _ = ended(client, one.id, process)
        assert said.splitlines()[:2] == ["holds", "lost"]
        assert reached(said) == {**NOTHING, "asked": "REACHED"}  # its nameserver, which says that it is a bad question


@pytest.mark.parametrize("kind", KINDS)
def test_processes_that_went_on_as_they_began_would_be_a_way_out(machine: Machine, kind: str, tmp_path: Path) -> None:
    server = machine.serve(tmp_path / "data", weakness=HEEDLESS)
    with server.client() as client:
        one = new_session(client, isolation=kind)
        holding(one, STAYS)
        one.change(egress={"allow": ["other.test"]})
        if kind == "bubblewrap":  # in gVisor the run's own rules are asked
            assert one.says(f"PATIENCE = 20\n{SENDS_UNASKED}") == "b'x'\n"
        one.change(allowInternetAccess=False)
        found = reached(one.says(f"PATIENCE = 20\n{OFF}"))
        assert found == (EVERYTHING if kind == "gvisor" else {**EVERYTHING, "tcp": "refused", "tcp6": "refused"})
        assert one.record()["enforced"]["network"] == "none"
    server.stop()


async def test_a_run_decides_whoever_came_last() -> None:
    """Where nobody can tell whose a connection is, that of a run is not to be taken for one of processes."""
    supervisor = ConnectSupervisor(cast(SocketBroker, SimpleNamespace(on_notify_fd=lambda _: None)), lambda: None)
    run, processes, others = (cast(ConnectHandler, object()) for _ in range(3))
    supervisor.add(processes, beside=True)
    supervisor.add(run)
    supervisor.remove(processes)
    supervisor.add(others, beside=True)
    assert supervisor.handler is run
    supervisor.remove(run)
    assert supervisor.handler is others


def git(*words: str | Path) -> str:
    """What git says here."""
    return subprocess.run(["git", *words], check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
@pytest.mark.parametrize("kind", BOTH_KINDS)
def test_a_repository_is_cloned_changed_and_pushed(
    machine: Machine, served: NetServer, kind: str, tmp_path: Path
) -> None:
    """By a process, and then by a run beside another one."""
    repository, first = machine.keys / "git" / f"{kind}.git", tmp_path / "first"
    git("init", "-q", "--bare", "-b", "main", repository)
    git("init", "-q", "-b", "main", first)
    (first / "greeting").write_text("hello\n")
    git("-C", first, "add", ".")
    git("-C", first, *AS_ADA.split(), "commit", "-qm", "First")
    git("-C", first, "push", "-q", repository, "main")
    with served.client() as client:
        one = new_session(client, isolation=kind)
        command = CLONES.replace("KIND", kind)
        body = {"command": command}
        answer = client.post(f"/api/sessions/{one.id}/processes", json=body)
        assert answer.status_code == 201, answer.text
        process = answer.json()["process_id"]
        said, record = ended(client, one.id, process)
        assert (said, record["exit_code"]) == ("hello\n## main...origin/main\n", 0)
        assert git("-C", repository, "show", "main:greeting") == "hello\nmore\n"
        client.post(f"/api/sessions/{one.id}/processes", json={"command": "exec sleep 1000"})
        ran = client.post(f"/api/sessions/{one.id}/run", json={"command": CHANGES}).json()
        assert (ran["stdout"], ran["exit_code"]) == ("Beside\nMore\nFirst\n", 0), ran
        assert git("-C", repository, "show", "main:greeting") == "hello\nmore\nfrom a run\n"
