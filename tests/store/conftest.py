"""A metadata store in SQLite and in PostgreSQL, SQL databases of programs, and an S3 server."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from era.store import migrations
from era.store.engine import dialects
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


@pytest.fixture(params=["empty_sqlite_url", "empty_postgres_url"])
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
def empty_sqlite_url(tmp_path: Path) -> str:
    """The URL of an SQLite database that doesn't exist yet."""
    return f"sqlite:///{tmp_path}/era.db"


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite database with all tables, which take longer to make than most tests."""
    path = tmp_path_factory.mktemp("template") / "era.db"
    engines = dialects.connect(f"sqlite:///{path}")
    migrations.upgrade(engines.writer)
    for engine in (engines.writer, engines.reader):
        engine.dispose()
    return path


@pytest.fixture
def sqlite_url(template: Path, empty_sqlite_url: str) -> str:
    """The URL of an SQLite database without rows."""
    shutil.copy(template, empty_sqlite_url.removeprefix("sqlite:///"))
    return empty_sqlite_url


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
