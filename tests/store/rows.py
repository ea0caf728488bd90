"""Stores, sessions and records of runs for tests of the metadata store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from sqlalchemy import Engine, Table, create_engine

from era.core.metadata import Retention
from era.core.models import NewSession, RunRecord, Session, now
from era.store.metadata import SqlStore
from tests.owners import mine

_DEFAULT_RETENTION = Retention()


@asynccontextmanager
async def opened(
    url: str, retention: Retention = _DEFAULT_RETENTION, *, alone: bool = True, lease_seconds: float | None = None
) -> AsyncIterator[SqlStore]:
    """A store on the database at `url`, open for as long as the block lasts."""
    store = SqlStore(url, retention, alone=alone, lease_seconds=lease_seconds)
    try:
        await store.open()
        yield store
    finally:
        await store.close()


def new(session_id: str, **changes: Any) -> NewSession:
    """A plain session to be created, with fields changed."""
    return replace(NewSession(mine(session_id), "python", True, "{}", {}, True, False, 30.0), **changes)


def ended(session: Session, run_id: str, **changes: Any) -> RunRecord:
    """The record of a run that ended well, with fields changed."""
    record = RunRecord(run_id, session.key, "ok", started_at=1, ended_at=now(), exit_code=0, committed=True)
    return replace(record, **changes)


def engine_of(url: str) -> Engine:
    """An engine of its own for a store's database."""
    return create_engine(url.replace("postgresql:", "postgresql+psycopg:", 1))


def execute(url: str, *statements: str) -> int:
    """Execute statements in a store's database, beside the store, in one transaction; how many rows the last one
    concerned."""
    engine, count = engine_of(url), 0
    with engine.begin() as connection:
        for statement in statements:
            count = connection.exec_driver_sql(statement).rowcount
    engine.dispose()
    return count


def multiply(url: str, table: Table, count: int, **own: str) -> None:
    """Insert `count` rows like the table's only one, each with values of its own in some columns: SQL with `i` for its
    number, from 1."""
    others = [f'"{column.name}"' for column in table.columns if column.name not in {"key", *own}]
    into, values = ", ".join([*own, *others]), ", ".join([*own.values(), *others])
    numbers = f"(WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count}) SELECT i FROM n) n"
    execute(url, f"INSERT INTO {table.name} ({into}) SELECT {values} FROM {table.name} t, {numbers}")
