"""Faults of a cluster (networked_cluster.py): what is cut, late, paused, killed, gone or wrong within a block, and soon
after it.

Each is drawn from a random generator of its own, so a schedule of them is the same whenever its seed is.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass

from tests.conftest import descendants, eventually, is_running
from tests.hostile.network import Impairment, Node
from tests.hostile.networked_cluster import NetworkedCluster

LOST = Impairment(lost=True)
MINUTES = 240.0
"""By which a clock is off; S3 refuses what is signed by one that is off by a quarter of an hour."""

MOST_SECONDS = 4.0
"""For which a fault goes on at most, once a session works again in spite of it. That may take until a lease is over, so
some faults are over before that, and some aren't."""

type Fault = Callable[[NetworkedCluster, random.Random], AbstractContextManager[None]]


@contextmanager
def partitioned(cluster: NetworkedCluster, chance: random.Random) -> Iterator[None]:
    """Two nodes don't reach each other, or one of them not the other."""
    host = chance.choice(cluster.hosts).node
    others = [cluster.database_node, cluster.s3_node, *(each.node for each in cluster.hosts if each.node is not host)]
    ends: list[Node] = [host, chance.choice(others)]
    chance.shuffle(ends)
    with cluster.network.healed():
        cluster.network.impair(ends[0], ends[1], LOST, back=chance.choice((LOST, Impairment())))
        yield


@contextmanager
def delayed(cluster: NetworkedCluster, chance: random.Random) -> Iterator[None]:
    """Packets come late, in another order, and twice. A run asks PostgreSQL several things, one after the other."""
    nodes = [cluster.database_node, cluster.s3_node, *(host.node for host in cluster.hosts)]
    impairment = Impairment(seconds=chance.uniform(0.005, 0.05), doubled=0.3)
    with cluster.network.healed():
        for number, one in enumerate(nodes):
            for other in nodes[:number]:
                cluster.network.impair(one, other, impairment)
        yield


@contextmanager
def paused(cluster: NetworkedCluster, chance: random.Random) -> Iterator[None]:
    """A host doesn't go on until its lease is over. As soon as it does, it finds that out and ends; unless the others
    were late, too, so that none of them has declared it dead, nor taken what is its."""
    number = chance.randrange(len(cluster.hosts))
    host = cluster.hosts[number]
    assert eventually(lambda: cluster.is_ready(number))
    with cluster.client(number) as client:
        paused_id = client.get("/api/hosts").json()["this"]
    codes = host.watched.codes if host.watched is not None else None
    ends = len(codes or ())
    with host.paused() as pid:
        over = time.monotonic() + 1.5 * cluster.lease_seconds
        yield
        time.sleep(max(over - time.monotonic(), 0))
    others = [each for each in range(len(cluster.hosts)) if each != number]
    assert eventually(lambda: any(map(cluster.is_ready, others)))
    with cluster.client(next(filter(cluster.is_ready, others))) as client:
        [status] = [each["status"] for each in client.get("/api/hosts").json()["hosts"] if each["id"] == paused_id]
    if status != "dead":
        return
    assert eventually(lambda: not is_running(pid)), "a host that was declared dead goes on"
    if codes is not None:
        assert eventually(lambda: len(codes) > ends)
        assert codes[ends] == os.EX_TEMPFAIL, codes


@contextmanager
def paused_shortly(cluster: NetworkedCluster, chance: random.Random) -> Iterator[None]:
    """A host doesn't go on for a part of its lease."""
    with chance.choice(cluster.hosts).paused():
        time.sleep(chance.uniform(0.1, 0.7) * cluster.lease_seconds)
    yield


@contextmanager
def killed(cluster: NetworkedCluster, chance: random.Random) -> Iterator[None]:
    """`kill -9` of a host."""
    chance.choice(cluster.hosts).signal(signal.SIGKILL)
    yield


@contextmanager
def stopped(cluster: NetworkedCluster, chance: random.Random) -> Iterator[None]:
    chance.choice(cluster.hosts).signal(signal.SIGTERM)
    yield


@contextmanager
def child_processes_killed(cluster: NetworkedCluster, chance: random.Random) -> Iterator[None]:
    """`kill -9` of processes that a host has started: what sandboxes are made of, programs, helpers."""
    for _ in range(10):
        host = chance.choice(cluster.hosts)
        if below := descendants(host.pid):
            with suppress(ProcessLookupError):
                os.kill(chance.choice(below), signal.SIGKILL)
        time.sleep(0.05)
    yield


@contextmanager
def clock_off(cluster: NetworkedCluster, chance: random.Random) -> Iterator[None]:
    """A host's clock jumps by minutes, and back."""
    host = chance.choice(cluster.hosts)
    host.set_clock(chance.choice((-MINUTES, MINUTES)))
    try:
        yield
    finally:
        host.set_clock(0)


@contextmanager
def database_connections_cut(cluster: NetworkedCluster, chance: random.Random) -> Iterator[None]:
    """All connections to PostgreSQL are ended again and again, at any point of a commit."""
    ending = threading.Event()
    own = random.Random(chance.random())

    def cut_them() -> None:
        while not ending.wait(own.uniform(0, 0.2)):
            cluster.postgres.cut_off(cluster.database)

    thread = threading.Thread(target=cut_them)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


@contextmanager
def database_stopped(cluster: NetworkedCluster, chance: random.Random) -> Iterator[None]:
    """PostgreSQL ends, in good order or not, and is started again."""
    cluster.postgres.stop(chance.choice((signal.SIGINT, signal.SIGQUIT)))
    try:
        yield
    finally:
        cluster.postgres.start()


@contextmanager
def database_process_killed(cluster: NetworkedCluster, chance: random.Random) -> Iterator[None]:
    """`kill -9` of a process of PostgreSQL, whose others then end and begin anew."""
    with suppress(ProcessLookupError):
        os.kill(chance.choice(descendants(cluster.postgres.pid)), signal.SIGKILL)
    yield


@contextmanager
def _out_of_reach(cluster: NetworkedCluster, node: Node) -> Iterator[None]:
    with cluster.network.healed():
        for host in cluster.hosts:
            cluster.network.impair(host.node, node, LOST)
        yield


def database_unreachable(cluster: NetworkedCluster, chance: random.Random) -> AbstractContextManager[None]:
    """No host reaches PostgreSQL."""
    return _out_of_reach(cluster, cluster.database_node)


@contextmanager
def s3_unreachable(cluster: NetworkedCluster, chance: random.Random) -> Iterator[None]:
    """S3 is gone for a while."""
    with _out_of_reach(cluster, cluster.s3_node):
        time.sleep(cluster.outage_seconds)
        yield


@contextmanager
def s3_killed(cluster: NetworkedCluster, chance: random.Random) -> Iterator[None]:
    """`kill -9` of S3, which is started again."""
    cluster.s3.kill()
    try:
        yield
    finally:
        cluster.s3.start()


PARTIAL: tuple[Fault, ...] = (
    partitioned,
    delayed,
    paused,
    paused_shortly,
    killed,
    stopped,
    child_processes_killed,
    clock_off,
    database_connections_cut,
)
"""What leaves some host that works, and so each session, within seconds."""

TOTAL: tuple[Fault, ...] = (database_stopped, database_process_killed, database_unreachable, s3_unreachable, s3_killed)


@dataclass(frozen=True)
class Step:
    """A fault of a schedule."""

    fault: Fault
    seconds: float
    """For which it goes on, besides the time that its own work takes."""

    seed: float

    def on(self, cluster: NetworkedCluster) -> AbstractContextManager[None]:
        return self.fault(cluster, random.Random(self.seed))


def schedule(seed: int, faults: int) -> list[Step]:
    """So many faults at random; the same ones for the same seed."""
    chance = random.Random(seed)
    # Cables are cut most often: each pair of nodes, and each way, is a case of its own.
    several = (partitioned, partitioned, *PARTIAL)
    drawn = (chance.choice(TOTAL) if chance.random() < 0.2 else chance.choice(several) for _ in range(faults))
    return _steps(chance, drawn)


def _steps(chance: random.Random, faults: Iterable[Fault]) -> list[Step]:
    return [Step(fault, chance.uniform(0, MOST_SECONDS), chance.random()) for fault in faults]
