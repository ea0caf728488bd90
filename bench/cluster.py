"""Cases of a cluster of hosts on this machine, with their rows in PostgreSQL: `era cluster up`, as users start it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

from bench import postgres
from bench.arena import ERA, Answer, Arena, service_environment
from bench.cases import COUNTER, Probe

LIVE = 100
_START_SECONDS, _PATIENCE_SECONDS = 120.0, 120.0


class Cluster:
    """Hosts that `era cluster up` has started and watches over."""

    def __init__(self, directory: Path, arena: Arena) -> None:
        self._directory = directory
        self._arena = arena

    def told(self) -> list[dict[str, Any]]:
        hosts: list[dict[str, Any]] = json.loads((self._directory / "cluster.json").read_text())["hosts"]
        return hosts

    def pid(self, number: int) -> int:
        return int(self.told()[number]["pid"])

    def host(self, number: int) -> Arena:
        """The arena of a host."""
        port = int(self.told()[number]["url"].rpartition(":")[2])
        return Arena(port, self.pid(number), self._directory, small=self._arena.small)

    def is_ready(self, number: int) -> bool:
        try:
            return self.host(number).get("/ready")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def wait(self, what: Callable[[], bool]) -> None:
        """Raises RuntimeError where that takes too long."""
        until = time.monotonic() + _PATIENCE_SECONDS
        while not what():
            if time.monotonic() > until:
                raise RuntimeError("The cluster isn't as it should be.")
            time.sleep(0.02)


@cache
def cluster(arena: Arena, name: str, hosts: int) -> Cluster:
    """A cluster, which ends with the arena."""
    directory = arena.scratch / name
    directory.mkdir()
    environment = service_environment(directory) | {"ERA_DATABASE_URL": postgres.new_database(arena), "ERA_SPARES": "0"}
    del environment["ERA_PORT"], environment["ERA_DATA_DIR"]
    command = [str(ERA), "cluster", "up", "--hosts", str(hosts), "--dir", str(directory)]
    with (directory / "up.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def stop() -> None:
        process.send_signal(signal.SIGTERM)
        process.wait(60)

    arena.closers.callback(stop)
    made = Cluster(directory, arena)
    made.wait(lambda: (directory / "cluster.json").exists())
    return made


def run_at(number: int) -> Callable[[Arena], Probe]:
    """A warm run that changes data, in a session at home at the first host, through one of the hosts."""

    def start(arena: Arena) -> Probe:
        hosts = cluster(arena, "two-hosts", 2)
        home, called = hosts.host(0), hosts.host(number)
        session = home.new_session("python")
        home.check_run(home.run(session, COUNTER))
        return Probe(lambda _: called.run(session, COUNTER), called.keep_open, called.check_run)

    return start


def take_over(arena: Arena) -> Probe:
    """A run in a session whose home was just paused, as when its machine is gone, until another host has done it."""
    hosts = cluster(arena, "taken-over", 2)
    paused = 0

    def before() -> tuple[Arena, str]:
        nonlocal paused
        for number in range(2):
            hosts.wait(partial(hosts.is_ready, number))
        home, other = hosts.host(0), hosts.host(1)
        session = home.new_session("python")
        home.check_run(home.run(session, COUNTER))
        paused = hosts.pid(0)
        os.kill(paused, signal.SIGSTOP)
        return other, session

    def call(prepared: tuple[Arena, str]) -> None:
        other, session = prepared
        hosts.wait(lambda: other.run(session, COUNTER)[0] == 200)

    def after(_: object) -> None:
        # It finds that it was declared dead, ends, and is started anew.
        os.kill(paused, signal.SIGCONT)
        hosts.wait(lambda: hosts.pid(0) != paused)

    return Probe(call, before, after)


def drain(arena: Arena) -> Probe:
    """The end of a host with 100 live sessions, from the signal until each of them has done a run at the other host,
    which finds the file that a process wrote."""
    hosts = cluster(arena, "drained", 2)
    count = max(arena.size(LIVE), 4)
    sessions: list[str] = []

    def before() -> int:
        for number in range(2):
            hosts.wait(partial(hosts.is_ready, number))
        home, other = hosts.host(0), hosts.host(1)
        for session in sessions:
            other.delete_session(session)
        sessions.clear()
        for _ in range(count):
            session = home.new_session("python")
            home.check_status(201)(home.post(f"/api/sessions/{session}/processes", {"command": "echo > f; sleep 1d"}))
            sessions.append(session)
        return hosts.pid(0)

    def call(pid: int) -> None:
        os.kill(pid, signal.SIGTERM)
        other = hosts.host(1)

        def one(session: str) -> None:
            client = Arena(other.port, 0, other.data_dir, small=False)
            answers = list[Answer]()

            def has_run() -> bool:
                answers.append(client.run(session, "import os; print(int(os.path.exists('f')))"))
                return answers[-1][0] == 200

            hosts.wait(has_run)
            client.check_run(answers[-1])

        with ThreadPoolExecutor(16) as clients:
            list(clients.map(one, sessions))

    return Probe(call, before)
