"""All that differs between SQLite and PostgreSQL: connecting, beginning a transaction, recognizing errors, sorting.

Also `Precompiled` statements, which go past SQLAlchemy to the driver and so have to know the dialect.

On PostgreSQL, too, a transaction that writes sees the database as if it were alone: it is SERIALIZABLE, and one that
other hosts' transactions got in the way of is undone by PostgreSQL and run again (`may_run_again`).
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    BigInteger,
    ColumnElement,
    Connection,
    Dialect,
    Engine,
    Select,
    Table,
    UpdateBase,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from era.errors import NotReady

OWNERSHIP_SECONDS = 30.0
"""For which a writer waits for one before it to let the database go: the server may not know yet that that is gone, and
on a busy machine one that was killed takes its time to be."""

_log = logging.getLogger(__name__)

_SQLITE_READERS = 4
_POSTGRESQL_READERS = 5
_OLDEST_POSTGRESQL = 130000
_OWNERSHIP_KEY = 0x657261 << 8  # an advisory lock's: "era"
_MIGRATION_KEY = _OWNERSHIP_KEY + 1
_HANGS_SECONDS = 30.0
"""For which whoever was cut off or paused in the middle of a transaction may keep others waiting."""

_TURN_SECONDS = 3
_TAKEN = "55P03"
_GONE_CLASSES = ("08", "57P")
_PAUSED = "25P03"
_GONE = ("25006", _PAUSED, "53300")  # a standby that can't be written to, a pause for too long, no more connections
_UNDONE = ("40001", "40P01", "53200")  # the last: no room for the locks by which others would be found out
_REFUSED_BY_SQLITE = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_CONSTRAINT)
"""What a COMMIT of SQLite's fails with before it has written the end of the transaction to the log."""

_PREDICATE_LOCKS = 512
"""`max_pred_locks_per_transaction` below which a server is told about it. A run's transactions take some 20 each, and
PostgreSQL keeps those of all that ended after the oldest one that is still open began."""

_TO_BEGIN = "to_begin"
"""Where a connection's `info` has the BEGIN that goes to PostgreSQL with the transaction's first statement."""

_CLIENT = {
    "application_name": "era",
    "client_encoding": "utf8",
    "connect_timeout": "5",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
"""What libpq is told, unless the URL says otherwise: a server that is cut off is noticed within some 10 seconds."""

_SESSION = (
    # The same from the server's side: neither a host that is cut off nor one that is paused holds locks for long.
    "SET tcp_keepalives_idle = 5",
    "SET tcp_keepalives_interval = 2",
    "SET tcp_keepalives_count = 3",
    "SET client_min_messages = error",
    # It compiles what it estimates to be expensive, as it does of all tables that the writer reads as a whole (see
    # `connect`): some 0.1 s for a statement that takes less than a millisecond.
    "SET jit = off",
)


@dataclass(frozen=True, slots=True)
class Engines:
    """`writer` has one connection, for one thread; `reader` has `readers` of them, which can't write."""

    writer: Engine
    reader: Engine
    readers: int


def connect(
    url: str,
    *,
    alone: bool = True,
    notices_within: float | None = None,
    hangs_within: float | None = None,
    waits_within: float | None = None,
) -> Engines:
    """The engines for an SQLAlchemy URL, or for `postgresql://…`. No connection is opened yet.

    On PostgreSQL a writer that is `alone` has no other one beside it, of whatever process: as long as it is connected
    it holds a lock. Those that aren't, such as hosts that share a database, hold it together. A server that is cut off
    is noticed within `notices_within` seconds, where they are named, and a few more if it isn't back by then. It ends a
    writer's transaction in which nothing happens for `hangs_within` seconds: whoever is paused in the middle of one
    keeps others waiting no longer. A writer waits for what others have locked for `waits_within` seconds, if they are
    named, and then fails. Raises ValueError for an SQLite database in memory: each connection would see its own.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise ValueError("the metadata store needs a file: sqlite:////path/to/era.db")
        readers = _sqlite(url, _SQLITE_READERS, writes=False)
        return Engines(_sqlite(url, 1, writes=True), readers, _SQLITE_READERS)
    client = dict(_CLIENT)
    if notices_within is not None:
        client["connect_timeout"] = str(max(int(notices_within), 2))
        client["tcp_user_timeout"] = str(int(notices_within * 1000))
    parsed = parsed.set(drivername="postgresql+psycopg").update_query_dict(
        {name: value for name, value in client.items() if name not in parsed.query}
    )
    own = (
        # A SERIALIZABLE transaction that reads a whole table, as is quicker while that is small, conflicts with all who
        # write to it.
        "SET enable_seqscan = off",
        f"SET lock_timeout = {int(OWNERSHIP_SECONDS * 1000)}",
        f"SELECT pg_advisory_lock{'' if alone else '_shared'}({_OWNERSHIP_KEY})",
        f"SET lock_timeout = {int((waits_within or 0) * 1000)}",
    )
    hangs = f"SET idle_in_transaction_session_timeout = {int((hangs_within or _HANGS_SECONDS) * 1000)}"
    writer = _postgresql(parsed, 1, "BEGIN ISOLATION LEVEL SERIALIZABLE", (hangs, *own))
    reader = _postgresql(parsed, _POSTGRESQL_READERS, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    return Engines(writer, reader, _POSTGRESQL_READERS)


class Precompiled:
    """A statement compiled once per dialect and run on the driver's own cursor, past SQLAlchemy.

    For the few statements that every run needs: its begin takes 24 % less time, and its end 30 % (SQLite, medians of
    980 in turns with SQLAlchemy's way: 352 µs and 461, 639 and 911). Errors are the driver's, values come as the driver
    gives them, and a lost connection isn't noticed: the caller drops the connection after any error. `together` runs
    several.
    """

    def __init__(self, statement: Select[Any] | UpdateBase) -> None:
        self._statement = statement
        self._by_dialect: dict[type[Dialect], tuple[str, list[str] | None, dict[str, Any]]] = {}
        """SQL, the order of positional parameters (None: they go by name), and the values that the statement fixes."""

    def first(self, connection: Connection, values: Mapping[str, Any]) -> Any:
        """The first row, as the driver's tuple, or None."""
        return together(connection, (self, values))[0].row

    def execute(self, connection: Connection, values: Mapping[str, Any]) -> int:
        """The number of rows changed."""
        return together(connection, (self, values))[0].count

    def send(self, connection: Connection, cursor: Any, values: Mapping[str, Any]) -> None:
        """Run it by this cursor of the driver's."""
        compiled = self._by_dialect.get(type(connection.dialect))
        sql, order, fixed = compiled or self._compile(connection.dialect)
        values = {**fixed, **values}
        cursor.execute(sql, values if order is None else [values[name] for name in order])

    def _compile(self, dialect: Dialect) -> tuple[str, list[str] | None, dict[str, Any]]:
        compiled: Any = self._statement.compile(dialect=dialect)
        fixed = {name: value for name, value in compiled.params.items() if value is not None}
        self._by_dialect[type(dialect)] = made = (str(compiled), compiled.positiontup, fixed)
        return made


type Asked = tuple[Precompiled, Mapping[str, Any]]
"""A statement and its values."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a statement: its first row, as the driver's tuple, or None; and the number of rows it concerned."""

    row: Any
    count: int


def together(connection: Connection, *asked: Asked) -> list[Answer]:
    """Run statements one after the other, for one round trip to PostgreSQL: it has them all before it answers the
    first. A transaction that has yet to begin does so with them. The first that fails raises, and none of those after
    it is carried out."""
    if not asked:
        return []
    raw: Any = connection.connection
    cursors = [raw.cursor() for _ in asked]
    begin = connection.info.pop(_TO_BEGIN, None)
    try:
        with nullcontext() if connection.dialect.name == "sqlite" else raw.pipeline():
            if begin is not None:
                raw.execute(begin)
            for (statement, values), cursor in zip(asked, cursors, strict=True):
                statement.send(connection, cursor, values)
        return [Answer(cursor.fetchone() if cursor.description else None, int(cursor.rowcount)) for cursor in cursors]
    finally:
        for cursor in cursors:
            cursor.close()


class database_time(FunctionElement[int]):  # noqa: N801  it is a function of SQL's
    """The database's own time, in microseconds since 1970: the same for all that use it, whatever their clocks say."""

    type = BigInteger()
    inherit_cache = True
    name = "database_time"


@compiles(database_time, "sqlite")
def _time_of_sqlite(_element: object, _compiler: object, **_: object) -> str:
    return "CAST((julianday('now') - 2440587.5) * 86400000000.0 AS INTEGER)"


@compiles(database_time, "postgresql")
def _time_of_postgresql(_element: object, _compiler: object, **_: object) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS BIGINT)"


def insert_if_absent(
    connection: Connection, table: Table, values: Mapping[str, Any] | Sequence[Mapping[str, Any]]
) -> bool:
    """Insert a row unless there is one with its primary key; whether there was none. Or several, each by itself;
    whether any wasn't there. A row that another transaction is inserting is waited for."""
    made: Any = (postgresql if connection.dialect.name == "postgresql" else sqlite).insert(table)
    return connection.execute(made.values(values).on_conflict_do_nothing()).rowcount > 0


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


def is_away(engine: Engine, error: Exception) -> bool:
    """Whether `error`, of SQLAlchemy or of the driver, says that the server can't be reached or has cut the connection
    off. Never of SQLite."""
    if engine.dialect.name == "sqlite":
        return False
    cause = getattr(error, "orig", None) or error
    state = _sqlstate(cause)
    if state is None:
        driver: Any = engine.dialect.loaded_dbapi
        return isinstance(cause, (driver.OperationalError, driver.InterfaceError))
    return state.startswith(_GONE_CLASSES) or state in _GONE


def message(error: BaseException | None) -> str:
    """What `error` says, in a line: without PostgreSQL's further lines, which have SQL and people's values."""
    cause = getattr(error, "orig", None) or error
    said = getattr(getattr(cause, "diag", None), "message_primary", None) or str(cause)
    return " ".join(said.split())


def refuses_nul(engine: Engine, error: Exception) -> bool:
    """Whether `error` says that a text has a NUL character, which PostgreSQL can't hold."""
    cause = getattr(error, "orig", None) or error
    driver: Any = engine.dialect.loaded_dbapi
    return engine.dialect.name != "sqlite" and isinstance(cause, driver.DataError) and "NUL" in str(cause)


def is_taken(error: Exception) -> bool:
    """Whether `error` says that another ERA service has this database for itself."""
    return _sqlstate(error) == _TAKEN


def may_run_again(engine: Engine, error: Exception) -> bool:
    """Whether the transaction that raised `error` came to nothing only because of another one beside it, so that it may
    go well if it is run again. A value that is taken counts, too: jobs to which that is no surprise handle it."""
    if engine.dialect.name == "sqlite":
        return False
    return _sqlstate(error) in _UNDONE or violates_unique(error)


def was_undone(error: Exception) -> bool:
    """Whether `error`, which a COMMIT raised, says for certain that nothing was committed: the database refused it, or
    had ended the transaction before, since nothing had happened in it for long.

    Where SQLite can't sync its log, all of the transaction is there: no reader sees it, but whoever finds the log after
    this process was killed takes it in. See `settle`."""
    code: int | None = getattr(getattr(error, "orig", None) or error, "sqlite_errorcode", None)
    if code is not None:
        return code & 0xFF in _REFUSED_BY_SQLITE
    state = _sqlstate(error) or ""
    return state.startswith(("23", "40")) or state == _PAUSED


_SETTLE_MS = 100
"""For which readers are waited for: who has to write asks again, and all others wait for the same thread."""


class LogIsRead(sqlite3.OperationalError):
    """SQLite's log can't be emptied: a reader sees the database as of a moment that is in it."""


def settle(connection: Connection) -> None:
    """Make it certain, whatever becomes of this process, that a transaction of SQLite's counts or that it doesn't, just
    as readers see it, after its COMMIT failed. The connection is a new one, in no transaction. Raises LogIsRead,
    `driver_error`.

    All that counts goes to the database itself, and the log begins anew, durably, with a transaction that writes a
    page. To overwrite the end of the log wouldn't be enough: what the kernel once failed to write it doesn't write
    again, and it says so once. So earlier transactions that weren't synced may be in its memory only.
    """
    cursor = connection.connection.cursor()
    patience = cursor.execute("PRAGMA busy_timeout").fetchone()[0]
    cursor.execute(f"PRAGMA busy_timeout = {_SETTLE_MS}")
    try:
        is_read = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    finally:
        cursor.execute(f"PRAGMA busy_timeout = {patience}")
    if is_read:
        raise LogIsRead("the log can't be emptied while it is read")
    version = cursor.execute("PRAGMA user_version").fetchone()[0]
    cursor.execute(f"PRAGMA user_version = {version}")  # which writes the first page, whether or not it changes that


def settle_log(engine: Engine) -> None:
    """`settle` what an earlier process has left in SQLite's log: it may have been killed after a COMMIT had failed, and
    then what everybody reads from now on could be in the kernel's memory only. Does nothing where it has left none, as
    where it was stopped. Raises as `settle` does."""
    if engine.dialect.name != "sqlite" or not engine.url.database:
        return
    log = Path(f"{engine.url.database}-wal")
    if log.exists() and log.stat().st_size:
        with engine.connect() as connection:
            settle(connection)


def place_of(url: URL) -> str:
    """A database of PostgreSQL, named without user and password."""
    host = url.host or url.query.get("host") or "localhost"
    return f"postgresql://{host}:{url.port or url.query.get('port') or 5432}/{url.database}"


def check_server(engine: Engine) -> None:
    """Raises NotReady, with the reason, where PostgreSQL can't be connected to or can't hold a store."""
    if engine.dialect.name == "sqlite":
        return
    place = place_of(engine.url)
    try:
        with engine.begin() as connection:
            version = int(connection.exec_driver_sql("SHOW server_version_num").scalar_one())
            encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
            locks = int(connection.exec_driver_sql("SHOW max_pred_locks_per_transaction").scalar_one())
            may_create = connection.exec_driver_sql(
                "SELECT has_schema_privilege(current_schema(), 'CREATE') AND NOT pg_is_in_recovery()"
            ).scalar_one()
    except Exception as error:
        if is_taken(error):
            raise NotReady(f"Another ERA service uses {place}: stop it, or name another database.") from None
        raise NotReady(
            f"{place} can't be used ({message(error)}): correct ERA_DATABASE_URL, or start PostgreSQL."
        ) from None
    if version < _OLDEST_POSTGRESQL:
        raise NotReady(f"{place} is of PostgreSQL {version // 10000}, which is too old: 13 or newer is needed.")
    if encoding != "UTF8":
        raise NotReady(f"{place} has the encoding {encoding}: make one with CREATE DATABASE … ENCODING 'UTF8'.")
    if not may_create:
        raise NotReady(f"{place} can't be written to by its user: name the primary, or GRANT CREATE ON SCHEMA public.")
    if locks < _PREDICATE_LOCKS:
        _log.warning(
            "PostgreSQL has room for few predicate locks (max_pred_locks_per_transaction is %d), so many writes at a "
            "time may have to wait for each other: set it to %d or more",
            locks,
            _PREDICATE_LOCKS,
        )


def see_each_commit(connection: Connection) -> None:
    """Have each of the transaction's statements see what others have committed before it: none of them is undone for
    what others do, and none keeps to one moment. Its first statement."""
    if connection.dialect.name != "sqlite":
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")


def name_driver_connection(connection: Any, name: str) -> None:
    """Name a connection of the driver's to PostgreSQL, for `cut_off`."""
    connection.execute("SELECT set_config('application_name', %s, false)", (name,))


def cut_off(connection: Connection, names: Sequence[str]) -> None:
    """End the connections with these names, and what they have locked, whatever they are doing."""
    if names and connection.dialect.name != "sqlite":
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND usename = current_user AND application_name = ANY(%s)",
            (list(names),),
        )


def begin_migration(connection: Connection) -> None:
    """Let no other process migrate the database until this transaction ends. Its first statement."""
    if connection.dialect.name != "sqlite":
        see_each_commit(connection)  # what another one has committed while this one waited
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATION_KEY})")


def one_after_the_other(connection: Connection, name: str) -> None:
    """Wait until no other transaction that named the same is under way, and see then what those have committed. Its
    first statement. Whoever does nothing within it for some seconds loses it."""
    if connection.dialect.name != "sqlite":
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)
        connection.exec_driver_sql(
            "SET TRANSACTION ISOLATION LEVEL READ COMMITTED;"
            f"SET LOCAL idle_in_transaction_session_timeout = '{_TURN_SECONDS}s';"
            f"SELECT pg_advisory_xact_lock({key})"
        )


def others_hang(connection: Connection, seconds: float) -> bool:
    """Whether another transaction has written something, or waits to, for longer than that."""
    if connection.dialect.name == "sqlite":
        return False  # this one is alone
    return bool(
        connection.exec_driver_sql(
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND backend_xid IS NOT NULL AND xact_start < clock_timestamp() - make_interval(secs => %s))",
            (seconds,),
        ).scalar_one()
    )


class bytewise(ColumnElement[str]):  # noqa: N801  named like SQLAlchemy's own functions
    """A text column in the order of its bytes, whatever the database's language."""

    inherit_cache = True

    def __init__(self, column: ColumnElement[str]) -> None:
        self.column = column
        self.type = column.type


@compiles(bytewise)
def _plain(element: bytewise, compiler: Any, **options: Any) -> str:
    return str(compiler.process(element.column, **options))


@compiles(bytewise, "postgresql")
def _collated(element: bytewise, compiler: Any, **options: Any) -> str:
    return f'{compiler.process(element.column, **options)} COLLATE "C"'


class up_to(FunctionElement[Any]):  # noqa: N801  named like SQLAlchemy's own functions
    """Whether the first column equals the first value, and the second column is no more than the second value; said so
    that the database looks it up in the index on both columns, whatever it believes about the table."""

    inherit_cache = True


@compiles(up_to)
def _equal(element: up_to, compiler: Any, **options: Any) -> str:
    of, value, key, last = (compiler.process(each, **options) for each in element.clauses)
    return f"{of} = {value} AND {key} <= {last}"


@compiles(up_to, "postgresql")
def _as_row(element: up_to, compiler: Any, **options: Any) -> str:
    of, value, key, last = (compiler.process(each, **options) for each in element.clauses)
    return f"{of} >= {value} AND ({of}, {key}) <= ({value}, {last})"


def violates_unique(error: Exception, within: Table | None = None) -> bool:
    """Whether `error`, of SQLAlchemy or of a driver, says that a unique value exists already; in this table, if one is
    named."""
    cause: Any = getattr(error, "orig", None) or error
    if _sqlstate(cause) == "23505":
        return within is None or cause.diag.table_name == within.name
    name = getattr(cause, "sqlite_errorname", None)
    is_taken = name in ("SQLITE_CONSTRAINT_UNIQUE", "SQLITE_CONSTRAINT_PRIMARYKEY")
    return is_taken and (within is None or f" {within.name}." in str(cause))


@contextmanager
def raising_if_taken(conflict: Exception, within: Table | None = None) -> Iterator[None]:
    """Raise `conflict` instead of the database's error where the block inserts a unique value that exists already, in
    this table, if one is named."""
    try:
        yield
    except Exception as error:
        if violates_unique(error, within):
            raise conflict from None
        raise


def _sqlstate(error: BaseException) -> str | None:
    """PostgreSQL's code of an error, None where it didn't come from there."""
    state: str | None = getattr(getattr(error, "orig", None) or error, "sqlstate", None)
    return state


def _engine(url: str | URL, connections: int, **options: Any) -> Engine:
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


def _postgresql(url: URL, connections: int, begin: str, own: Sequence[str] = ()) -> Engine:
    logging.getLogger("psycopg").setLevel(logging.ERROR)  # It warns of what it raises besides.
    engine = _engine(url, connections, use_native_hstore=False)

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: object) -> None:
        # As for SQLite: transactions begin below, and only there.
        connection.autocommit = True
        try:
            for statement in (*_SESSION, *own):
                connection.execute(statement)
        except BaseException:
            connection.close()
            raise

    @event.listens_for(engine, "begin")
    def begin_with_the_first_statement(connection: Connection) -> None:
        connection.info[_TO_BEGIN] = begin

    @event.listens_for(engine, "before_cursor_execute")
    def begin_transaction(connection: Connection, *_: object) -> None:
        if statement := connection.info.pop(_TO_BEGIN, None):
            connection.connection.cursor().execute(statement)

    return engine
