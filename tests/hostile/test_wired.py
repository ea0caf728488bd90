"""A cluster whose cables are cut, each way and one way, whose packets come late and twice, whose hosts, PostgreSQL and
S3 go and come back, at random; and clients that keep track of what they were told."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from functools import partial
from glob import glob
from pathlib import Path

import httpx
import pytest

from tests.cluster import History
from tests.conftest import eventually
from tests.hostile.wired import WiredCluster, wired
from tests.hostile.wires import Fate, Place

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can make network namespaces"),
]

HOSTS, SESSIONS, CLIENTS = 4, 200, 32
FAULTS = 12
"""In a schedule."""

SCHEDULES = int(os.environ.get("SCHEDULES", "20"))
"""Of some five minutes each."""

FAKETIME = [os.environ.get("LIBFAKETIME", ""), *glob("/usr/lib/*/faketime/libfaketime.so.1")]
USABLE_SECONDS = 10.0
"""After which a session works again, if PostgreSQL and S3 can be reached from a host. On a machine that has to do all
this beside other things it may take three times as long."""

LOST = Fate(lost=True)


@contextmanager
def cut(cluster: WiredCluster, chance: random.Random) -> Iterator[None]:
    """Two places don't reach each other, or one of them not the other."""
    host = chance.choice(cluster.hosts).place
    others = [cluster.rows, cluster.content, *(each.place for each in cluster.hosts if each.place is not host)]
    ends: list[Place] = [host, chance.choice(others)]
    chance.shuffle(ends)
    cluster.wires.between(ends[0], ends[1], LOST, back=chance.choice((LOST, Fate())))
    yield
    cluster.wires.mend()


@contextmanager
def late(cluster: WiredCluster, chance: random.Random) -> Iterator[None]:
    """Packets come late, in another order, and twice. A run asks PostgreSQL some thirty things, one after the other."""
    places = [cluster.rows, cluster.content, *(host.place for host in cluster.hosts)]
    fate = Fate(seconds=chance.uniform(0.005, 0.05), doubled=0.3)
    for number, one in enumerate(places):
        for other in places[:number]:
            cluster.wires.between(one, other, fate)
    yield
    cluster.wires.mend()


@contextmanager
def paused(cluster: WiredCluster, chance: random.Random) -> Iterator[None]:
    with chance.choice(cluster.hosts).paused():
        yield


@contextmanager
def killed(cluster: WiredCluster, chance: random.Random) -> Iterator[None]:
    chance.choice(cluster.hosts).signal(signal.SIGKILL)
    yield


@contextmanager
def stopped(cluster: WiredCluster, chance: random.Random) -> Iterator[None]:
    chance.choice(cluster.hosts).signal(signal.SIGTERM)
    yield


@contextmanager
def cut_off_rows(cluster: WiredCluster, chance: random.Random) -> Iterator[None]:
    """All connections to PostgreSQL are ended again and again, at any point of a commit."""
    ending = threading.Event()

    def cut_them() -> None:
        while not ending.wait(chance.uniform(0, 0.2)):
            cluster.postgres.cut_off(cluster.database)

    thread = threading.Thread(target=cut_them)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


@contextmanager
def no_rows(cluster: WiredCluster, chance: random.Random) -> Iterator[None]:
    """PostgreSQL ends, in good order or not, and is started again."""
    cluster.postgres.stop(chance.choice((signal.SIGINT, signal.SIGQUIT)))
    try:
        yield
    finally:
        cluster.postgres.start()


@contextmanager
def rows_out_of_reach(cluster: WiredCluster, chance: random.Random) -> Iterator[None]:
    for host in cluster.hosts:
        cluster.wires.between(host.place, cluster.rows, LOST)
    yield
    cluster.wires.mend()


@contextmanager
def content_out_of_reach(cluster: WiredCluster, chance: random.Random) -> Iterator[None]:
    """S3 is gone for half a minute."""
    for host in cluster.hosts:
        cluster.wires.between(host.place, cluster.content, LOST)
    time.sleep(25)
    yield
    cluster.wires.mend()


ANY: list[Callable[[WiredCluster, random.Random], AbstractContextManager[None]]]
ANY = [cut, cut, cut, late, paused, killed, stopped, cut_off_rows]
"""What leaves some host that works, and so each session, within seconds."""

ALL = [no_rows, rows_out_of_reach, content_out_of_reach]


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


def _has_more(history: History, answers: int) -> bool:
    return len(history.answered) > answers


@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_histories_under_partitions(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    took: dict[str, list[float]] = {}
    with wired(tmp_path / "cluster", HOSTS) as cluster:
        sessions = [f"s{number}" for number in range(SESSIONS)]
        for number, session in enumerate(sessions):
            with cluster.client(number % HOSTS) as client:
                made = {"session_id": session, "language": "python"}
                assert client.post("/api/sessions", json=made).status_code == 201
        history = History(cluster, sessions, patience=20)
        threads = [
            threading.Thread(target=history.append, args=(7 * each,), kwargs={"again": each % 2 == 0})
            for each in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        for _ in range(FAULTS):
            fault = chance.choice(ALL) if chance.random() < 0.15 else chance.choice(ANY)
            session = chance.choice(sessions)
            print(f"{time.strftime('%X')} {fault.__name__}", flush=True)
            with fault(cluster, chance):
                if fault in ANY:
                    took.setdefault(fault.__name__, []).append(usable_after(cluster, session))
                time.sleep(chance.uniform(0, 12))
            took.setdefault(f"after {fault.__name__}", []).append(usable_after(cluster, session))
            before = len(history.answered)
            assert eventually(partial(_has_more, history, before + CLIENTS)), "nothing goes on"
            if chance.random() < 0.5:
                assert eventually(cluster.all_ready), "a host doesn't come back"
        history.stop.set()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive(), "a client waits for ever"
        assert eventually(cluster.all_ready)
        with cluster.client(0) as client:
            history.check(client)
            assert client.get("/api/runs", params={"status": "running"}).json()["runs"] == []
        for host in cluster.hosts:
            assert "Traceback" not in host.log, host.log
        print(f"{len(history.answered)} answers, {history.unknown} without one, {len(history.lost)} lost")
        for name, seconds in took.items():
            print(f"{name}: usable after {' '.join(f'{each:.1f}' for each in seconds)} s")
        assert max(map(max, took.values())) < 3 * USABLE_SECONDS


@pytest.mark.skipif(not any(FAKETIME), reason="there is no libfaketime here: apt-get install libfaketime")
@pytest.mark.parametrize("seconds", [-300, 300])
def test_clocks_that_are_minutes_apart(tmp_path: Path, seconds: int) -> None:
    library = next(filter(None, FAKETIME))
    apart = {"LD_PRELOAD": library, "FAKETIME": f"{seconds:+}s", "DONT_FAKE_MONOTONIC": "1"}
    with wired(tmp_path / "cluster", 2, each={1: apart}) as cluster, cluster.client(0) as one, cluster.client(1) as two:
        assert "clocks_apart" in cluster.hosts[1].log
        assert "clocks_apart" not in cluster.hosts[0].log
        ends = []
        for name, client in (("a", one), ("b", two)):
            made = client.post("/api/sessions", json={"session_id": name, "language": "python", "ttl": 200})
            assert made.status_code == 201, made.text
            ends.append(datetime.fromisoformat(made.json()["expires_at"]).timestamp() - time.time())
        assert all(100 < each < 201 for each in ends), ends
        for client in (one, two):
            assert sorted(each["id"] for each in client.get("/api/sessions").json()["sessions"]) == ["a", "b"]
            for name in "ab":
                answer = client.post(f"/api/sessions/{name}/run", json={"code": "print(1)"})
                assert answer.status_code == 200, answer.text
