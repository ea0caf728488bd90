"""What owners have at most, so that a quota isn't checked by counting all that an owner has at each write.

Theory of operation. A quota of sessions or of their files counts what is in rows, which takes the longer the more an
owner has: 0.6 s for 300,000 sessions, while all other writes wait. So the process keeps what it has counted, and adds
to it what each transaction adds. What makes less of it isn't taken off. Thus what is kept is never less than what there
is: what it leaves room for is within the quota, and whatever it doesn't is counted before it is refused.

That holds where all that adds passes here. It doesn't in a cluster, in which nothing is kept. Nor is anything added
while an owner has no quota: so what is kept of an owner is forgotten when the owner's quotas are changed, and after a
while in any case.
"""

from __future__ import annotations

import time

_KEPT_SECONDS = 60.0


class OwnedTotals:
    """What was counted, for one thread: the one that writes."""

    def __init__(self, *, alone: bool) -> None:
        """Whether no other process writes to the database."""
        self._alone = alone
        self._counted: dict[tuple[str, str], tuple[float, int]] = {}
        """Until when it counts, and how much there is at most, by owner and the quota's name."""

    def add(self, owner: str, name: str, growth: int, most: int) -> bool:
        """Add to what an owner has of something, if it is known that this comes to no more than `most`; whether it is.
        To be called before the commit: one that fails makes it only too much."""
        until, total = self._counted.get((owner, name), (0.0, 0))
        if time.monotonic() >= until or total + growth > most:
            return False
        self._counted[owner, name] = until, total + growth
        return True

    def count(self, owner: str, name: str, total: int) -> None:
        """So much was counted, with what this transaction adds."""
        if self._alone:
            self._counted[owner, name] = time.monotonic() + _KEPT_SECONDS, total

    def forget(self, owner: str) -> None:
        for key in [key for key in self._counted if key[0] == owner]:
            del self._counted[key]
