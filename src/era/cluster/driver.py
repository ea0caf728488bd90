"""The driver: sees to it that each node of a Ray cluster has a host, as nodes come and go, and tells of them.

It may end at any time, by any means: hosts and their actors go on, and the next driver finds them. Where it is told how
many hosts there may be, it also has Ray's autoscaler make nodes, and take those whose hosts have drained (scaling.py).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping

from era.cluster.ray_hosts import NodeHost, RayHosts, connect
from era.cluster.scaling import Bounds, Scaling
from era.errors import Unavailable
from era.store.place import check_database

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
