"""Usage: what owners have used on each day, kept in rows.

Theory of operation. What a run has used is added to its day's row by the transaction that commits the run: so it is
counted if and only if the run is on record, and costs no transaction of its own. A run without a session commits
nothing, so its use is a small transaction by itself, before its answer. What is stored changes in many ways and places,
and is measured now and then instead: a day's row has the most that was seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from era.core.models import OwnedId, Use, now
from era.core.ports import Cluster
from era.errors import EraError

log = structlog.get_logger()

DAY_MICROS = 86_400 * 1_000_000
_PERIOD_SECONDS = 3600.0
_KEPT_DAYS = 400

type Sizes = Mapping[str, tuple[int, int]]
"""By owner: bytes in storage, and bytes of the files of present sessions."""


@dataclass(frozen=True, slots=True)
class DayOfUsage:
    """What an owner has used on a day."""

    owner: str
    day: int
    runs: int
    cpu_us: int
    egress_bytes: int
    storage_bytes: int | None
    disk_bytes: int | None
    """The last two: the most that was measured that day; None where nothing was."""


class UsageStore(Protocol):
    """Rows of usage, and of the quotas that bound it. Every call is one transaction, durable when it returns, but for
    `add_use`."""

    async def owners(self) -> Mapping[str, Mapping[str, int]]:
        """The quotas that were set for each owner."""
        ...

    async def set_owner(self, owner: str, change: Mapping[str, int | None]) -> Mapping[str, int]:
        """Change the quotas that are set for an owner, as `quotas.changed` does. Returns those that are set then."""
        ...

    async def used_on(self, day: int) -> Sequence[tuple[str, str, int, int]]:
        """Owner, key, microseconds of processor time and bytes of traffic of each row of a day's usage."""
        ...

    async def add_use(self, use: Use) -> None:
        """Add to a day's row. A power cut may undo that; a killed service doesn't. Where the database is away it is
        added once that is back, and only the first waits to find that out: it must cost nobody a result."""
        ...

    async def note_sizes(self, sizes: Sizes) -> None:
        """Note what is stored today, where it is more than was noted before."""
        ...

    async def days(self, owner: str | None, first: int, last: int) -> Sequence[DayOfUsage]:
        """What an owner, or each, has used from one day to another, newest day first."""
        ...

    async def prune(self, days: int) -> int:
        """Drop rows that are older than so many days; how many."""
        ...


def day_of(at: int) -> int:
    """The day, since 1970 in UTC, of a time in microseconds."""
    return at // DAY_MICROS


def use_of(who: OwnedId, cpu_us: int | None, egress: Mapping[str, object]) -> Use:
    """What a run of `who` has used that ends now. `egress` is the report of its connections."""
    moved = egress.get("bytes", 0)
    return Use(who.owner, who.key_id, day_of(now()), 1, cpu_us or 0, moved if isinstance(moved, int) else 0)


class Usage:
    """What has been used. `keep` is to be run all the time."""

    def __init__(self, store: UsageStore, cluster: Cluster, measure: Callable[[], Awaitable[Sizes]]) -> None:
        """`measure` tells what is stored now."""
        self._cluster = cluster
        self._store = store
        self._measure = measure

    async def days(self, owner: str | None, first: int, last: int) -> Sequence[DayOfUsage]:
        """What an owner, or with None each, has used from one day to another, newest first; today's sizes are those of
        this moment at least."""
        if last >= day_of(now()):
            sizes = await self._measure()
            await self._store.note_sizes({name: sizes[name] for name in sizes if owner in (None, name)})
        return await self._store.days(owner, first, last)

    async def keep(self) -> None:
        """Measure what is stored and drop old rows, once an hour, for ever. Failures are logged."""
        while True:
            try:
                if self._cluster.leads:
                    await self._store.note_sizes(await self._measure())
                    await self._store.prune(_KEPT_DAYS)
            except EraError as error:
                log.warning("usage_not_measured", error=error.message)
            await asyncio.sleep(_PERIOD_SECONDS)
