"""All that differs between SQLite and PostgreSQL: connecting, beginning a transaction, recognizing a taken value.

Also `Precompiled` statements, which go past SQLAlchemy to the driver and so have to know the dialect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Dialect, Engine, Select, UpdateBase, create_engine, event, make_url

READERS = 2
"""Threads that read, each with a connection of its own."""


@dataclass(frozen=True, slots=True)
class Engines:
    """`writer` has one connection, for one thread; `reader` has `READERS` of them, which can't write on SQLite."""

    writer: Engine
    reader: Engine


def connect(url: str) -> Engines:
    """The engines for an SQLAlchemy URL. No connection is opened yet.

    Raises ValueError for an SQLite database in memory, of which each connection would see its own.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise ValueError("the metadata store needs a file: sqlite:////path/to/era.db")
        return Engines(_sqlite(url, 1, writes=True), _sqlite(url, READERS, writes=False))
    # Each read sees one moment, as on SQLite, however many statements it takes.
    return Engines(_engine(url, 1), _engine(url, READERS, isolation_level="REPEATABLE READ"))


class Precompiled:
    """A statement compiled once per dialect and run on the driver's own cursor, in a fifth of SQLAlchemy's usual time.

    For the few statements that every run needs. Errors are the driver's, values come as the driver gives them, and
    a lost connection isn't noticed: the caller drops the connection after any error.
    """

    def __init__(self, statement: Select[Any] | UpdateBase) -> None:
        self._statement = statement
        self._by_dialect: dict[type[Dialect], tuple[str, list[str] | None, dict[str, Any]]] = {}
        """SQL, the order of positional parameters (None: they go by name), and the values that the statement fixes."""

    def first(self, connection: Connection, values: Mapping[str, Any]) -> Any:
        """The first row, as the driver's tuple, or None."""
        cursor = self._run(connection, values)
        try:
            return cursor.fetchone()
        finally:
            cursor.close()

    def execute(self, connection: Connection, values: Mapping[str, Any]) -> int:
        """The number of rows changed."""
        cursor = self._run(connection, values)
        cursor.close()
        return int(cursor.rowcount)

    def _run(self, connection: Connection, values: Mapping[str, Any]) -> Any:
        compiled = self._by_dialect.get(type(connection.dialect))
        sql, order, fixed = compiled or self._compile(connection.dialect)
        values = {**fixed, **values}
        cursor = connection.connection.cursor()
        cursor.execute(sql, values if order is None else [values[name] for name in order])
        return cursor

    def _compile(self, dialect: Dialect) -> tuple[str, list[str] | None, dict[str, Any]]:
        compiled: Any = self._statement.compile(dialect=dialect)
        fixed = {name: value for name, value in compiled.params.items() if value is not None}
        self._by_dialect[type(dialect)] = made = (str(compiled), compiled.positiontup, fixed)
        return made


def set_synced(connection: Connection, syncs: bool) -> None:
    """Whether transactions from now on are durable when they are committed.

    Without that, SQLite leaves the log's new pages to the kernel: they survive a killed process. The next durable
    commit syncs the whole log, so it makes all earlier ones durable, too, in order. PostgreSQL is asked for nothing of
    the kind: what it hasn't synced goes with a killed *server*, while we live on and would miss it.
    """
    if connection.dialect.name == "sqlite":
        connection.connection.cursor().execute(f"PRAGMA synchronous = {'FULL' if syncs else 'NORMAL'}")


def driver_error(engine: Engine) -> type[Exception]:
    """The base class of all errors that the driver raises."""
    error: type[Exception] = engine.dialect.loaded_dbapi.Error
    return error


def violates_unique(error: Exception) -> bool:
    """Whether `error`, of SQLAlchemy or of a driver, says that a unique value exists already."""
    cause = getattr(error, "orig", None) or error
    name = getattr(cause, "sqlite_errorname", None)
    state = getattr(cause, "sqlstate", None)
    return name in ("SQLITE_CONSTRAINT_UNIQUE", "SQLITE_CONSTRAINT_PRIMARYKEY") or state == "23505"


@contextmanager
def raising_if_taken(conflict: Exception) -> Iterator[None]:
    """Raise `conflict` instead of the database's error where the block inserts a unique value that exists already."""
    try:
        yield
    except Exception as error:
        if violates_unique(error):
            raise conflict from None
        raise


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
