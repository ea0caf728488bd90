"""Counts over whole tables: of few rows they are those of this moment, of many they take a part of the time only."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable

import pytest
from sqlalchemy import Connection

from era.store import whole_tables
from era.store.metadata import SqlStore
from era.store.whole_tables import Count
from tests.soaking import soak_the_rest


def counting(seconds: float = 0.0) -> tuple[Callable[[Connection], int], list[float]]:
    """A job that takes so long and answers how often it ran, and when it did."""
    ran: list[float] = []

    def job(_: Connection) -> int:
        ran.append(time.monotonic())
        time.sleep(seconds)
        return len(ran)

    return job, ran


async def test_few_rows_are_counted_each_time(store: SqlStore) -> None:
    job, _ = counting()
    count = Count(store.database, job, lambda _: whole_tables._FEW)
    assert [await count.value() for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("url", soak_the_rest(["sqlite_url", "postgres_url"], ["postgres_url"]), indirect=True)
async def test_many_rows_take_a_twentieth_of_the_time(store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    job, ran = counting(0.05)
    count = Count(store.database, job, lambda _: whole_tables._FEW + 1)
    until = time.monotonic() + 3
    while time.monotonic() < until:
        values = await asyncio.gather(*(count.value() for _ in range(50)))
        assert values == sorted(values)
        assert len(ran) - 1 <= values[0] <= values[-1] == len(ran)  # it may be counted anew among them
        await asyncio.sleep(0.01)
    apart = [after - before for before, after in itertools.pairwise(ran)]
    assert all(each > whole_tables._KEPT_TIMES * 0.05 for each in apart)
    monkeypatch.setattr(whole_tables, "_KEPT_TIMES", 0)
    again = Count(store.database, job, lambda _: whole_tables._FEW + 1)
    assert await again.value() + 1 == await again.value()


async def test_a_count_that_fails_is_made_again(store: SqlStore) -> None:
    job, ran = counting()

    def failing(connection: Connection) -> int:
        if job(connection) == 1:
            raise ZeroDivisionError
        return len(ran)

    count = Count(store.database, failing, lambda _: whole_tables._FEW + 1)
    with pytest.raises(ZeroDivisionError):
        await count.value()
    assert [await count.value(), await count.value()] == [2, 2]
