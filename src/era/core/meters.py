"""Meters: what an owner or an API key uses now, and whether that leaves room for more within a quota (quotas.py)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from era.core.models import now
from era.core.usage import DAY_MICROS, day_of

MINUTE_US = 60_000_000
_EXACT = 200
"""Entries of a window beyond which runs that begin within a second are one entry."""

_SECOND_US = 1_000_000
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no room within a quota."""

    used: float
    """How much is used already, in the quota's unit."""

    seconds: float | None = None
    """How long until there is room again; None where time alone changes nothing."""

    filled_by: Sequence[str] = ()
    """The ids of sessions that fill it."""


class Window:
    """When the runs of the last minute began. No minute has more of them than may be. Where they are many, those of a
    second are kept as one entry, which leaves the minute with its last: so a window is small however many they are."""

    def __init__(self, entries: Iterable[Sequence[int]] = ()) -> None:
        self._entries = deque(list(entry) for entry in entries)
        """When the first and the last of an entry began, in microseconds, and how many they are."""

    def __len__(self) -> int:
        return sum(count for _, _, count in self._entries)

    @property
    def entries(self) -> Sequence[Sequence[int]]:
        """What makes the same window again."""
        return list(self._entries)

    def forget_old(self, at: int) -> None:
        """Leave out what began a minute ago."""
        while self._entries and self._entries[0][1] <= at - MINUTE_US:
            self._entries.popleft()

    def add(self, at: int) -> None:
        if len(self._entries) >= _EXACT and at - self._entries[-1][0] < _SECOND_US:
            self._entries[-1][1] = at
            self._entries[-1][2] += 1
        else:
            self._entries.append([at, at, 1])

    def wait(self, most: int, at: int) -> int | None:
        """Microseconds until another run may begin; None where it may now."""
        self.forget_old(at)
        too_many = len(self) - most + 1
        if too_many <= 0:
            return None
        for _, last, count in self._entries:
            too_many -= count
            if too_many <= 0:
                return last + MINUTE_US - at
        return MINUTE_US  # not even one may begin


@dataclass(slots=True)
class Meter:
    """What an owner or a key uses now."""

    runs: Window = field(default_factory=Window)
    sandboxes: dict[str, int] = field(default_factory=dict)
    """The bytes of memory that a sandbox in use may take, by its session's id."""

    day: int = 0
    cpu_us: int = 0
    egress_bytes: int = 0
    """Of that day."""

    @property
    def memory(self) -> int:
        """Bytes that all sandboxes in use may take."""
        return sum(self.sandboxes.values())

    def turn_to(self, day: int) -> None:
        if day != self.day:
            self.day, self.cpu_us, self.egress_bytes = day, 0, 0

    def refusal(self, quota: str, most: int, session: str, memory: int, at: int) -> Refusal | None:
        """Why there is no room, within this quota, for another run in the sandbox of this session, which may take
        `memory` bytes; None where there is. `at` is the time by the clock of `runs`."""
        if quota == "runs_per_minute":
            wait = self.runs.wait(most, at)
            return None if wait is None else Refusal(len(self.runs), wait / 1e6)
        if quota in ("cpu_seconds_per_day", "egress_mb_per_day"):
            self.turn_to(day_of(now()))
            used = self.cpu_us / 1e6 if quota == "cpu_seconds_per_day" else self.egress_bytes / _MIB
            return Refusal(round(used, 3), _left_of_day() / 1e6) if used >= most else None
        if session in self.sandboxes:
            return None
        if quota == "sandboxes":
            taken = len(self.sandboxes)
            return Refusal(taken, filled_by=list(self.sandboxes)) if taken >= most else None
        if self.memory + memory > most * _MIB:
            return Refusal(self.memory // _MIB, filled_by=list(self.sandboxes))
        return None


def _left_of_day() -> int:
    """Microseconds until the next day begins, in UTC."""
    return (day_of(now()) + 1) * DAY_MICROS - now()
