"""The driver: sees to it that each node of a Ray cluster has a host, as nodes come and go, and tells of them.

It may end at any time, by any means: hosts and their actors go on, and the next driver finds them. Where it is told how
many hosts there may be, it also has Ray's autoscaler make nodes, and take those whose hosts have drained.

How many hosts there are to be: `Scaling.decide` is told once a second what is known of the hosts, and says how many
there should be and which are to leave. Hosts come at once, where three quarters of all places are taken: that is what
hosts take from each other (core/cluster/moves.py), so beyond it a full host may find nobody. So many are asked for that
five eighths of them will be taken. One goes where the others would be half full at most, and that for a while: so none
comes and goes in turn. It is one at a time, the one with the fewest sandboxes, and it drains first.

What can't be seen, as a host that is starting or fails, counts as a host that is there: no more are asked for because
of it, and none goes while any is unknown.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from era.cluster.ray_hosts import NodeHost, RayHosts, connect
from era.errors import Unavailable
from era.store.place import check_database

_FULL = Fraction(3, 4)
_AIM = Fraction(5, 8)
_QUIET = Fraction(1, 2)


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many hosts there may be."""

    least: int
    most: int
    idle_seconds: float
    """For which one host fewer would have done before one goes."""


class Scaling:
    """What is remembered between two looks at the hosts."""

    def __init__(self, bounds: Bounds, clock: Callable[[], float] = time.monotonic) -> None:
        self._bounds = bounds
        self._clock = clock
        self._quiet_since: float | None = None
        self.leaving: set[str] = set()
        """Nodes whose hosts are to drain, so that Ray can take the nodes."""

    def decide(self, seen: Sequence[NodeHost]) -> int:
        """How many hosts there are to be beside those that leave; `leaving` says which these are. `seen` are the hosts
        of all nodes, but for those that Ray is taking away."""
        self.leaving &= {each.node.id for each in seen}
        staying = [each for each in seen if each.node.id not in self.leaving]
        count = len(staying)
        loads = [each.host for each in staying if each.host is not None and each.host.places]
        places, taken = sum(load.places for load in loads), sum(load.taken for load in loads)
        wanted = max(count, self._bounds.least)
        if taken > _FULL * places:
            wanted = max(wanted, math.ceil(taken * len(loads) / (_AIM * places)))
        wanted = min(wanted, max(count, self._bounds.most))
        if wanted > count:
            self._quiet_since = None
            for back in sorted(self.leaving)[: wanted - count]:
                self.leaving.remove(back)
            return wanted
        is_quiet = len(loads) == count and taken <= _QUIET * places * (count - 1) / max(count, 1)
        if count > self._bounds.most or (is_quiet and count > self._bounds.least):
            return count - self._send_one_away(staying)
        self._quiet_since = None
        return count

    def _send_one_away(self, staying: Sequence[NodeHost]) -> int:
        """Have a host leave, if there has been time for another one long enough; how many that are, one or none."""
        now = self._clock()
        if self.leaving or self._quiet_since is None:
            self._quiet_since = now
        may_go = [each for each in staying if each.node.scales]
        if self.leaving or not may_go or now < self._quiet_since + self._bounds.idle_seconds:
            return 0
        self.leaving.add(min(may_go, key=lambda each: each.host.taken if each.host else 0).node.id)
        self._quiet_since = None
        return 1


_LOOK_SECONDS = 1.0
_ANSWER_SECONDS = 30.0
"""For actors that don't answer when they are to stop their hosts."""


def reach(address: str, labels: Mapping[str, str], database_url: str | None) -> RayHosts:
    """Connect to the Ray cluster at this address, for the nodes with these labels. Raises NotReady where it can't be
    used, or the database of the hosts can't; None is one that only the nodes know."""
    if database_url is not None:
        check_database(database_url)
    return connect(address, labels)


def drive(
    hosts: RayHosts,
    cluster: Mapping[str, str],
    say: Callable[[str], None],
    *,
    keep_hosts: bool,
    bounds: Bounds | None = None,
) -> int:
    """Keep a host on each node, with these settings, until SIGINT or SIGTERM; then stop them all, unless they are to be
    kept. With `bounds`, have as many nodes as there is load for. Returns the exit code; `say` gets the lines for the
    person who started it."""
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())  # in the place of Ray's own
    told = _Told(say)
    scaling = None if bounds is None else Scaling(bounds)
    while not stopping.is_set():
        try:
            told.tell(_ensure(hosts, cluster, scaling, told))
        except Unavailable as error:
            told.trouble(error.message)
        stopping.wait(_LOOK_SECONDS)
    if keep_hosts:
        say("The hosts go on; `era host stop` stops them.")
        return 0
    try:
        if bounds is not None:
            hosts.request(0)
        left = hosts.stop_all(_ANSWER_SECONDS)
    except Unavailable as error:
        say(f"{error.message}: the hosts go on.")
        return 1
    for each in left:
        say(f"{each.node.address}   hasn't stopped: {each.problem or each.host}")
    return 1 if left else 0


def _ensure(hosts: RayHosts, cluster: Mapping[str, str], scaling: Scaling | None, told: _Told) -> list[NodeHost]:
    """Have each node that stays have a host, and so many nodes as `scaling` says; what is known of the hosts."""
    going = hosts.leaving()
    if scaling is None:
        return hosts.ensure(cluster, going)
    seen = hosts.ensure(cluster, going | scaling.leaving)
    others = [each for each in seen if each.node.id not in going]
    wanted = scaling.decide(others)
    missing = max(wanted - (len(others) - len(scaling.leaving)), 0)
    told.scales([each.node.address for each in others if each.node.id in scaling.leaving], missing)
    hosts.request(sum(each.node.scales for each in others) + missing if missing else 0)
    return seen


class _Told:
    """What was said, so that only news is said."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._lines: dict[str, str] = {}
        self._trouble = ""
        self._scales: tuple[list[str], int] = ([], 0)
        self._serves = False

    def tell(self, seen: list[NodeHost]) -> None:
        """Say what is new of the hosts; once all are ready for the first time, where the cluster serves."""
        self.trouble("")
        for gone in self._lines.keys() - {each.node.id for each in seen}:
            self._say(f"{self._lines.pop(gone).split()[0]}   its node is gone")
        for each in seen:
            line = _line(each)
            if line != self._lines.get(each.node.id):
                self._lines[each.node.id] = line
                self._say(line)
        ready = [each.host.url for each in seen if each.host is not None and each.host.state == "ready"]
        if not self._serves and seen and len(ready) == len(seen):
            self._serves = True
            self._say(f"ERA serves   {ready[0]}   and {len(ready) - 1} more hosts; any takes any call")

    def scales(self, leaving: list[str], missing: int) -> None:
        """Say which hosts aren't needed, by address, and how many more are."""
        if (leaving, missing) != self._scales:
            for address in leaving:
                self._say(f"{address}   isn't needed: its host drains, then Ray may take its node")
            if missing:
                self._say(f"Ray is asked for more nodes: {missing}")
        self._scales = leaving, missing

    def trouble(self, message: str) -> None:
        """Say that Ray fails, or no longer does."""
        if message and not self._trouble:
            self._say(f"{message}. The hosts go on.")
        elif self._trouble and not message:
            self._say("Ray is there again.")
        self._trouble = message


def _line(each: NodeHost) -> str:
    if each.host is None:
        return f"{each.node.address}   {each.problem}"
    words = [each.node.address, each.host.state, each.host.url, each.host.detail]
    return "   ".join(word for word in words if word)
