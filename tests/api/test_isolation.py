"""Sessions choose their isolation, and the record of a run says which was in force."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import httpx
import pytest

from tests.api.answers import refused
from tests.api.live import ended, start
from tests.conftest import MakeServer, MakeSession, Run, eventually
from tests.gvisor import HAS_GVISOR, needs_gvisor
from tests.soaking import soak_the_rest
from tests.table import table


def in_force(client: httpx.Client, where: str) -> Any:
    """What was enforced in a session's newest run."""
    return client.get(f"/api/sessions/{where}/runs?limit=1").json()["runs"][0]["enforced"]


@needs_gvisor
def test_a_session_can_have_gvisor_and_change_its_mind(own_server: MakeServer) -> None:
    server = own_server()
    with server.client() as client, server.client(base_url=server.own_url) as at_home:
        made = client.post("/api/sessions", json={"language": "python", "session_id": "s", "isolation": "gvisor"})
        assert made.json()["isolation"] == "gvisor"

        def run(code: str) -> dict[str, Any]:
            answer = client.post("/api/sessions/s/run", json={"code": code})
            assert answer.status_code == 200, answer.text
            outcome: dict[str, Any] = answer.json()
            return outcome

        assert "gvisor" not in at_home.get("/health").json()["isolation"]["available"], "proved only when needed"
        assert run("open('kept', 'w').write('1'); print(open('/proc/version').read())")["status"] == "ok"
        assert (in_force(client, "s")["driver"], in_force(client, "s")["platform"]) == ("gvisor", "systrap")
        assert at_home.get("/health").json()["isolation"]["available"] == ["bubblewrap", "gvisor"]
        changed = client.patch("/api/sessions/s", json={"isolation": "bubblewrap"}).json()
        assert changed["metadata"]["isolation"] == "bubblewrap"
        assert run("print(open('kept').read())")["stdout"] == "1\n"
        assert in_force(client, "s")["driver"] == "bubblewrap"
        copy = client.post("/api/sessions/s/duplicate", json={}).json()
        assert copy["isolation"] == "bubblewrap"
        body = {"language": "node", "code": "console.log(1)", "isolation": "gvisor"}
        assert client.post("/api/execute", json=body).json()["stdout"] == "1\n"


@needs_gvisor
def test_auto_is_gvisor_where_it_works(own_server: MakeServer) -> None:
    server = own_server(isolation="auto")
    with server.client() as client:
        assert client.get("/health").json()["isolation"]["default"] == "gvisor"
        client.post("/api/sessions", json={"language": "typescript", "session_id": "s"})
        outcome = client.post("/api/sessions/s/run", json={"code": "const n: number = 1; console.log(n)"}).json()
        assert outcome["stdout"] == "1\n"
        assert in_force(client, "s")["driver"] == "gvisor"


@needs_gvisor
def test_nothing_of_gvisor_outlives_kill_9(own_server: MakeServer) -> None:
    server = own_server(isolation="gvisor")
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s", "data": {"n": 1}})
        client.post("/api/sessions/s/run", json={"code": "open('kept', 'w').write('1')"})
    processes = server.descendants()
    server.stop(9)
    server.start()
    with server.client() as client:
        assert client.post("/api/sessions/s/run", json={"code": "print(open('kept').read())"}).json()["stdout"] == "1\n"
    left = [pid for pid in processes if eventually(partial(_has_ended, pid)) is False]
    assert left == []


def _has_ended(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"runsc" not in file.read()
    except OSError:
        return True


@pytest.mark.skipif(HAS_GVISOR and os.geteuid() != 0, reason="only root can hide gVisor from a server")
def test_isolation_that_does_not_work_here_is_refused(own_server: MakeServer) -> None:
    """On a machine whose runsc doesn't work, a session that asks for gVisor gets no other sandbox."""
    server = own_server(hidden="/usr/bin/runsc") if HAS_GVISOR else own_server()
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s", "isolation": "gvisor"})
        body = refused(client.post("/api/sessions/s/run", json={"code": "print(1)"}), 503)
        assert body["code"] == "no_isolation"
        records = client.get("/api/sessions/s/runs").json()["runs"]
        assert [record["status"] for record in records] == ["failed"]
        assert client.patch("/api/sessions/s", json={"isolation": "auto"}).status_code == 200
        assert client.post("/api/sessions/s/run", json={"code": "print(1)"}).json()["stdout"] == "1\n"


@table("isolation", ["none", "", None, 1, "Bubblewrap"])
def test_unknown_isolation_is_refused(client: httpx.Client, isolation: Any) -> None:
    body = {"language": "python", "isolation": isolation}
    refused(client.post("/api/sessions", json=body), 400, "isolation")


def test_the_isolation_in_force_is_on_the_record(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    run(where, "")
    of_a_run = in_force(client, where)
    assert of_a_run["driver"] == "bubblewrap"
    assert client.get("/health").json()["isolation"]["default"] == "bubblewrap"
    run(where, "", context="main")
    of_a_cell = in_force(client, where)
    assert of_a_cell == of_a_run | {"separated_by": "pid_namespace"}
    assert {"ipc", "mnt", "net", "pid", "user"} <= set(of_a_cell["namespaces"])


TAKES = """
import mmap, os, time
held = [TAKE for _ in range(4)]
for each in held:
    for _ in range(60): os.write(each, b'x' * (1 << 20)) if isinstance(each, int) else each.write(b'x' * (1 << 20))
print('took', flush=True)
time.sleep(float(os.environ['SECONDS']))
"""
TAKE = {"shared maps": "mmap.mmap(-1, 60 << 20)", "files in memory": "os.memfd_create('m')"}
"""What no limit of a process bounds: 240 MiB of it."""

UNWATCHED = """
from era.drivers.cgroups import Cgroups
from era.drivers.memory import MemoryWatch
Cgroups.find = lambda *_: None
MemoryWatch.start = lambda _: None
"""
"""Has no control group, and doesn't measure either."""


@pytest.mark.parametrize("weakness", soak_the_rest(["", UNWATCHED], 1), ids=["watched", "unwatched"])
def test_the_record_says_that_memory_is_watched_and_it_is(own_server: MakeServer, weakness: str) -> None:
    """Where the service has no control group, as that of an ordinary user."""
    server = own_server(weakness=weakness) if weakness or os.geteuid() != 0 else own_server(uid=54_327)
    with server.client() as client:
        made = {"language": "python", "session_id": "s", "limits": {"memory_mb": 128}}
        assert client.post("/api/sessions", json=made).status_code == 201
        env = {"SECONDS": "0.5" if weakness else "60"}
        for take in TAKE.values():
            code = TAKES.replace("TAKE", take)
            run = client.post("/api/sessions/s/run", json={"code": code, "env": env, "timeout": 100}).json()
            enforced = in_force(client, "s")
            if enforced["cgroup"]:
                pytest.skip("this user has a control group")
            assert (enforced["memory"], enforced["rlimits"]["RLIMIT_DATA"]) == ("watched", 128 << 20)
            process = ended(client, "s", start(client, "s", ["python3", "-c", code], env=env))
            outcome = run["status"], run["exit_code"], process["exit_code"], process["reason"]
            assert outcome == (("ok", 0, 0, None) if weakness else ("oom", 137, 137, "It was out of memory.")), run
