"""A cluster whose cables are cut, each way and one way, whose packets come late and twice, whose hosts, PostgreSQL and
S3 are killed, go and come back, whose clocks jump, at random; and clients that keep track of what they were told.

A schedule that failed is repeated by its seed: `SCHEDULE=17 .venv/bin/pytest -m soak tests/hostile/test_wired.py`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import partial

import httpx
import pytest

from tests.cluster import LEASE_SECONDS, History
from tests.conftest import eventually
from tests.hostile import faults
from tests.hostile.faults import Step
from tests.hostile.wired import WiredCluster, wired

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make network namespaces")

HOSTS = 4
CLIENTS, SESSIONS = 4, 8
SOAK_CLIENTS, SOAK_SESSIONS, SOAK_FAULTS = 32, 200, 4
SEEDS = [int(os.environ["SCHEDULE"])] if "SCHEDULE" in os.environ else range(int(os.environ.get("SCHEDULES", "200")))
"""Of schedules of about a minute each."""

USABLE_SECONDS = 10.0
"""After which a session works again, if PostgreSQL and S3 can be reached from a host. On a machine that has to do all
this beside other things it may take three times as long."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WiredCluster]:
    """The cluster of this file's schedules, one after the other."""
    with wired(tmp_path_factory.mktemp("wired") / "cluster", HOSTS, lease_seconds=LEASE_SECONDS) as cluster:
        yield cluster


def usable_after(cluster: WiredCluster, session: str) -> float:
    """Seconds until a session works at whichever host."""
    began, number = time.monotonic(), 0
    while time.monotonic() < began + 120:
        number += 1
        try:
            with cluster.client(number % HOSTS, 5) as client:
                if client.post(f"/api/sessions/{session}/run", json={"code": "print(1)"}).status_code == 200:
                    break
        except (httpx.HTTPError, OSError):
            continue
    return time.monotonic() - began


def follow(cluster: WiredCluster, name: str, steps: Sequence[Step], history: History, clients: int) -> None:
    """Have clients append to a schedule's own sessions while its faults come and go, and check what they were told."""
    said = [len(host.log) for host in cluster.hosts]
    took: list[str] = []
    slowest = 0.0
    for number, session in enumerate(history.sessions):
        with cluster.client(number % HOSTS) as client:
            made = {"session_id": session, "language": "python"}
            assert client.post("/api/sessions", json=made).status_code == 201
    threads = [
        threading.Thread(target=history.append, args=(7 * each,), kwargs={"again": each % 2 == 0})
        for each in range(clients)
    ]
    for thread in threads:
        thread.start()
    try:
        for number, step in enumerate(steps):
            print(f"{time.strftime('%X')} {name} {step.fault.__name__} {step.seconds:.1f} s", flush=True)
            session = history.sessions[number * 5 % len(history.sessions)]
            seconds = []
            with step.on(cluster):
                if step.fault in faults.SOME:
                    seconds.append(usable_after(cluster, session))
                time.sleep(step.seconds)
            seconds.append(usable_after(cluster, session))
            took.append(f"{step.fault.__name__} {' '.join(f'{each:.1f}' for each in seconds)}")
            slowest = max(slowest, *seconds)
            before = len(history.answered)
            assert eventually(partial(_has_more, history, before + clients)), "nothing goes on"
    finally:
        history.stop.set()
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a client waits for ever"
    assert eventually(cluster.all_ready), "a host doesn't come back"
    with cluster.client(0) as client:
        history.check(client)
        assert client.get("/api/runs", params={"status": "running"}).json()["runs"] == []
        assert client.request("DELETE", "/api/sessions").status_code == 200
    for host, before in zip(cluster.hosts, said, strict=True):
        assert "Traceback" not in host.log[before:], host.log[before:]
    print(f"{len(history.answered)} answers, {history.unknown} without one, {len(history.lost)} lost")
    print(f"usable after: {', '.join(took)} s")
    assert slowest < 3 * USABLE_SECONDS


def _has_more(history: History, answers: int) -> bool:
    return len(history.answered) > answers


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*faults.SOME, *faults.ALL], ids=lambda fault: fault.__name__)
def test_a_history_under_each_kind_of_fault(cluster: WiredCluster, fault: faults.Fault) -> None:
    """With few clients, and as short as the fault lets it be."""
    cluster.outage_seconds = 5
    name = f"{fault.__name__}-"
    sessions = [f"{name}{number}" for number in range(SESSIONS)]
    history = History(cluster, sessions, patience=15, pause=0.1, parts_die=fault is faults.parts_killed, name=name)
    follow(cluster, name, [Step(fault, 1, len(name))], history, CLIENTS)


@pytest.mark.soak
@pytest.mark.parametrize("seed", SEEDS)
def test_a_history_under_a_random_schedule(cluster: WiredCluster, seed: int) -> None:
    name = f"schedule-{seed}-"
    steps = faults.schedule(seed, SOAK_FAULTS)
    sessions = [f"{name}{number}" for number in range(SOAK_SESSIONS)]
    dies = any(step.fault is faults.parts_killed for step in steps)
    history = History(cluster, sessions, patience=20, parts_die=dies, name=name)
    cluster.outage_seconds = 25
    try:
        follow(cluster, name, steps, history, SOAK_CLIENTS)
    except BaseException as error:
        error.add_note(f"again: SCHEDULE={seed} .venv/bin/pytest -m soak tests/hostile/test_wired.py")
        raise


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [-faults.MINUTES, faults.MINUTES])
def test_a_session_ends_by_the_databases_clock(cluster: WiredCluster, seconds: float) -> None:
    right, wrong = cluster.hosts[:2]
    said = len(wrong.log), len(right.log)
    wrong.set_clock(seconds)
    try:
        assert eventually(lambda: "clocks_apart" in wrong.log[said[0] :])
        names, ends = ("before", "after"), []
        with cluster.client(0) as one, cluster.client(1) as other:
            for name, client in zip(names, (one, other), strict=True):
                made = client.post("/api/sessions", json={"session_id": name, "language": "python", "ttl": 200})
                assert made.status_code == 201, made.text
                ends.append(datetime.fromisoformat(made.json()["expires_at"]).timestamp() - time.time())
            assert all(100 < each < 201 for each in ends), ends
            for client in (one, other):
                for name in names:
                    answer = client.post(f"/api/sessions/{name}/run", json={"code": "print(1)"})
                    assert answer.status_code == 200, answer.text
            assert one.request("DELETE", "/api/sessions").status_code == 200
    finally:
        wrong.set_clock(0)
    assert "clocks_apart" not in right.log[said[1] :]
