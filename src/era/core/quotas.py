"""Quotas: how much an owner may use, and a single API key, and how much of that is in use now.

Theory of operation
===================

There are two kinds. *Rates* bound what is used up in a time: runs a minute, processor time and network traffic a day.
Who has reached one is told when to come back (429). The others bound what there is at a time: who has reached one is
told what fills it (409), since time alone changes nothing.

A call counts for its owner and, where it came with a key that has quotas of its own, for that key as well: so it can
reach either. What comes without a key (public URLs, inboxes, processes that go on) counts for its session's owner.

Each quota is counted where it can't be passed by many calls at once. Runs and sandboxes are counted here, in memory and
without waiting between look and count; one process has the data directory, so nobody else counts. (Each host of a
cluster counts its own: there an owner may have as much on each.) What is in rows,
sessions and their files, is counted by the transaction that adds to it (store/quotas.py). Storage has its own count
(storage.py). What a day has used is read from the rows of usage at the start (usage.py) and added to after each run:
a run that has begun isn't ended by it, but no other begins.

A sandbox counts while a program runs in it or its session is live. One that is only kept warm makes way for others
anyway, and counts for nobody.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

from era.core.models import JsonObject, OwnedId, now
from era.core.usage import DAY_MICROS, Use, day_of
from era.errors import EraError, QuotaReached, RateReached

type Kind = Literal["owner", "key"]
type Amounts = Mapping[str, int]
"""Numbers by the name of a quota. 0 stands for no bound."""

_MINUTE = 60.0
_MIB = 1 << 20
_NAMED = 100
"""Sessions that an error names at most."""

WORDS: Mapping[str, str] = {
    "sessions": "sessions",
    "sandboxes": "sandboxes in use at a time",
    "memory_mb": "MiB of memory in use at a time",
    "disk_mb": "MiB of files",
    "storage_mb": "MiB of storage",
    "runs_per_minute": "runs a minute",
    "cpu_seconds_per_day": "seconds of processor time a day",
    "egress_mb_per_day": "MiB of network traffic a day",
}
"""What each quota bounds, by its name."""

OF_KEYS = tuple(name for name in WORDS if name != "storage_mb")
"""Those that a key can have. Storage belongs to owners: no item of it is any key's."""


@dataclass(frozen=True, slots=True)
class Bound:
    """A quota in force for somebody."""

    kind: Kind
    subject: str
    """The owner's name, or the key's id."""

    name: str
    most: int
    report: Callable[[EraError], None] = field(compare=False, repr=False)
    """Called with each error that this bound is the reason of."""

    def reached(self, used: int | float, filled_by: Sequence[str] = ()) -> QuotaReached:
        """The error for a call that would need more; it is reported. `used` is what is used already, in the quota's
        unit."""
        error = QuotaReached(
            f"{self._said}, and {used:g} are taken.",
            details={**self._details(used), "filled_by": list(filled_by[:_NAMED])},
        )
        self.report(error)
        return error

    def exceeded(self, used: int | float, seconds: float) -> RateReached:
        """The error for a call that comes too early by so many seconds; it is reported."""
        error = RateReached(f"{self._said}, and has had {used:g}.", details=self._details(used))
        error.retry_after = max(1, math.ceil(seconds))
        self.report(error)
        return error

    @property
    def _said(self) -> str:
        whose = "This owner" if self.kind == "owner" else "This API key"
        return f"{whose} may have {self.most} {WORDS[self.name]}"

    def _details(self, used: float) -> JsonObject:
        return {"quota": self.name, "of": self.kind, "limit": self.most, "used": used}


class OwnerStore(Protocol):
    """Rows of owners' quotas. Every call is one transaction, durable when it returns."""

    async def owners(self) -> Mapping[str, Amounts]:
        """What was set for each owner."""
        ...

    async def set_owner(self, owner: str, quotas: Amounts) -> None: ...

    async def used_on(self, day: int) -> Sequence[tuple[str, str, int, int]]:
        """Owner, key, microseconds of processor time and bytes of traffic of each row of a day's usage."""
        ...


@dataclass(slots=True)
class _Meter:
    """What an owner or a key uses now."""

    begun: deque[float] = field(default_factory=deque)
    """When the runs of the last minute began, by the monotonic clock."""

    sandboxes: dict[OwnedId, tuple[int, int]] = field(default_factory=dict)
    """By session: how many hold its sandbox, and the bytes of memory that it may take."""

    memory: int = 0
    day: int = 0
    cpu_us: int = 0
    egress_bytes: int = 0
    """Of that day."""

    def turn_to(self, day: int) -> None:
        if day != self.day:
            self.day, self.cpu_us, self.egress_bytes = day, 0, 0


class Quotas:
    """The quotas of all owners and keys, and what counts for those that are counted here. `open` before anything."""

    def __init__(self, store: OwnerStore, defaults: Amounts, of_key: Callable[[str], Amounts]) -> None:
        """`defaults` are those of owners for whom nothing else was set. `of_key` gives a key's own, by its id."""
        self._store = store
        self._defaults = defaults
        self._of_key = of_key
        self._owners: dict[str, Amounts] = {}
        self._reading = asyncio.Lock()
        """Held while rows are read or written: what was read before somebody changed it may not come after that."""

        self._meters: dict[tuple[Kind, str], _Meter] = {}
        self.on_reached: list[Callable[[str, EraError], None]] = []
        """Called with the owner and the error when something of the owner's has reached a quota."""

    async def open(self) -> None:
        """Read what was set, and what today has used. Hosts of a cluster do so again and again."""
        async with self._reading:
            self._owners = dict(await self._store.owners())
        today = day_of(now())
        rows = await self._store.used_on(today)
        for meter in self._meters.values():
            meter.day = 0  # what was counted is in the rows
        for owner, key_id, cpu_us, egress_bytes in rows:
            self.used(Use(owner, key_id, today, 0, cpu_us, egress_bytes))

    # -- what is in force --------------------------------------------------------------------------------------------

    def owners(self) -> Sequence[str]:
        """Owners for whom something was set."""
        return sorted(self._owners)

    def own(self, owner: str) -> Amounts:
        """What was set for an owner, without the defaults."""
        return self._owners.get(owner, {})

    def of_owner(self, owner: str) -> Amounts:
        """The quotas in force for an owner: those that were set, else the defaults."""
        return {**self._defaults, **self._owners.get(owner, {})}

    async def set(self, owner: str, change: Mapping[str, int | None]) -> None:
        """Set quotas of an owner's; None takes one back, and the default holds again."""
        async with self._reading:
            quotas = {name: value for name, value in {**self.own(owner), **change}.items() if value is not None}
            await self._store.set_owner(owner, quotas)
            self._owners[owner] = quotas

    def bounds(self, who: OwnedId, *names: str) -> list[Bound]:
        """The bounds of these names that are in force for a call, the owner's first."""
        report = partial(self._report, who.owner)
        own, defaults = self._owners.get(who.owner, {}), self._defaults
        found = [
            Bound("owner", who.owner, name, most, report)
            for name in names
            if (most := own.get(name, defaults.get(name, 0)))
        ]
        if who.key_id and (of_key := self._of_key(who.key_id)):
            found += [Bound("key", who.key_id, name, most, report) for name in names if (most := of_key.get(name, 0))]
        return found

    def bounds_memory(self, who: OwnedId) -> bool:
        """Whether `hold` needs to know how much memory a sandbox may take."""
        return bool(self.bounds(who, "memory_mb"))

    def in_use(self, owner: str) -> dict[str, float]:
        """How much an owner uses of what is counted here, by the name of the quota."""
        meter = self._meter("owner", owner)
        meter.turn_to(day_of(now()))
        _forget_old(meter.begun)
        return {
            "sandboxes": len(meter.sandboxes),
            "memory_mb": meter.memory // _MIB,
            "runs_per_minute": len(meter.begun),
            "cpu_seconds_per_day": round(meter.cpu_us / 1e6, 3),
            "egress_mb_per_day": round(meter.egress_bytes / _MIB, 3),
        }

    def _report(self, owner: str, error: EraError) -> None:
        for listener in self.on_reached:
            listener(owner, error)

    # -- what is counted here ----------------------------------------------------------------------------------------

    def begin_run(self, who: OwnedId) -> None:
        """Count a run. Raises RateReached where it is one too many, or its day is used up; then nothing is counted."""
        bounds = self.bounds(who, "cpu_seconds_per_day", "egress_mb_per_day", "runs_per_minute")
        meters = []
        for bound in bounds:
            meter = self._meter(bound.kind, bound.subject)
            meter.turn_to(day_of(now()))
            if bound.name == "cpu_seconds_per_day":
                _check_day(bound, meter.cpu_us / 1e6)
            elif bound.name == "egress_mb_per_day":
                _check_day(bound, meter.egress_bytes / _MIB)
            else:
                _forget_old(meter.begun)
                if (over := len(meter.begun) - bound.most) >= 0:
                    seconds = meter.begun[over] + _MINUTE - time.monotonic()
                    raise bound.exceeded(len(meter.begun), seconds)
                meters.append(meter)
        for meter in meters:
            meter.begun.append(time.monotonic())

    def hold(self, who: OwnedId, memory: int) -> Callable[[], None]:
        """Count the sandbox of the session `who`, which may take `memory` bytes, until the function that this returns
        is called, once. All who hold the same session's count as one. Raises QuotaReached."""
        for bound in self.bounds(who, "sandboxes", "memory_mb"):
            meter = self._meter(bound.kind, bound.subject)
            if who in meter.sandboxes:
                continue
            names = [session.id for session in meter.sandboxes]
            if bound.name == "sandboxes" and len(meter.sandboxes) >= bound.most:
                raise bound.reached(len(meter.sandboxes), names)
            if bound.name == "memory_mb" and meter.memory + memory > bound.most * _MIB:
                raise bound.reached(meter.memory // _MIB, names)
        meters = [self._meter("owner", who.owner)]
        if who.key_id and self._of_key(who.key_id):
            meters.append(self._meter("key", who.key_id))
        for meter in meters:
            holders, held = meter.sandboxes.get(who, (0, memory))
            meter.sandboxes[who] = (holders + 1, held)
            meter.memory += 0 if holders else memory

        def release() -> None:
            for meter in meters:
                holders, held = meter.sandboxes.pop(who)
                if holders > 1:
                    meter.sandboxes[who] = (holders - 1, held)
                else:
                    meter.memory -= held

        return release

    @contextmanager
    def held(self, who: OwnedId, memory: int) -> Iterator[None]:
        """`hold` for a block."""
        release = self.hold(who, memory)
        try:
            yield
        finally:
            release()

    def used(self, use: Use) -> None:
        """Count what a run has used of its day."""
        subjects: list[tuple[Kind, str]] = [("owner", use.owner)]
        if use.key_id:
            subjects.append(("key", use.key_id))
        for kind, name in subjects:
            meter = self._meter(kind, name)
            meter.turn_to(use.day)
            meter.cpu_us += use.cpu_us
            meter.egress_bytes += use.egress_bytes

    def _meter(self, kind: Kind, name: str) -> _Meter:
        meter = self._meters.get((kind, name))
        if meter is None:
            meter = self._meters[kind, name] = _Meter()
        return meter


def _check_day(bound: Bound, used: float) -> None:
    """Raises RateReached until the next day begins, in UTC, where this one is used up."""
    if used >= bound.most:
        raise bound.exceeded(round(used, 3), ((day_of(now()) + 1) * DAY_MICROS - now()) / 1e6)


def _forget_old(begun: deque[float]) -> None:
    oldest = time.monotonic() - _MINUTE
    while begun and begun[0] <= oldest:
        begun.popleft()
