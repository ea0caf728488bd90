"""A cluster whose hosts are killed and paused at random, and clients that keep track of what they were told."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

from tests.cluster import History, running
from tests.conftest import eventually

SECONDS = 90.0
SESSIONS, CLIENTS = 24, 8
LEASE_SECONDS = 4


@pytest.mark.soak
@pytest.mark.parametrize("rows", ["sqlite", "postgresql"])
def test_histories_under_kills_and_pauses(tmp_path: Path, rows: str, request: pytest.FixtureRequest) -> None:
    chance = random.Random(1)
    settings = {"ERA_LEASE_SECONDS": str(LEASE_SECONDS)}
    if rows == "postgresql":
        settings["ERA_DATABASE_URL"] = request.getfixturevalue("postgres_url")
    with running(tmp_path / "cluster", 3, **settings) as cluster:
        sessions = [f"s{number}" for number in range(SESSIONS)]
        with cluster.clients() as clients:
            for number, session in enumerate(sessions):
                made = {"session_id": session, "language": "python"}
                assert clients[number % 3].post("/api/sessions", json=made).status_code == 201
        history = History(cluster, sessions)
        threads = [threading.Thread(target=history.append, args=(7 * each,)) for each in range(CLIENTS)]
        for thread in threads:
            thread.start()
        until, events = time.monotonic() + SECONDS, 0
        try:
            while time.monotonic() < until:
                time.sleep(chance.uniform(0, 3))
                number = chance.randrange(3)
                if chance.random() < 0.5:
                    cluster.kill(number)
                else:
                    with cluster.paused(number):
                        time.sleep(chance.uniform(0.5, 3) * LEASE_SECONDS)
                events += 1
                assert history.goes_on(CLIENTS), "nothing goes on"
        finally:
            history.stop.set()
            for thread in threads:
                thread.join()
        assert eventually(lambda: all(map(cluster.is_ready, range(3))))
        with cluster.clients() as clients:
            history.check(clients[0])
            runs = clients[0].get("/api/runs", params={"status": "running"}).json()["runs"]
            assert runs == []
        assert history.answered
        print(f"{events} kills and pauses, {len(history.answered)} answers, {history.unknown} without one")
