"""Limits of a session's own, and what happens to a run that reaches one."""

from __future__ import annotations

import os
from typing import Any

import httpx
import pytest

from tests.api.answers import refused
from tests.api.archives_api import member, tar
from tests.api.live import ended, output, start
from tests.conftest import MakeServer, MakeSession, Run
from tests.gvisor import BOTH_KINDS, needs_gvisor
from tests.table import table

BOUNDED_GVISOR = [needs_gvisor, pytest.mark.skipif(os.geteuid() != 0, reason="control groups are root's")]

DEFAULTS = {"memory_mb": 512, "cpus": 1, "pids": 256, "disk_mb": 4096, "files": 200_000, "output_bytes": 10 << 20}

SLOWLY = """
import time
open('.session_data.json', 'w').write('{"reached": true}')
def write(file):
    for _ in range(200):
        file.write(b'x' * (1 << 18)); file.flush()
        time.sleep(0.01)
    time.sleep(60)
"""

GROWS = {
    "one file beside another": "write(open('big', 'wb'))",
    "many files": """
for n in range(200): open(f'{n}', 'wb').write(b'x' * (1 << 18)); time.sleep(0.01)
time.sleep(60)
""",
    "files without names": """
import os
held = []
for n in range(3):
    file = open('gone', 'wb'); os.unlink('gone'); held.append(file)
    for _ in range(8): file.write(b'x' * (1 << 18)); file.flush(); time.sleep(0.01)
time.sleep(60)
""",
    "memory maps": """
import mmap
for name in 'abc':
    file = open(name, 'w+b'); file.truncate(2 << 20); m = mmap.mmap(file.fileno(), 2 << 20)
    for n in range(0, 2 << 20, 1 << 18): m[n:n + (1 << 18)] = b'x' * (1 << 18); time.sleep(0.02)
time.sleep(60)
""",
    "a child's file": "import os\nif os.fork() == 0: write(open('big', 'wb'))\nelse: time.sleep(60)",
    "a directory that is closed": "import os\nos.mkdir('d'); file = open('d/f', 'wb'); os.chmod('d', 0); write(file)",
}
"""Programs that write more than 4 MiB, step by step."""

HOLDS = """
import mmap, os, socket, time
ours, theirs = socket.socketpair()
maps = []
for _ in range(5):
    file = os.open(name := str(os.getpid()), os.O_RDWR | os.O_CREAT)
    os.unlink(name)
    for _ in range(50): os.write(file, b'x' * (1 << 20))
    KEEP
    os.closerange(file, 100)  # and what mmap has made of it
time.sleep(float(os.environ['SECONDS']))
print('all of it')
"""
"""Has 250 MiB of files that have neither a name nor a descriptor."""

KEEPS = {
    "only mapped": "maps.append(mmap.mmap(file, 0))",
    "in a socket's queue": "socket.send_fds(ours, [b'x'], [file])",
}

UNSEEN = """
from era.drivers import processes
processes.unnamed_bytes = lambda *_: 0
processes.hide_files = lambda *_: False
"""
"""Looks for files by their names only."""


def limits_of(client: httpx.Client, where: str) -> dict[str, Any]:
    """The limits of a session."""
    limits: dict[str, Any] = client.get(f"/api/sessions/{where}").json()["limits"]
    return limits


def test_a_session_has_the_servers_limits_or_its_own(client: httpx.Client, session: MakeSession) -> None:
    assert limits_of(client, session()) == DEFAULTS
    where = session(limits={"memory_mb": 128, "cpus": 0.5})
    assert limits_of(client, where) == {**DEFAULTS, "memory_mb": 128, "cpus": 0.5}

    def change(**limits: Any) -> dict[str, Any]:
        answer = client.patch(f"/api/sessions/{where}", json={"limits": limits})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()["metadata"]["limits"]
        return found

    assert change(pids=32) == {**DEFAULTS, "memory_mb": 128, "cpus": 0.5, "pids": 32}
    assert change(memory_mb=None) == {**DEFAULTS, "cpus": 0.5, "pids": 32}
    copy = client.post(f"/api/sessions/{where}/duplicate", json={}).json()
    assert copy["limits"] == {**DEFAULTS, "cpus": 0.5, "pids": 32}


@table(
    "limits, word",
    [
        ({"memory_mb": 1 << 20}, "ERA_MAX_LIMITS"),
        ({"cpus": 65.0}, "ERA_MAX_LIMITS"),
        ({"disk_mb": 1 << 40}, "ERA_MAX_LIMITS"),
        ({"memory_mb": 1}, "memory_mb"),
        ({"memory_mb": 128.5}, "memory_mb"),
        ({"pids": "many"}, "pids"),
        ({"threads": 5}, "threads"),
        ({"files": -1}, "files"),
        ({"cpus": 0}, "cpus"),
        ([], "limits"),
    ],
)
def test_limits_out_of_bounds_are_refused(client: httpx.Client, session: MakeSession, limits: Any, word: str) -> None:
    refused(client.post("/api/sessions", json={"language": "python", "limits": limits}), 400, word)
    where = session()
    refused(client.patch(f"/api/sessions/{where}", json={"limits": limits}), 400, word)
    body = {"language": "python", "code": "", "limits": limits}
    refused(client.post("/api/execute", json=body), 400, word)
    assert limits_of(client, where) == DEFAULTS


def test_limits_are_in_force_and_a_change_counts_from_the_next_run(
    client: httpx.Client, session: MakeSession, run: Run
) -> None:
    where = session(limits={"pids": 32, "memory_mb": 128, "output_bytes": 2048})

    def enforced() -> dict[str, Any]:
        last = client.get(f"/api/sessions/{where}/runs?limit=1").json()["runs"][0]
        found: dict[str, Any] = last["enforced"]
        return found

    outcome = run(where, "open('kept', 'w').write('1'); print('x' * 5000)")
    assert (len(outcome["stdout"]), outcome["stdout_truncated"]) == (2048, True)
    assert enforced()["rlimits"]["RLIMIT_NPROC"] == 32
    if enforced()["cgroup"]:
        assert enforced()["cgroup"]["memory_bytes"] == 128 << 20
    client.patch(f"/api/sessions/{where}", json={"limits": {"pids": 64, "output_bytes": None}})
    outcome = run(where, "print(open('kept').read() * 5000)")
    assert (len(outcome["stdout"]), outcome["stdout_truncated"]) == (5001, False)
    assert enforced()["rlimits"]["RLIMIT_NPROC"] == 64


@pytest.mark.parametrize("isolation", ["bubblewrap", pytest.param("gvisor", marks=BOUNDED_GVISOR)])
def test_a_run_out_of_memory_says_so_and_keeps_what_it_left(
    client: httpx.Client, session: MakeSession, run: Run, isolation: str
) -> None:
    where = session(limits={"memory_mb": 64}, isolation=isolation)
    code = "import time; print('before', flush=True); open('kept', 'w').close(); held = []\n"
    # Slowly enough for whoever ends it before the kernel ends gVisor, also on a busy machine.
    outcome = run(where, f"{code}while True: held.append(bytearray(b'1') * (1 << 20)); time.sleep(0.005)")
    assert (outcome["stdout"], outcome["state"]["version"], outcome["state"]["committed"]) == ("before\n", 2, True)
    record = client.get(f"/api/sessions/{where}/runs/{outcome['run_id']}").json()
    assert record["state"] == outcome["state"]
    reason = outcome["state"]["reason"]
    if record["enforced"]["cgroup"] or outcome["status"] == "oom":
        assert (outcome["status"], str(reason).partition(";")[0]) == ("oom", "The run was out of memory")
    else:
        assert (outcome["status"], reason) == ("failed", None), "it is a MemoryError"


@table("code", GROWS.values())
def test_a_run_that_outgrows_its_disk_is_ended(client: httpx.Client, session: MakeSession, run: Run, code: str) -> None:
    code = SLOWLY + code
    where = session(data={"before": 1}, limits={"disk_mb": 4})
    run(where, "open('old', 'w').write('still here')")
    outcome = run(where, code, timeout=50)
    # It was ended: by itself it would have ended after a minute only, and its deadline would be a `timeout`.
    assert (outcome["status"], outcome["state"]["committed"]) == ("disk_full", False), outcome
    assert outcome["state"]["reason"].endswith("data and files stay as they were.")
    assert outcome["data"] == {"before": 1}
    again = run(where, "import os; print(sorted(os.listdir())); print(open('old').read())")
    assert again["stdout"] == "['.session_data.json', 'main.py', 'old']\nstill here\n"
    record = client.get(f"/api/sessions/{where}/runs/{outcome['run_id']}").json()
    assert (record["status"], record["state"]) == ("disk_full", outcome["state"])


def held(client: httpx.Client, where: str, process: str) -> tuple[str, str]:
    """What a process has said once it has ended, and why it was ended."""
    return output(client, where, process).decode(), str(ended(client, where, process)["reason"])


@pytest.mark.parametrize("isolation", BOTH_KINDS)
@pytest.mark.parametrize("beside", [False, True], ids=["a run", "a process"])
@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
def test_files_without_names_and_descriptors_count(
    client: httpx.Client, session: MakeSession, run: Run, keep: str, beside: bool, isolation: str
) -> None:
    where = session(isolation=isolation, limits={"disk_mb": 64})
    run(where, "open('old', 'w').write('still here')")
    code, env = HOLDS.replace("KEEP", keep), {"SECONDS": "15"}
    for _ in range(6):  # what others free meanwhile may hide them
        if beside:
            said, why = held(client, where, start(client, where, ["python3", "-c", code], env=env))
        else:
            outcome = run(where, code, env=env, timeout=100)
            said, why = outcome["stdout"], f"{outcome['status']}: {outcome['state']['reason']}"
        if not said:
            break
    assert (said, ("was out of disk space" if beside else "disk_full: ") in why) == ("", True), why
    if beside:  # what begins before the session has been put away for that is ended with it, and told the same
        assert held(client, where, start(client, where, "exec sleep 3")) in [("", why), ("", "None")]
    assert [file["path"] for file in client.get(f"/api/sessions/{where}/files").json()["files"]] == ["old"]


def test_what_is_not_looked_for_does_not_count(own_server: MakeServer) -> None:
    """Of processes; tests/drivers/test_disk.py has the same of runs."""
    server = own_server(weakness=UNSEEN)
    with server.client() as client:
        made = {"language": "python", "session_id": "s", "limits": {"disk_mb": 64}}
        assert client.post("/api/sessions", json=made).status_code == 201
        programs = [HOLDS.replace("KEEP", keep) for keep in KEEPS.values()]
        started = [start(client, "s", ["python3", "-c", code], env={"SECONDS": "3"}) for code in programs]
        assert [held(client, "s", process) for process in started] == [("all of it\n", "None")] * 2


def test_uploads_count_towards_the_disk_limit(client: httpx.Client, session: MakeSession) -> None:
    where = session(limits={"disk_mb": 1})
    path = f"/api/sessions/{where}/files/big"
    assert client.put(path, content=b"x" * (1 << 20)).status_code in (200, 201)
    refused(client.put(f"/api/sessions/{where}/files/more", content=b"x"), 413)


def test_the_operator_bounds_the_limits(own_server: MakeServer) -> None:
    server = own_server(memory_mb="256", pids="40", disk_mb="100", max_limits="memory_mb=128,pids=40")
    with server.client() as client:
        created = client.post("/api/sessions", json={"language": "python", "limits": {"memory_mb": 256}})
        assert created.status_code == 201, "a default is never over the maximum"
        assert created.json()["limits"] == {**DEFAULTS, "memory_mb": 256, "pids": 40, "disk_mb": 100}
        where = created.json()["id"]
        refused(client.patch(f"/api/sessions/{where}", json={"limits": {"pids": 41}}), 400, "ERA_MAX_LIMITS")
    server.stop()
    server.settings["ERA_MEMORY_MB"] = "128"
    server.start()
    with server.client() as client:
        assert client.get(f"/api/sessions/{where}").json()["limits"]["memory_mb"] == 128, "lowered with the maximum"


@table("query", ["", "?replace=true"])
def test_what_a_client_writes_is_measured_with_the_packages_as_a_run_is(
    client: httpx.Client, session: MakeSession, run: Run, query: str
) -> None:
    """Or it would be taken, and every run from then on be out of disk space."""
    where = session(limits={"disk_mb": 8})
    install = "import os; os.mkdir('node_modules'); open('node_modules/.package-lock.json', 'w').write('{}')"
    run(where, f"{install}; open('node_modules/large', 'wb').write(bytes({5 << 20}))")
    assert client.get(f"/api/sessions/{where}").json()["total_size_bytes"] == 0
    for size, status in ((4 << 20, 413), (2 << 20, 200)):
        archive = tar(member("f", bytes(size)))
        assert client.put(f"/api/sessions/{where}/archive{query}", content=archive).status_code == status
    answer = client.put(f"/api/sessions/{where}/files/g", content=bytes(2 << 20))
    refused(answer, 413, "may be")
    assert run(where, "print(1)")["status"] == "ok"
