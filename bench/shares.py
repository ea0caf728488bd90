"""Cases of clusters whose hosts have equal shares of the processors: as many runs for each host, by one and by several.

A host's process and its sandboxes are together in a control group with a quota. PostgreSQL and the clients are outside.
What several hosts take longer than one is what they cost each other.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from bench import postgres
from bench.arena import ERA, Arena, service_environment, wait_for_port
from bench.cases import COUNTER, Probe
from tests.drivers.parent_group import ParentGroup

PROCESSORS = 0.25
"""Of each host."""

_CLIENTS = 6
RUNS = 240
"""Of each host in a call, by so many clients."""

_STOP_SECONDS = 60.0


@cache
def _hosts(arena: Arena, count: int) -> Sequence[Arena]:
    """The arenas of a cluster's hosts, which end with that of the others."""
    database = postgres.new_database(arena)
    place = arena.scratch / f"shares-{count}"
    place.mkdir()
    made: list[tuple[Path, subprocess.Popen[bytes], ParentGroup]] = []
    for number in range(count):
        directory, group = place / str(number), ParentGroup()
        group.bound_processors(PROCESSORS)
        directory.mkdir()
        environment = service_environment(directory / "data") | {
            "ERA_DATABASE_URL": database,
            "ERA_SHARED_DIR": str(place / "shared"),
            "ERA_CLUSTER_SECRET": "a secret of the hosts of a benchmark",
            "ERA_CGROUP_PARENT": group.path,
            "ERA_LEASE_SECONDS": "15",  # for hosts at their quota on a busy machine, whose heartbeats are late
            "ERA_SPARES": "0",
        }
        entered = "".join(f"echo 0 > {each}/cgroup.procs; " for each in group.directories)
        command = ["sh", "-ec", f'{entered} exec "$0" serve', str(ERA)]
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        made.append((directory, process, group))

    def stop() -> None:
        for _, process, group in made:
            group.bound_processors(1)
            process.terminate()
        for _, process, group in made:
            process.wait(_STOP_SECONDS)
            group.remove()

    arena.closers.callback(stop)
    return [
        Arena(wait_for_port(process, directory / "log"), process.pid, directory, small=arena.small)
        for directory, process, _ in made
    ]


def runs_at(count: int) -> Callable[[Arena], Probe]:
    """Warm runs that change data, as many at each of so many hosts, in sessions at home there."""

    def start(arena: Arena) -> Probe:
        clients = []
        for host in _hosts(arena, count):
            for _ in range(_CLIENTS):
                client = Arena(host.port, 0, host.data_dir, small=arena.small)
                arena.closers.callback(client.close)
                session = client.new_session("python")
                client.check_run(client.run(session, COUNTER))
                clients.append((client, session))
        each = max(arena.size(RUNS // _CLIENTS), 1)

        def one(client: Arena, session: str) -> None:
            client.keep_open()
            for _ in range(each):
                client.check_run(client.run(session, COUNTER))

        def call(_: object) -> None:
            with ThreadPoolExecutor(len(clients)) as pool:
                list(pool.map(lambda pair: one(*pair), clients))

        return Probe(call)

    return start
