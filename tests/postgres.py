"""A real PostgreSQL server for tests, and databases on it.

Each process of the tests has a server of its own, on a Unix socket in a temporary directory, which ends with it; so a
test may stop it and start it again. It doesn't sync to disk: what is tested isn't PostgreSQL's own durability.

The tables are imported by what needs them: every process of the tests imports this module, and most have no database.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from era.cluster.trial import NEEDED, PostgreSQLServer, is_there, postgresql_user

_TEMPLATE = "era_template"
_OPTIONS = {
    "listen_addresses": "",
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "16MB",
    "max_connections": "60",
    "max_pred_locks_per_transaction": "512",
    "autovacuum": "off",
    "log_min_messages": "warning",
}
_names = (f"test{n}" for n in itertools.count())


class Postgres:
    """A server. `directory` has its data and its socket."""

    def __init__(
        self,
        directory: Path,
        *,
        address: str = "",
        prefix: Sequence[str] = (),
        options: Mapping[str, str] = _OPTIONS,
    ) -> None:
        """It listens at this address, too, where one is named. `prefix` is put before its command."""
        self._options = {**options, "listen_addresses": address, "unix_socket_directories": str(directory)}
        self._prefix = prefix
        self._server = PostgreSQLServer(directory)
        self.socket = directory
        self._has_template = False
        self.spare: list[str] = []
        """Databases with ERA's tables and no rows, which tests have used."""

        # Sorts by a language's rules, as most installations do: the service's order is that of bytes all the same.
        locale = ["--locale=C", "--locale-provider=icu", "--icu-locale=en-US"]
        self._server.initialise("-U", "postgres", "-A", "trust", *locale, "--no-sync")
        if address:
            with (directory / "data" / "pg_hba.conf").open("a") as known:
                known.write("host all all samenet trust\n")

    def start(self, **options: str) -> None:
        """Start it, with these besides its own options, and wait until it answers."""
        self._server.start({**self._options, **options}, self.url("postgres"), self._prefix)

    def stop(self, number: int = signal.SIGINT) -> None:
        """End it: SIGINT cuts connections off, SIGQUIT crashes it."""
        self._server.process.stop(number)

    @property
    def said(self) -> str:
        """What its log has."""
        return (self.socket / "log").read_text()

    @property
    def pid(self) -> int:
        """Of the process that all others of the server are below."""
        return self._server.process.pid

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self.socket}"

    def execute(self, *statements: str) -> None:
        """Execute statements in the database that nothing is kept in."""
        with closing(psycopg.connect(self.url("postgres"), autocommit=True)) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def cut_off(self, database: str) -> None:
        """Cut all connections to a database off."""
        self.execute(f"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = '{database}'")

    def make_database(self, *, empty: bool = False) -> str:
        """Make a database, with ERA's tables unless it is to be empty; its name."""
        if not empty and not self._has_template:
            self.execute(f"CREATE DATABASE {_TEMPLATE}")
            asyncio.run(_migrate(self.url(_TEMPLATE)))
            self._has_template = True
        name = next(_names)
        self.execute(f"CREATE DATABASE {name} TEMPLATE {'template0' if empty else _TEMPLATE}")
        return name

    def emptied(self, name: str) -> bool:
        """Delete all rows of a database with ERA's tables, and let keys begin anew; whether that could be done. To make
        another database takes several times as long."""
        from era.store.engine.tables import metadata

        tables = [table.name for table in reversed(metadata.sorted_tables)]
        try:
            with closing(psycopg.connect(self.url(name), autocommit=True)) as connection:
                connection.execute(
                    "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
                connection.execute("; ".join(f'DELETE FROM "{name}"' for name in tables).encode())
                connection.execute("SELECT setval(seqrelid::regclass, 1, false) FROM pg_sequence")
        except psycopg.Error:
            return False
        return True

    def drop_database(self, name: str) -> None:
        self.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def _migrate(url: str) -> None:
    from era.store.metadata import SqlStore

    store = SqlStore(url)
    try:
        await store.open()
    finally:
        await store.close()


def directory_of_server(within: Path | None = None) -> Path:
    """A temporary directory of whoever runs the server. Those of pytest may be closed to others than root."""
    directory = Path(tempfile.mkdtemp(prefix="era-postgres-", dir=within))
    if os.geteuid() == 0:
        os.chown(directory, postgresql_user().pw_uid, postgresql_user().pw_gid)
    return directory


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The server. Without PostgreSQL tests that need it are skipped, but not where nobody would notice."""
    if not is_there("postgresql"):
        reason = NEEDED["postgresql"]
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    directory = directory_of_server()
    try:
        server = Postgres(directory)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def postgres_url(postgres: Postgres) -> Iterator[str]:
    """The URL of a database of the test's own, with ERA's tables and no rows."""
    name = postgres.spare.pop() if postgres.spare else postgres.make_database()
    yield postgres.url(name)
    if postgres.emptied(name):
        postgres.spare.append(name)
    else:
        postgres.drop_database(name)


@pytest.fixture
def empty_postgres_url(postgres: Postgres) -> Iterator[str]:
    """The URL of a database of the test's own without any tables."""
    name = postgres.make_database(empty=True)
    yield postgres.url(name)
    postgres.drop_database(name)
