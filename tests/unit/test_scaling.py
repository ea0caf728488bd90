"""How many hosts a cluster is to have: decided from what is known of them, by a clock that stands still. With Ray that
is tried in tests/hostile/test_ray.py."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from era.cluster import driver
from era.cluster.driver import Bounds, Scaling
from era.cluster.host_process import HostStatus
from era.cluster.ray_hosts import Node, NodeHost


@dataclass
class Cluster:
    """Hosts with eight places each, of which as many are taken as a test says."""

    taken: list[int]
    least: int = 1
    most: int = 9
    now: float = 0.0
    fixed: set[str] = field(default_factory=set)
    """Nodes that Ray can't take."""

    def __post_init__(self) -> None:
        self.scaling = Scaling(Bounds(self.least, self.most, 60), lambda: self.now)

    def seen(self) -> Sequence[NodeHost]:
        return [
            NodeHost(
                Node(name, "::1", {}, name not in self.fixed),
                None if taken < 0 else HostStatus("ready", places=8, taken=taken),
            )
            for name, taken in zip("abcdefgh", self.taken, strict=False)
        ]

    def decide(self) -> int:
        return self.scaling.decide(self.seen())

    def after(self, seconds: float) -> set[str]:
        """Which nodes leave after it has been so for this long."""
        self.decide()
        self.now += seconds
        self.decide()
        return self.scaling.leaving


def test_hosts_come_beyond_three_quarters() -> None:
    assert Cluster([6]).decide() == 1
    assert Cluster([7]).decide() == 2
    assert Cluster([8, 8]).decide() == 4
    assert Cluster([20]).decide() == 4, "those who wait count"
    assert Cluster([8, 8], most=3).decide() == 3
    assert Cluster([0], least=2).decide() == 2
    assert Cluster([], least=2).decide() == 2


def test_what_is_coming_is_not_asked_for_again() -> None:
    """A host that is starting says nothing of its load."""
    assert Cluster([7, -1]).decide() == 2
    assert Cluster([16, -1]).decide() == 4


def test_one_that_is_not_needed_leaves_after_a_while() -> None:
    quiet = Cluster([3, 2, 1])
    assert quiet.decide() == 3
    assert quiet.after(59) == set()
    assert quiet.after(1) == {"c"}
    assert quiet.decide() == 2
    assert quiet.after(100) == {"c"}, "one at a time"
    quiet.taken = [3, 3]
    assert quiet.after(100) == set(), "the one that stayed would be more than half full"
    quiet.taken = [2, 2]
    assert quiet.after(60) == {"a"}


def test_a_burst_in_between_begins_the_time_anew() -> None:
    quiet = Cluster([0, 0])
    assert quiet.after(59) == set()
    quiet.taken = [4, 4]
    assert quiet.after(30) == set()
    quiet.taken = [0, 0]
    assert quiet.after(59) == set()
    assert quiet.after(1) != set()


def test_what_stays() -> None:
    assert Cluster([0, 0], least=2).after(100) == set()
    assert Cluster([0]).after(100) == set()
    assert Cluster([0, -1]).after(100) == set(), "of one nothing is known"
    assert Cluster([1, 0], fixed={"b"}).after(100) == {"a"}
    assert Cluster([0, 0], fixed={"a", "b"}).after(100) == set()


def test_more_than_there_may_be_leave_whatever_the_load() -> None:
    crowded = Cluster([8, 8], most=1)
    assert crowded.decide() == 2
    assert len(crowded.after(60)) == 1


def test_one_that_leaves_is_taken_back_before_another_is_made() -> None:
    back = Cluster([1, 0])
    assert back.after(60) == {"b"}
    back.taken = [8, 0]
    assert back.decide() == 2
    assert back.scaling.leaving == set()


@dataclass
class Hosts:
    """The hosts of such a cluster, as the driver sees them, and what it says of them to Ray."""

    cluster: Cluster
    draining: set[str] = field(default_factory=set)
    requested: list[int] = field(default_factory=list)
    sent_away: Container[str] = ()

    def leaving(self) -> set[str]:
        return self.draining

    def ensure(self, settings: Mapping[str, str], leaving: Container[str] = ()) -> Sequence[NodeHost]:
        self.sent_away = leaving
        return self.cluster.seen()

    def request(self, count: int) -> None:
        self.requested.append(count)

    def look(self, *, scales: bool = True) -> None:
        told = driver._Told(said.append)
        driver._ensure(cast(Any, self), {}, self.cluster.scaling if scales else None, told)


said: list[str] = []


def test_nodes_are_requested_only_while_some_are_missing() -> None:
    hosts = Hosts(Cluster([8]))
    hosts.look()
    hosts.cluster.taken = [8, 0]
    hosts.look()
    assert hosts.requested == [2, 0]


def test_nodes_that_cannot_come_or_go_are_not_among_those_requested() -> None:
    hosts = Hosts(Cluster([8, 8], fixed={"a"}))
    hosts.look()
    assert hosts.requested == [3], "b, and two more"


def test_a_node_that_ray_drains_is_drained_and_replaced() -> None:
    hosts = Hosts(Cluster([0, 0], least=2), draining={"b"})
    hosts.look()
    assert "b" in hosts.sent_away
    assert hosts.requested == [2]
    hosts.look(scales=False)
    assert "b" in hosts.sent_away
    assert hosts.requested == [2], "nobody asked for that"


def test_the_host_that_is_not_needed_is_sent_away() -> None:
    hosts = Hosts(Cluster([1, 0]))
    hosts.look()
    hosts.cluster.now += 60
    hosts.look()
    hosts.look()
    assert hosts.sent_away == {"b"}
    assert hosts.requested == [0, 0, 0]
