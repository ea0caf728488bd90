"""Faults of a cluster (wired.py): what is cut, late, paused, killed, gone or wrong within a block, and right after it.

Each is drawn from a random generator of its own, so a schedule of them is the same whenever its seed is.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass

from tests.conftest import descendants, eventually
from tests.hostile.wired import WiredCluster
from tests.hostile.wires import Fate, Place

LOST = Fate(lost=True)
MINUTES = 240.0
"""By which a clock is off; S3 refuses what is signed by one that is off by a quarter of an hour."""

type Fault = Callable[[WiredCluster, random.Random], AbstractContextManager[None]]


@contextmanager
def cut(cluster: WiredCluster, chance: random.Random) -> Iterator[None]:
    """Two places don't reach each other, or one of them not the other."""
    host = chance.choice(cluster.hosts).place
    others = [cluster.rows, cluster.content, *(each.place for each in cluster.hosts if each.place is not host)]
    ends: list[Place] = [host, chance.choice(others)]
    chance.shuffle(ends)
    with cluster.wires.mended():
        cluster.wires.between(ends[0], ends[1], LOST, back=chance.choice((LOST, Fate())))
        yield


@contextmanager
def late(cluster: WiredCluster, chance: random.Random) -> Iterator[None]:
    """Packets come late, in another order, and twice. A run asks PostgreSQL several things, one after the other."""
    places = [cluster.rows, cluster.content, *(host.place for host in cluster.hosts)]
    fate = Fate(seconds=chance.uniform(0.005, 0.05), doubled=0.3)
    with cluster.wires.mended():
        for number, one in enumerate(places):
            for other in places[:number]:
                cluster.wires.between(one, other, fate)
        yield


@contextmanager
def paused(cluster: WiredCluster, chance: random.Random) -> Iterator[None]:
    """A host doesn't go on until its lease is over. As soon as it does, it finds that out and ends."""
    number = chance.randrange(len(cluster.hosts))
    host = cluster.hosts[number]
    assert eventually(lambda: cluster.is_ready(number))
    ends = len(host.codes)
    with host.paused():
        over = time.monotonic() + 1.5 * cluster.lease_seconds
        yield
        time.sleep(max(over - time.monotonic(), 0))
    assert eventually(lambda: len(host.codes) > ends), "a host whose lease was over goes on"
    assert host.codes[ends] == os.EX_TEMPFAIL, host.codes


@contextmanager
def paused_shortly(cluster: WiredCluster, chance: random.Random) -> Iterator[None]:
    """A host doesn't go on for a part of its lease."""
    with chance.choice(cluster.hosts).paused():
        time.sleep(chance.uniform(0.1, 0.7) * cluster.lease_seconds)
    yield


@contextmanager
def killed(cluster: WiredCluster, chance: random.Random) -> Iterator[None]:
    """`kill -9` of a host."""
    chance.choice(cluster.hosts).signal(signal.SIGKILL)
    yield


@contextmanager
def stopped(cluster: WiredCluster, chance: random.Random) -> Iterator[None]:
    chance.choice(cluster.hosts).signal(signal.SIGTERM)
    yield


@contextmanager
def parts_killed(cluster: WiredCluster, chance: random.Random) -> Iterator[None]:
    """`kill -9` of processes that a host has started: what sandboxes are made of, programs, helpers."""
    for _ in range(10):
        host = chance.choice(cluster.hosts)
        if below := descendants(host.pid):
            with suppress(ProcessLookupError):
                os.kill(chance.choice(below), signal.SIGKILL)
        time.sleep(0.05)
    yield


@contextmanager
def clock_off(cluster: WiredCluster, chance: random.Random) -> Iterator[None]:
    """A host's clock jumps by minutes, and back."""
    host = chance.choice(cluster.hosts)
    host.set_clock(chance.choice((-MINUTES, MINUTES)))
    try:
        yield
    finally:
        host.set_clock(0)


@contextmanager
def rows_cut_off(cluster: WiredCluster, chance: random.Random) -> Iterator[None]:
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
def no_rows(cluster: WiredCluster, chance: random.Random) -> Iterator[None]:
    """PostgreSQL ends, in good order or not, and is started again."""
    cluster.postgres.stop(chance.choice((signal.SIGINT, signal.SIGQUIT)))
    try:
        yield
    finally:
        cluster.postgres.start()


@contextmanager
def rows_killed(cluster: WiredCluster, chance: random.Random) -> Iterator[None]:
    """`kill -9` of a process of PostgreSQL, whose others then end and begin anew."""
    with suppress(ProcessLookupError):
        os.kill(chance.choice(descendants(cluster.postgres.pid)), signal.SIGKILL)
    yield


@contextmanager
def _out_of_reach(cluster: WiredCluster, place: Place) -> Iterator[None]:
    with cluster.wires.mended():
        for host in cluster.hosts:
            cluster.wires.between(host.place, place, LOST)
        yield


def rows_out_of_reach(cluster: WiredCluster, chance: random.Random) -> AbstractContextManager[None]:
    """No host reaches PostgreSQL."""
    return _out_of_reach(cluster, cluster.rows)


@contextmanager
def content_out_of_reach(cluster: WiredCluster, chance: random.Random) -> Iterator[None]:
    """S3 is gone for a while."""
    with _out_of_reach(cluster, cluster.content):
        time.sleep(cluster.outage_seconds)
        yield


@contextmanager
def content_killed(cluster: WiredCluster, chance: random.Random) -> Iterator[None]:
    """`kill -9` of S3, which is started again."""
    cluster.s3.kill()
    try:
        yield
    finally:
        cluster.s3.start()


SOME: tuple[Fault, ...] = (cut, late, paused, paused_shortly, killed, stopped, parts_killed, clock_off, rows_cut_off)
"""What leaves some host that works, and so each session, within seconds."""

ALL: tuple[Fault, ...] = (no_rows, rows_killed, rows_out_of_reach, content_out_of_reach, content_killed)


@dataclass(frozen=True)
class Step:
    """A fault of a schedule."""

    fault: Fault
    seconds: float
    """For which it goes on, besides the time that its own work takes."""

    seed: float

    def on(self, cluster: WiredCluster) -> AbstractContextManager[None]:
        return self.fault(cluster, random.Random(self.seed))


def schedule(seed: int, faults: int) -> list[Step]:
    """So many faults at random; the same ones for the same seed."""
    chance = random.Random(seed)
    # Cables are cut most often: each pair of places, and each way, is a case of its own.
    drawn = (chance.choice(ALL) if chance.random() < 0.2 else chance.choice((cut, cut, *SOME)) for _ in range(faults))
    return [Step(fault, chance.uniform(0, 8), chance.random()) for fault in drawn]
