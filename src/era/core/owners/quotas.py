"""Quotas: how much an owner may use, and a single API key, and how much of that is in use now.

Theory of operation
===================

There are two kinds. *Rates* bound what is used up in a time: runs a minute, processor time and network traffic a day.
Who has reached one is told when to come back (429). The others bound what there is at a time: who has reached one is
told what fills it (409), since time alone changes nothing.

A call counts for its owner and, where it came with a key that has quotas of its own, for that key as well: so it can
reach either. What comes without a key (public URLs, inboxes, processes that go on) counts for its session's owner.

Each quota is counted where it can't be passed by many calls at once. Runs and sandboxes are counted here, in memory and
without waiting between look and count; one process has the data directory, so nobody else counts. What is in rows,
sessions and their files, is counted by the transaction that adds to it (store/quotas.py). Storage has its own count
(storage.py). What a day has used is read from the rows of usage at the start (usage.py) and added to after each run:
a run that has begun isn't ended by it, but no other begins.

Hosts of a cluster count runs and sandboxes in rows besides (store/quota_counts.py), of those for whom there is such a
quota: one small transaction before a run, in which the calls of one owner come one after the other, and one after it,
which takes its sandbox from the count. A row of a sandbox names its host, and counts as long as that isn't dead, so
nothing has to be given back after a crash. Rows that couldn't be taken away, and those of sandboxes that were in use
when a quota was set, are put right with the next heartbeat (`open`).

A sandbox counts while a program runs in it or its session is live. One that is only kept warm makes way for others
anyway, and counts for nobody.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple, Protocol

import structlog

from era.core.models import JsonObject, OwnedId, Use, now
from era.core.owners.usage import DAY_MICROS, UsageStore, day_of
from era.errors import EraError, QuotaReached, RateReached

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


log = structlog.get_logger()

type Kind = Literal["owner", "key"]
type Amounts = Mapping[str, int]
"""Numbers by the name of a quota. 0 stands for no bound."""

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

OF_HOSTS = ("sandboxes", "memory_mb", "runs_per_minute")
"""Those of which each host of a cluster sees its own part only."""

_OF_SANDBOXES = ("sandboxes", "memory_mb")
_OF_RUNS = ("cpu_seconds_per_day", "egress_mb_per_day", "runs_per_minute")


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

    def refused(self, refusal: Refusal) -> QuotaReached | RateReached:
        """The error for a call for which there is no room; it is reported."""
        if refusal.seconds is None:
            return self.reached(refusal.used, refusal.filled_by)
        error = RateReached(f"{self._said}, and has had {refusal.used:g}.", details=self._details(refusal.used))
        error.retry_after = max(1, math.ceil(refusal.seconds))
        self.report(error)
        return error

    @property
    def _said(self) -> str:
        whose = "This owner" if self.kind == "owner" else "This API key"
        return f"{whose} may have {self.most} {WORDS[self.name]}"

    def _details(self, used: float) -> JsonObject:
        return {"quota": self.name, "of": self.kind, "limit": self.most, "used": used}


class Held(NamedTuple):
    """For whom the sandbox of a session counts."""

    kind: Kind
    subject: str
    session: str


class SharedCounts(Protocol):
    """Where the hosts of a cluster count what each of them sees its part of only. Every call is one transaction."""

    async def take(
        self, owner: str, session: str, bounds: Sequence[Bound], memory: int, *, run: bool
    ) -> tuple[Bound, Refusal] | None:
        """Count the sandbox of a session of this owner's, at this host, for each of these bounds, and with `run`
        another run; None then. Else why not: the first bound that leaves no room, and nothing is counted."""
        ...

    async def correct(self, add: Mapping[Held, int], drop: Sequence[Held]) -> None:
        """Count these sandboxes at this host, with the bytes that they may take, and those no more."""
        ...


class Quotas:
    """The quotas of all owners and keys, and what counts for those that are counted here. `open` before anything."""

    def __init__(
        self,
        store: UsageStore,
        defaults: Amounts,
        of_key: Callable[[str], Amounts],
        counts: SharedCounts | None = None,
    ) -> None:
        """`defaults` are those of owners for whom nothing else was set. `of_key` gives a key's own, by its id. `counts`
        are a cluster's."""
        self._store = store
        self._counts = counts
        self._defaults = defaults
        self._of_key = of_key
        self._owners: dict[str, Amounts] = {}
        self._reading = asyncio.Lock()
        """Held while rows are read or written: what was read before somebody changed it may not come after that."""

        self._meters: dict[tuple[Kind, str], Meter] = {}
        self._holders: Counter[Held] = Counter()
        """How many hold a sandbox, or are just about to."""

        self._in_rows: set[Held] = set()
        """What may be counted in rows as being in use here."""

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
        if self._counts is not None:
            in_use = [held for held in self._holders if held not in self._in_rows and self._bounds_sandboxes(held)]
            await self._correct(in_use, [held for held in self._in_rows if held not in self._holders])

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
            self._owners[owner] = await self._store.set_owner(owner, change)

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

    def of_removed(self, owner: str) -> tuple[int, int]:
        """How many sessions of an owner's can be restored, and how many bytes of files these may have; 0: any. As many
        as there may be of those that aren't removed."""
        quotas = self.of_owner(owner)
        return quotas.get("sessions", 0), quotas.get("disk_mb", 0) * _MIB

    def bounds_sessions(self) -> bool:
        """Whether anybody's sessions, or their files, have a quota."""
        return any(
            each.get(name) for each in (self._defaults, *self._owners.values()) for name in ("sessions", "disk_mb")
        )

    def bounds_memory(self, who: OwnedId) -> bool:
        """Whether `hold` needs to know how much memory a sandbox may take."""
        return bool(self.bounds(who, "memory_mb"))

    def in_use(self, owner: str) -> dict[str, float]:
        """How much an owner uses of what is counted here, by the name of the quota."""
        meter = self._meter("owner", owner)
        meter.turn_to(day_of(now()))
        meter.runs.forget_old(_monotonic_us())
        return {
            "sandboxes": len(meter.sandboxes),
            "memory_mb": meter.memory // _MIB,
            "runs_per_minute": len(meter.runs),
            "cpu_seconds_per_day": round(meter.cpu_us / 1e6, 3),
            "egress_mb_per_day": round(meter.egress_bytes / _MIB, 3),
        }

    def in_use_here(self) -> dict[str, dict[str, float]]:
        """How much each owner uses of what each host of a cluster counts for itself, of those that use anything."""
        owners = [subject for kind, subject in self._meters if kind == "owner"]
        used = {owner: {name: self.in_use(owner)[name] for name in OF_HOSTS} for owner in owners}
        return {owner: amounts for owner, amounts in used.items() if any(amounts.values())}

    def _report(self, owner: str, error: EraError) -> None:
        for listener in self.on_reached:
            listener(owner, error)

    # -- what is counted here ----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self, who: OwnedId, memory: int) -> AsyncIterator[None]:
        """Count a run, and its sandbox within the block; see `hold`. Raises RateReached and QuotaReached."""
        release = await self._take(who, memory, *_OF_RUNS, *_OF_SANDBOXES)
        try:
            yield
        finally:
            await release()

    async def hold(self, who: OwnedId, memory: int) -> Callable[[], Awaitable[None]]:
        """Count the sandbox of the session `who`, which may take `memory` bytes, until the function that this returns
        is called, once. All who hold the same session's count as one. Raises QuotaReached."""
        return await self._take(who, memory, *_OF_SANDBOXES)

    async def _take(self, who: OwnedId, memory: int, *names: str) -> Callable[[], Awaitable[None]]:
        """Count what bounds of these names are about; where that would be too much, nothing is counted."""
        bounds = self.bounds(who, *names)
        subjects: list[tuple[Kind, str]] = [("owner", who.owner)]
        if who.key_id and self._of_key(who.key_id):
            subjects.append(("key", who.key_id))
        helds = [Held(kind, subject, who.id) for kind, subject in subjects]
        if self._counts is None:
            self._check(who, bounds, memory)
        for held in helds:
            self._holders[held] += 1
            self._meter(held.kind, held.subject).sandboxes.setdefault(who.id, memory)
        release = partial(self._let_go, helds)
        if self._counts is not None and bounds:
            try:
                await self._take_in_rows(self._counts, who, bounds, memory, run="runs_per_minute" in names)
            except BaseException:
                await release()
                raise
        for bound in bounds:
            if bound.name == "runs_per_minute":
                self._meter(bound.kind, bound.subject).runs.add(_monotonic_us())
        return release

    def _check(self, who: OwnedId, bounds: Sequence[Bound], memory: int) -> None:
        """Raises RateReached, QuotaReached."""
        for bound in bounds:
            meter = self._meter(bound.kind, bound.subject)
            refusal = meter.refusal(bound.name, bound.most, who.id, memory, _monotonic_us())
            if refusal is not None:
                raise bound.refused(refusal)

    async def _take_in_rows(
        self, counts: SharedCounts, who: OwnedId, bounds: Sequence[Bound], memory: int, *, run: bool
    ) -> None:
        """Raises RateReached, QuotaReached, Unavailable."""
        taken = {Held(bound.kind, bound.subject, who.id) for bound in bounds if bound.name in _OF_SANDBOXES}
        try:
            refused = await counts.take(who.owner, who.id, bounds, memory, run=run)
        except BaseException:
            self._in_rows |= taken  # for all that is known
            raise
        if refused is not None:
            bound, refusal = refused
            raise bound.refused(refusal)
        self._in_rows |= taken

    async def _let_go(self, helds: Sequence[Held]) -> None:
        """Count the sandbox of a session no more for one who held it."""
        gone = []
        for held in helds:
            self._holders[held] -= 1
            if not self._holders[held]:
                del self._holders[held]
                del self._meter(held.kind, held.subject).sandboxes[held.session]
                if held in self._in_rows:
                    gone.append(held)
        if gone:
            await asyncio.shield(asyncio.ensure_future(self._correct([], gone)))

    async def _correct(self, add: Sequence[Held], drop: Sequence[Held]) -> None:
        """Have rows count these sandboxes, which are in use, and those no more. If that fails, the next heartbeat tries
        again."""
        if self._counts is None or not (add or drop):
            return
        self._in_rows.update(add)
        memory = {held: self._meter(held.kind, held.subject).sandboxes[held.session] for held in add}
        try:
            await self._counts.correct(memory, drop)
        except EraError as error:
            log.warning("quotas_not_counted", error=error.message, then="the next heartbeat tries again")
            self._in_rows.difference_update(add)
            self._in_rows.update(drop)
        else:
            # Who holds one again meanwhile has counted it after this.
            self._in_rows.difference_update(held for held in drop if held not in self._holders)

    def _bounds_sandboxes(self, held: Held) -> bool:
        """Whether there is a quota for which this sandbox counts."""
        amounts = self.of_owner(held.subject) if held.kind == "owner" else self._of_key(held.subject)
        return any(amounts.get(name) for name in _OF_SANDBOXES)

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

    def _meter(self, kind: Kind, name: str) -> Meter:
        meter = self._meters.get((kind, name))
        if meter is None:
            meter = self._meters[kind, name] = Meter()
        return meter


def changed(amounts: Amounts, change: Mapping[str, int | None]) -> dict[str, int]:
    """Quotas once some are set; None takes one back."""
    return {name: most for name, most in {**amounts, **change}.items() if most is not None}


def _monotonic_us() -> int:
    """Microseconds of a clock that nobody sets."""
    return int(time.monotonic() * 1e6)
