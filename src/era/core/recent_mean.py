"""The mean of a number over the last seconds, in which a moment counts the less the longer it is ago."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class RecentMean:
    """Such a mean, of a number that is 0 at first."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """What the number was so many seconds ago counts e times less than what it is now."""
        self._seconds = seconds
        self._clock = clock
        self._number = 0.0
        self._mean = 0.0
        self._at = clock()

    def set(self, number: float) -> None:
        """The number is this from now on."""
        self._mean = self.mean()
        self._number = number

    def shift(self, by: float) -> None:
        """Have the mean be more by this, as if the number had been so all along."""
        self._mean = self.mean() + by

    def mean(self) -> float:
        now = self._clock()
        self._mean = self._number + (self._mean - self._number) * math.exp((self._at - now) / self._seconds)
        self._at = now
        return self._mean
