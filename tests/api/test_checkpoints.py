"""Checkpoints of live sessions over HTTP, on real sandboxes: what they hold, when they come, what stays when the
service is killed."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from typing import Any

import httpx
import pytest

from era.core.models import CHECKPOINTS
from era.wire.processes import CheckpointAnswer
from tests.api.answers import checked, refused
from tests.api.files_api import get, put
from tests.api.live import ended, process, start
from tests.conftest import MakeServer, MakeSession, Run, built_with, eventually
from tests.gvisor import BOTH_KINDS, needs_gvisor, of_kind
from tests.soaking import soak_the_rest

COUNTERS = """
import os, sys
for number in range(int(sys.argv[1])):
    if os.fork() == 0:
        n = 0
        files = [os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT) for name in "ab"]
        while True:
            n += 1
            for file in files:
                os.pwrite(file, b"%08d" % n, 0)
os.wait()
"""
"""As many processes as are asked for, each of which writes a counter to two files, in order, and never leaves one
empty."""


def checkpoint(client: httpx.Client, where: str) -> dict[str, Any]:
    answer = client.post(f"/api/sessions/{where}/checkpoint")
    return checked(answer, CheckpointAnswer, {"version", "consistent"})


def versions(client: httpx.Client, where: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get(f"/api/sessions/{where}/versions").json()["versions"]
    return found


def content(client: httpx.Client, where: str, number: int, path: str) -> bytes:
    answer = client.get(f"/api/sessions/{where}/versions/{number}/files/{path}")
    return answer.content if answer.status_code == 200 else b""


CAN_FREEZE = os.geteuid() == 0
CAUSE = "checkpoint" if CAN_FREEZE else "loose_checkpoint"


def output_bytes(client: httpx.Client, where: str) -> int:
    count: int = process(client, where, "p")["output_bytes"]
    return count


def stop(client: httpx.Client, where: str) -> None:
    assert client.post(f"/api/sessions/{where}/stop").is_success


def test_a_checkpoint_is_a_version_of_what_processes_have_written(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    assert checkpoint(client, where) == {"version": 1, "consistent": True}
    start(client, where, "echo one > a; mkdir d; ln -s a d/l; echo ready; sleep 1000", tag="writer")
    assert eventually(lambda: process(client, where, "writer")["output_bytes"])
    made = checkpoint(client, where)
    assert made["consistent"] == CAN_FREEZE
    assert made["version"] == 2
    assert checkpoint(client, where) == made, "nothing has changed"
    [newest, _] = versions(client, where)
    assert (newest["cause"], newest["file_count"], newest["run_id"]) == (CAUSE, 2, None)
    assert content(client, where, 2, "a") == b"one\n"
    assert process(client, where, "writer")["status"] == "running"
    stop(client, where)
    assert get(client, where, "a").content == b"one\n"


@pytest.mark.skipif(not CAN_FREEZE, reason="an ordinary user's sandboxes can't be frozen")
@pytest.mark.parametrize("counters", soak_the_rest([4, 20], 1))
@pytest.mark.parametrize("isolation", BOTH_KINDS)
def test_no_checkpoint_shows_counters_reversed(
    client: httpx.Client, session: MakeSession, isolation: str, counters: int
) -> None:
    where = session(**of_kind(isolation))
    start(client, where, ["python3", "-c", COUNTERS, str(counters)])
    assert eventually(lambda: len(client.get(f"/api/sessions/{where}/files").json()["files"]) == 2 * counters)
    for _ in range(4):
        seen = 0
        made = checkpoint(client, where)
        assert made["consistent"]
        for counter in range(counters):
            first, second = (content(client, where, made["version"], f"{counter}.{name}") for name in "ab")
            if first and second:
                seen += 1
                assert int(first) - int(second) in (0, 1)
    assert seen == counters
    stop(client, where)


NO_FREEZER = """
from contextlib import asynccontextmanager
from era.drivers.freezer import Freezer

@asynccontextmanager
async def frozen(_):
    yield None

Freezer.frozen = frozen
"""


def test_consistent_without_freezer_only_once_no_process_is_left(own_server: MakeServer) -> None:
    """Neither one that was asked for, nor what it has left behind."""
    server = own_server(weakness=NO_FREEZER, idle_seconds="60")
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
        start(client, "s", "sleep 1000", tag="p")
        assert not checkpoint(client, "s")["consistent"]
        client.delete("/api/sessions/s/processes/p")
        ended(client, "s", start(client, "s", "sleep 1000 > /dev/null 2>&1 & echo $! > pid"))
        assert not checkpoint(client, "s")["consistent"]
        ended(client, "s", start(client, "s", "kill $(cat pid); rm pid; echo 1 > last"))
        assert eventually(lambda: checkpoint(client, "s")["consistent"])
        assert versions(client, "s")[0]["cause"] == "checkpoint"
        stop(client, "s")


def test_they_come_when_a_process_ends_and_from_time_to_time(own_server: MakeServer) -> None:
    server = own_server(weakness=built_with("era.parts.LiveSessions", checkpoint_seconds=0.3), idle_seconds="60")
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
        ended(client, "s", start(client, "s", "echo one > a"))
        assert eventually(lambda: versions(client, "s")[0]["cause"] == "checkpoint")
        assert get(client, "s", "a").content == b"one\n"
        start(client, "s", "sleep 0.5; echo two > b; sleep 1000")
        assert eventually(lambda: content(client, "s", versions(client, "s")[0]["version"], "b") == b"two\n")
        stop(client, "s")


def test_runs_keep_their_versions_beside_many_checkpoints(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    run(where, "open('r', 'w').write('1')")
    start(client, where, "i=0; while sleep 0.02; do i=$((i+1)); echo $i > n; done")
    assert eventually(lambda: checkpoint(client, where)["version"] > 14)
    found = versions(client, where)
    assert [each["version"] for each in found if each["cause"] == "run"] == [2]
    assert sum(each["cause"] in CHECKPOINTS for each in found) == 10
    stop(client, where)


def test_a_run_in_a_live_session_commits_what_processes_wrote(
    client: httpx.Client, session: MakeSession, run: Run
) -> None:
    where = session()
    start(client, where, "for i in $(seq 100); do echo $i > f$i; done; echo ready; sleep 1000", tag="writer")
    assert eventually(lambda: process(client, where, "writer")["output_bytes"])
    outcome = run(where, "open('mine', 'w').write('x')")
    assert outcome["state"]["committed"]
    shown = client.get(f"/api/sessions/{where}").json()
    assert shown["file_count"] == 101
    stop(client, where)
    assert client.get(f"/api/sessions/{where}").json()["version"] == shown["version"], "nothing more has changed"


NOT_ENDED = "from era.core.trees import allowance; allowance._FIRST = 60.0"
"""Processes that exceed a limit aren't ended for it during the test."""


def test_what_cant_be_kept_is_refused_with_the_reason(own_server: MakeServer) -> None:
    with own_server(weakness=NOT_ENDED).client() as client:
        where = "s"
        body = {"language": "python", "session_id": where, "limits": {"files": 1000}}
        client.post("/api/sessions", json=body).raise_for_status()
        command = "echo one > a; echo ready; read x; mkdir many; cd many; touch $(seq 2000); echo full; sleep 99"
        start(client, where, command, stdin=True, tag="filler")
        assert eventually(lambda: process(client, where, "filler")["output_bytes"])
        made = checkpoint(client, where)
        client.put(f"/api/sessions/{where}/versions/{made['version']}/name", json={"name": "kept"})
        client.post(f"/api/sessions/{where}/processes/filler/stdin", content=b"go\n")
        assert eventually(lambda: client.post(f"/api/sessions/{where}/checkpoint").status_code == 413)
        refused(client.post(f"/api/sessions/{where}/checkpoint"), 413, "1000", "stands")
        assert content(client, where, made["version"], "a") == b"one\n"
        client.delete(f"/api/sessions/{where}?purge=true")


@pytest.mark.parametrize("isolation", ["bubblewrap", pytest.param("gvisor", marks=needs_gvisor)])
def test_a_directory_in_the_state_files_place_is_never_left_out_silently(
    client: httpx.Client, session: MakeSession, run: Run, isolation: str
) -> None:
    where = session(**of_kind(isolation))
    instead = "rm -f .session_data.json; mkdir .session_data.json; echo 1 > .session_data.json/a; echo ready"
    start(client, where, f"{instead}; read x; mv .session_data.json d; echo moved; read x", stdin=True, tag="p")
    assert eventually(lambda: output_bytes(client, where) == 6)
    before = client.get(f"/api/sessions/{where}").json()["version"]
    reason = ".session_data.json is a directory"
    assert refused(client.post(f"/api/sessions/{where}/checkpoint"), 409, reason)["code"] == "no_checkpoint"
    assert refused(put(client, where, "new", b"1"), 409, reason)["code"] == "no_checkpoint"
    assert client.get(f"/api/sessions/{where}").json()["version"] == before
    client.post(f"/api/sessions/{where}/processes/p/stdin", content=b"go\n")
    assert eventually(lambda: output_bytes(client, where) == 12)
    made = checkpoint(client, where)["version"]
    assert (content(client, where, made, "d/a"), content(client, where, made, "new")) == (b"1\n", b"1")
    start(client, where, f"{instead}; exec sleep 1000", tag="again")
    assert eventually(lambda: process(client, where, "again")["output_bytes"])
    refused(client.post(f"/api/sessions/{where}/stop"), 409, reason)
    assert run(where, "import os; print(sorted(os.listdir()))")["stdout"].split()[-1] == "'new']"


@pytest.mark.parametrize("persistent", [False])
def test_a_session_that_keeps_no_files_has_none(client: httpx.Client, session: MakeSession, persistent: bool) -> None:
    where = session(persistent=persistent)
    assert refused(client.post(f"/api/sessions/{where}/checkpoint"), 409)["code"] == "not_persistent"


@pytest.mark.parametrize("kills", soak_the_rest([1, 3], 1))
def test_a_killed_service_leaves_the_last_checkpoint(own_server: MakeServer, kills: int) -> None:
    server = own_server(weakness=built_with("era.parts.LiveSessions", checkpoint_seconds=600))
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
        put(client, "s", "base", b"base")
    for round_ in range(kills):
        with server.client() as client:
            count = f"i=0; while :; do i=$((i+1)); echo {round_}.$i > t; mv t n; echo $i > f$((i % 50)); done"
            name = start(client, "s", count)
            kept = b""
            while not kept.startswith(b"%d." % round_):
                made = checkpoint(client, "s")
                kept = content(client, "s", made["version"], "n")
            # Another one is under way when it dies.
            with suppress(httpx.HTTPError):
                httpx.post(f"{server.url}/api/sessions/s/checkpoint", timeout=0.01 + 0.01 * round_)
        server.stop(signal.SIGKILL)
        server.start()
        with server.client() as client:
            assert process(client, "s", name)["status"] == "lost"
            current = client.get("/api/sessions/s").json()["version"]
            assert current in (made["version"], made["version"] + 1), "never less than what was acknowledged"
            assert content(client, "s", made["version"], "n") == kept
            assert get(client, "s", "n").content.startswith(b"%d." % round_)
            assert get(client, "s", "base").content == b"base"
            assert [name for name in os.listdir(server.data_dir / "uploads") if name.startswith("aside")] == []


@pytest.mark.soak
def test_processes_go_on_between_checkpoints_however_often_they_are_made(
    client: httpx.Client, session: MakeSession
) -> None:
    where = session()
    watch = (
        "import time\nturns, end = 0, time.monotonic() + 3\nprint('up', flush=True)\n"
        "while time.monotonic() < end:\n"
        "    time.sleep(0.001); turns += 1\n"
        "open('turns', 'w').write(str(turns))\n"
    )
    start(client, where, ["python3", "-c", watch], tag="watch")
    assert eventually(lambda: process(client, where, "watch")["output_bytes"])
    end = time.monotonic() + 2
    while time.monotonic() < end:
        checkpoint(client, where)
    ended(client, where, "watch")
    assert eventually(lambda: get(client, where, "turns").status_code == 200)
    assert int(get(client, where, "turns").content) > 20
    stop(client, where)
