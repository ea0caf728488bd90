"""How many hosts a cluster is to have, and which one goes: by how many of their places for sandboxes are taken.

Theory of operation. `decide` is told once a second what is known of the hosts, and says how many there should be and
which are to leave. Hosts come at once, where three quarters of all places are taken: that is what hosts take from each
other (core/moves.py), so beyond it a full host may find nobody. So many are asked for that five eighths of them will be
taken. One goes where the others would be half full at most, and that for a while: so none comes and goes in turn. It is
one at a time, the one with the fewest sandboxes, and it drains first.

What can't be seen, as a host that is starting or fails, counts as a host that is there: no more are asked for because
of it, and none goes while any is unknown.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from era.cluster.ray_hosts import NodeHost

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
