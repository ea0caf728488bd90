"""A real PostgreSQL server for tests, and databases on it.

Each process of the tests has a server of its own, on a Unix socket in a temporary directory, which ends with it; so a
test may stop it and start it again. It doesn't sync to disk: what is tested isn't PostgreSQL's own durability.

The tables are imported by what needs them: every process of the tests imports this module, and most have no database.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

START_SECONDS = 60.0
_TEMPLATE = "era_template"
_OPTIONS = {
    "listen_addresses": "",
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "16MB",
    "max_connections": "60",
    "autovacuum": "off",
    "log_min_messages": "warning",
}
_names = (f"test{n}" for n in itertools.count())


def binaries() -> Path | None:
    """The directory of the newest server's commands: Debian doesn't put them on PATH."""
    on_path = shutil.which("initdb")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parent.parent.name))
    if found:
        return found[-1].parent
    return None if on_path is None else Path(on_path).resolve().parent


class Postgres:
    """A server. `directory` has its data and its socket."""

    def __init__(
        self,
        commands: Path,
        directory: Path,
        *,
        address: str = "",
        there: Sequence[str] = (),
        options: Mapping[str, str] = _OPTIONS,
    ) -> None:
        """It listens at this address, too, where one is named. `there` is what its command begins with."""
        self._commands = commands
        self._options = options
        self._there = there
        self._address = address
        self._data = directory / "data"
        self.socket = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._has_template = False
        self.spare: list[str] = []
        """Databases with ERA's tables and no rows, which tests have used."""

        command = [str(commands / "initdb"), "-D", str(self._data), "-U", "postgres", "-A", "trust", "-E", "UTF8"]
        # Sorts by a language's rules, as most installations do: the service's order is that of bytes all the same.
        locale = ["--locale=C", "--locale-provider=icu", "--icu-locale=en-US"]
        subprocess.run([*_as_ordinary_user(), *command, *locale, "--no-sync"], check=True, capture_output=True, cwd="/")
        if address:
            with (self._data / "pg_hba.conf").open("a") as known:
                known.write("host all all samenet trust\n")

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = [f"-c{name}={value}" for name, value in {**self._options, "listen_addresses": self._address}.items()]
        command = [str(self._commands / "postgres"), "-D", str(self._data), "-k", str(self.socket), *options]
        # It ends with this process, however that ends.
        parented = [*self._there, "setpriv", "--pdeathsig", "QUIT", *_as_ordinary_user()[1:]]
        with (self.socket / "log").open("ab") as log:
            self._process = subprocess.Popen([*parented, *command], stdout=log, stderr=log, cwd="/")
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                psycopg.connect(self.url("postgres")).close()
                return
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError((self.socket / "log").read_text(errors="replace")) from None
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGINT) -> None:
        """End it: SIGINT cuts connections off, SIGQUIT crashes it."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(START_SECONDS)
            self._process = None

    @property
    def pid(self) -> int:
        """Of the process that all others of the server are below."""
        assert self._process is not None
        return self._process.pid

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
        from era.store.tables import metadata

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


def _as_ordinary_user() -> list[str]:
    """What a command begins with that isn't to be root's: PostgreSQL refuses to be."""
    if os.geteuid() != 0:
        return ["setpriv"]
    user = _ordinary_user()
    return ["setpriv", "--reuid", str(user.pw_uid), "--regid", str(user.pw_gid), "--clear-groups"]


def _ordinary_user() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise AssertionError("this machine has neither a user postgres nor nobody")


def directory_of_server(within: Path | None = None) -> Path:
    """A temporary directory of whoever runs the server. Those of pytest may be closed to others than root."""
    directory = Path(tempfile.mkdtemp(prefix="era-postgres-", dir=within))
    if os.geteuid() == 0:
        os.chown(directory, _ordinary_user().pw_uid, _ordinary_user().pw_gid)
    return directory


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The server. Without PostgreSQL tests that need it are skipped, but not where nobody would notice."""
    commands = binaries()
    if commands is None:
        reason = "there is no PostgreSQL here: apt-get install postgresql"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    directory = directory_of_server()
    try:
        server = Postgres(commands, directory)
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
