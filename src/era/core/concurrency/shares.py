"""Fair shares of what the service has a bounded number of, such as descriptors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable


class Shares[Holder: Hashable]:
    """A number of things that holders take and give back, each of them at most as many as are left.

    So one holder alone gets half of them, two get a third each, and however greedy they are, something is left for the
    next one. No share lies idle for holders who don't come, and nothing has to be taken away from anybody. (Memory of
    network switches is shared like this: Choudhury and Hahne, "Dynamic queue length thresholds", 1998.)
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0
        """By all holders."""

        self._held: Counter[Holder] = Counter()

    def left(self, holder: Holder) -> int:
        """How many more this holder may take."""
        return max(self.most - self.taken - self._held[holder], 0) // 2  # what it takes is also left no more

    def held(self, holder: Holder) -> int:
        """How many this holder has."""
        return self._held[holder]

    def take(self, holder: Holder, count: int = 1) -> bool:
        """Take so many, or none of them and return False."""
        if count > self.left(holder):
            return False
        self.taken += count
        self._held[holder] += count
        return True

    def hand_over(self, holder: Holder, to: Holder) -> None:
        """Give one of a holder's to another, whatever that one has."""
        self._held[to] += 1
        self.taken += 1
        self.give_back(holder)

    def give_back(self, holder: Holder, count: int = 1) -> None:
        self.taken -= count
        self._held[holder] -= count
        if not self._held[holder]:
            del self._held[holder]
