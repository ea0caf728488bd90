"""Counts that go over all rows of a table, which are made anew less often where there are many rows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from sqlalchemy import Connection

from era.store.database import Database

_FEW = 10_000
"""Rows that are counted each time."""

_KEPT_TIMES = 20
"""A count of more is told again for so many times as long as it took."""


class Count[T]:
    """Counts by a job that only reads. However often, and by however many at a time, one of many rows is asked for, it
    takes a twentieth of one connection's time at most; its value is that much older."""

    def __init__(self, database: Database, job: Callable[[Connection], T], rows: Callable[[T], int]) -> None:
        """`rows` says of a result over how many rows the job went for it."""
        self._database, self._job, self._rows = database, job, rows
        self._lock = asyncio.Lock()
        self._kept: tuple[float, T] | None = None
        """Until when it is told, and what."""

    async def value(self) -> T:
        """Raises Unavailable."""
        async with self._lock:
            began = time.monotonic()
            if self._kept is not None and began < self._kept[0]:
                return self._kept[1]
            value = await self._database.read(self._job)
            ended = time.monotonic()
            self._kept = (ended + _KEPT_TIMES * (ended - began), value) if self._rows(value) > _FEW else None
            return value
