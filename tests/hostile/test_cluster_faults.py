"""A cluster whose cables are cut, each way and one way, whose packets come late and twice, whose hosts, PostgreSQL and
S3 are killed, go and come back, whose clocks jump, at random; and clients that keep track of what they were told.

A schedule that failed is repeated by its seed:
`SCHEDULE=17 .venv/bin/pytest -m soak tests/hostile/test_cluster_faults.py`. Ray's failures are in test_ray.py.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial

import httpx
import pytest

from tests.cluster import History
from tests.conftest import eventually
from tests.hostile import faults
from tests.hostile.faults import Step
from tests.hostile.networked_cluster import NetworkedCluster, networked_cluster
from tests.soaking import soak_the_rest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make network namespaces")

HOSTS = 4
LEASE_SECONDS = 6
MOST_TELLING = (faults.partitioned, faults.killed, faults.database_unreachable, faults.s3_killed)
"""Of each kind one: a host that lives on and is cut off, one that is gone, and the engines away."""

CLIENTS, SESSIONS = 4, 8
SOAK_CLIENTS, SOAK_SESSIONS, SOAK_FAULTS = 32, 200, 3
SEEDS = [int(os.environ["SCHEDULE"])] if "SCHEDULE" in os.environ else list(range(4))

USABLE_SECONDS = 10.0
"""After which a session works again, if PostgreSQL and S3 can be reached from a host. On a machine that has to do all
this beside other things it may take three times as long."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetworkedCluster]:
    """The cluster of this file's schedules, one after the other. Its hosts are processes that are started anew once
    they have ended, as a service manager does."""
    directory = tmp_path_factory.mktemp("faults") / "cluster"
    with networked_cluster(directory, HOSTS, lease_seconds=LEASE_SECONDS) as cluster:
        yield cluster


def usable_after(cluster: NetworkedCluster, session: str) -> float:
    """Seconds until a session works at whichever host. Each asks for the same run, by its key, since runs that nobody
    waits for any more are done nevertheless: they would make the session's queue longer and longer."""
    began, number, run = time.monotonic(), 0, 0
    while time.monotonic() < began + 120:
        number += 1
        key = {"Idempotency-Key": f"usable {began} {run}"}
        try:
            with cluster.client(number % HOSTS, 5) as client:
                answer = client.post(f"/api/sessions/{session}/run", json={"code": "print(1)"}, headers=key)
        except (httpx.HTTPError, OSError):
            continue
        if answer.status_code == 200:
            break
        run += answer.json().get("code") == "run_lost"
    return time.monotonic() - began


def follow(cluster: NetworkedCluster, name: str, steps: Sequence[Step], history: History, clients: int) -> None:
    """Have clients append to sessions while a schedule's faults come and go, and check what they were told."""
    said = [len(host.log) for host in cluster.hosts]
    took: list[str] = []
    slowest = 0.0
    with ThreadPoolExecutor(HOSTS) as makers:
        assert sum(makers.map(partial(make, cluster, history.sessions), range(HOSTS))) == len(history.sessions)
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
                if step.fault not in faults.TOTAL:
                    seconds.append(usable_after(cluster, session))
                time.sleep(step.seconds)
            seconds.append(usable_after(cluster, session))
            took.append(f"{step.fault.__name__} {' '.join(f'{each:.1f}' for each in seconds)}")
            slowest = max(slowest, *seconds)
            assert history.goes_on(clients), "nothing goes on"
    finally:
        history.stop.set()
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a client waits for ever"
    assert eventually(cluster.all_ready, 60), "a host doesn't come back"
    with cluster.client(0) as client:
        history.check(client)
        assert client.get("/api/runs", params={"status": "running"}).json()["runs"] == []
    for host, before in zip(cluster.hosts, said, strict=True):
        assert "Traceback" not in host.log[before:], host.log[before:]
    print(f"{len(history.answered)} answers, {history.unknown} without one, {len(history.lost)} lost")
    print(f"usable after: {', '.join(took)} s")
    assert slowest < 3 * USABLE_SECONDS


def make(cluster: NetworkedCluster, sessions: Sequence[str], number: int) -> int:
    """Make one host's share of the sessions there, or empty those that the schedule before has left; how many."""
    mine = sessions[number::HOSTS]
    with cluster.client(number) as client:
        for session in mine:
            made = client.post("/api/sessions", json={"session_id": session, "language": "python"})
            if made.status_code == 409:
                made = client.patch(f"/api/sessions/{session}", json={"data": {}})
            assert made.is_success, made.text
    return len(mine)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", soak_the_rest([*faults.PARTIAL, *faults.TOTAL], MOST_TELLING), ids=lambda fault: fault.__name__
)
def test_a_history_under_each_kind_of_fault(cluster: NetworkedCluster, fault: faults.Fault) -> None:
    cluster.outage_seconds = 5
    follow_one(cluster, fault)


def follow_one(cluster: NetworkedCluster, fault: faults.Fault, seconds: float = 1) -> None:
    """With few clients, and as short as the fault lets it be."""
    name = f"{fault.__name__}-"
    sessions = [f"{name}{number}" for number in range(SESSIONS)]
    history = History(
        cluster, sessions, patience=15, pause=0.1, children_die=fault is faults.child_processes_killed, name=name
    )
    follow(cluster, name, [Step(fault, seconds, len(name))], history, CLIENTS)
    with cluster.client(0) as client:
        assert client.request("DELETE", "/api/sessions").status_code == 200


@pytest.mark.soak
@pytest.mark.parametrize("seed", SEEDS)
def test_a_history_under_a_random_schedule(cluster: NetworkedCluster, seed: int) -> None:
    name = f"schedule-{seed}-"
    steps = faults.schedule(seed, SOAK_FAULTS)
    sessions = [f"soak-{number}" for number in range(SOAK_SESSIONS)]  # of all schedules, so most are warm somewhere
    dies = any(step.fault is faults.child_processes_killed for step in steps)
    history = History(cluster, sessions, patience=20, children_die=dies, name=name)
    cluster.outage_seconds = 25
    try:
        follow(cluster, name, steps, history, SOAK_CLIENTS)
    except BaseException as error:
        error.add_note(f"again: SCHEDULE={seed} .venv/bin/pytest -m soak tests/hostile/test_cluster_faults.py")
        raise


@pytest.mark.slow
@pytest.mark.parametrize("seconds", soak_the_rest([-faults.MINUTES, faults.MINUTES], 1))
def test_a_session_ends_by_the_databases_clock(cluster: NetworkedCluster, seconds: float) -> None:
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
