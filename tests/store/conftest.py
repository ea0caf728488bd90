"""A metadata store in SQLite and in PostgreSQL, SQL databases of programs, and an S3 server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from era.store.metadata import SqlStore
from tests.postgres import Postgres
from tests.store.d1 import databases, small_disk
from tests.store.rows import opened
from tests.store.s3 import bucket, faulty, s3

__all__ = ["bucket", "databases", "faulty", "s3", "small_disk"]


@pytest.fixture(params=["sqlite_url", "postgres_url"])
def url(request: pytest.FixtureRequest) -> str:
    """The URL of a database without rows, of each kind."""
    return str(request.getfixturevalue(request.param))


@pytest.fixture(params=["sqlite_url", "empty_postgres_url"])
def empty_url(request: pytest.FixtureRequest) -> str:
    """The URL of a database without tables, of each kind."""
    return str(request.getfixturevalue(request.param))


@pytest.fixture
def restarted(postgres: Postgres) -> Iterator[Postgres]:
    """The server, which runs again after the test whatever that did."""
    yield postgres
    postgres.stop()
    postgres.start()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of an SQLite database that doesn't exist yet."""
    return f"sqlite:///{tmp_path}/era.db"


@pytest.fixture
async def sqlite_store(sqlite_url: str) -> AsyncIterator[SqlStore]:
    """An open store in an SQLite database of its own."""
    async with opened(sqlite_url) as store:
        yield store


@pytest.fixture
async def store(url: str) -> AsyncIterator[SqlStore]:
    """An open store in a database of its own, of each kind."""
    async with opened(url) as store:
        yield store
