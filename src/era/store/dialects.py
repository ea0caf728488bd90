"""All that differs between databases: how to connect, begin a transaction and tell a taken id from other trouble."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Dialect, Engine, Executable, create_engine, event, make_url

READERS = 2


@dataclass(frozen=True, slots=True)
class Engines:
    """Where to write, from one thread, and where to read, from `READERS` threads."""

    writer: Engine
    reader: Engine


def connect(url: str) -> Engines:
    """The engines for `url`. Nothing is opened yet."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            # Each connection would see a database of its own.
            raise ValueError("the metadata store needs a file: sqlite:////path/to/era.db")
        return Engines(_sqlite(url, 1, writes=True), _sqlite(url, READERS, writes=False))
    # Each read sees one moment, as on SQLite, however many statements it takes.
    return Engines(_engine(url, 1), _engine(url, READERS, isolation_level="REPEATABLE READ"))


class Prepared:
    """A statement compiled ahead and run on the driver's own cursor, which takes a fifth of the usual way's time.

    For the few statements that every run needs. Errors are the driver's, values come as the driver gives them, and
    a lost connection isn't noticed: the caller drops the connection after any error.
    """

    def __init__(self, statement: Executable, dialect: Dialect) -> None:
        compiled = statement.compile(dialect=dialect)  # type: ignore[attr-defined]
        self._sql = str(compiled)
        self._order: list[str] | None = compiled.positiontup
        self._constants = {name: value for name, value in compiled.params.items() if value is not None}

    def one(self, connection: Connection, values: Mapping[str, Any]) -> Any:
        """The first row of the answer, or None."""
        cursor = self._run(connection, values)
        try:
            return cursor.fetchone()
        finally:
            cursor.close()

    def count(self, connection: Connection, values: Mapping[str, Any]) -> int:
        """How many rows were changed."""
        cursor = self._run(connection, values)
        cursor.close()
        return int(cursor.rowcount)

    def _run(self, connection: Connection, values: Mapping[str, Any]) -> Any:
        values = {**self._constants, **values}
        cursor = connection.connection.cursor()
        cursor.execute(self._sql, values if self._order is None else [values[name] for name in self._order])
        return cursor


def driver_error(engine: Engine) -> type[Exception]:
    """What the driver raises for any trouble of its own."""
    error: type[Exception] = engine.dialect.loaded_dbapi.Error
    return error


def is_taken(error: Exception) -> bool:
    """Whether `error` means that a unique value exists already."""
    cause = getattr(error, "orig", None) or error
    name = getattr(cause, "sqlite_errorname", None)
    state = getattr(cause, "sqlstate", None)
    return name in ("SQLITE_CONSTRAINT_UNIQUE", "SQLITE_CONSTRAINT_PRIMARYKEY") or state == "23505"


def _engine(url: str, connections: int, **options: Any) -> Engine:
    # Parameters are people's data and code: they have no place in an error's text.
    return create_engine(url, pool_size=connections, max_overflow=0, hide_parameters=True, **options)


def _sqlite(url: str, connections: int, *, writes: bool) -> Engine:
    engine = _engine(url, connections)

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: object) -> None:
        # Keep the sqlite3 module from opening transactions by itself: `begin` below does, and only there.
        connection.isolation_level = None
        for pragma in (
            "busy_timeout = 5000",
            "journal_mode = WAL",
            "synchronous = FULL",  # fsync the log at every commit: what is acknowledged survives a power cut
            "foreign_keys = ON",
            f"query_only = {'OFF' if writes else 'ON'}",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A write takes its lock at once: a lock taken halfway can fail in a way that no waiting cures.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine
