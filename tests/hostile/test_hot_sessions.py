"""A host of a cluster whose processors are full: sessions that run all the time move to one where they are idle."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.api.live import start
from tests.cluster import History
from tests.conftest import Server, eventually
from tests.hostile.test_full_host import Both, count, full_home, homes, make, moved
from tests.two_hosts import Home

HOLD = "import time\nuntil = time.process_time() + 0.05\nwhile time.process_time() < until: pass"
"""A run that has its slot for as long as it takes, however busy the machine is."""

ONE_PROCESSOR = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"

SECONDS = 120.0


@contextmanager
def small_hosts(directory: Path) -> Iterator[Home]:
    """Two hosts with the slots of one processor each, and places for many sandboxes."""
    with full_home(directory, 32, ONE_PROCESSOR, ERA_MAX_WARM="32") as home:
        assert home.process is not None
        assert home.other is not None
        assert home.other.process is not None
        for pid in (home.process.pid, home.other.process.pid, *home.descendants(), *home.other.descendants()):
            for thread in os.listdir(f"/proc/{pid}/task"):
                os.sched_setaffinity(int(thread), os.sched_getaffinity(0))
        yield home


@contextmanager
def held(server: Server, names: Sequence[str]) -> Iterator[list[str]]:
    """A client a session that runs there all the time; what went wrong."""
    stop, wrong = threading.Event(), list[str]()

    def run(name: str) -> None:
        with server.client(timeout=60) as client:
            while not stop.is_set():
                answer = client.post(f"/api/sessions/{name}/run", json={"code": HOLD})
                if answer.status_code != 200 or answer.json()["status"] != "ok":
                    wrong.append(answer.text)

    clients = [threading.Thread(target=run, args=(name,)) for name in names]
    for client in clients:
        client.start()
    try:
        yield wrong
    finally:
        stop.set()
        for client in clients:
            client.join(60)


def epochs(home: Home) -> int:
    """The most homes that a session has had."""
    return max(epoch for _, epoch in homes(home).values())


def elsewhere(home: Home) -> set[str]:
    return {name for name, (at_home, _) in homes(home).items() if not at_home}


def test_a_hot_session_moves_while_eight_clients_run_in_it(tmp_path: Path) -> None:
    """Nothing is lost or done twice, and no call fails; what has a process stays, however busy."""
    with small_hosts(tmp_path) as home, home.at_home().client() as client:
        live = [f"live{number}" for number in range(5)]
        make(client, "hot", *live)
        count(client, "hot")
        for name in live:
            start(client, name, "exec sleep 600")
        history = History(Both(home), ["hot"])
        appending = [threading.Thread(target=history.append, args=(seed,)) for seed in range(8)]
        with held(home.at_home(), live) as wrong:
            for each in appending:
                each.start()
            try:
                assert eventually(lambda: elsewhere(home) == {"hot"}, SECONDS)
                answered = len(history.answered)
                assert eventually(lambda: len(history.answered) >= answered + 40, SECONDS)
            finally:
                history.stop.set()
                for each in appending:
                    each.join(60)
        assert (history.unknown, history.lost, wrong) == (0, [], [])
        history.check(client)
        assert (moved(home.at_home()), epochs(home)) == (1, 2)


@pytest.mark.soak
def test_hot_sessions_are_spread(tmp_path: Path) -> None:
    with small_hosts(tmp_path) as home, home.at_home().client() as client:
        names = [f"s{number}" for number in range(16)]
        make(client, *names)
        with held(home.at_home(), names) as wrong:
            assert eventually(lambda: len(elsewhere(home)) >= 4, SECONDS)
        assert wrong == []
        # Nothing has gone back and forth, nor has all gone.
        assert epochs(home) == 2
        assert len(elsewhere(home)) <= 12
