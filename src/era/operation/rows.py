"""Copying all rows of one database into another one without any, in one transaction of each.

The rows of a stopped server move from its data directory to a database of PostgreSQL so, all or nothing: rows are
copied and counted in one transaction of each database. Then the data directory notes where its rows are
(store/place.py), and its own file is kept under another name. Where it was interrupted in between it can be repeated: a
database that has these very rows, and no others, is one to which they were moved. All else that is in a data directory,
the content of files and programs' SQL databases, stays as it is.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import batched, zip_longest
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, String, Table, create_engine, func, insert, select, text
from sqlalchemy.exc import SQLAlchemyError

from era.core.trees.durable import sync
from era.errors import BadRequest, Conflict, NotFound, Unavailable
from era.operation.server_data import reading
from era.store import place
from era.store.engine import dialects
from era.store.engine.tables import metadata
from era.store.migrations import upgrade

_MAY_BE_STORED = (
    "It isn't known whether rows were stored there. Try again, with another empty database if that one has rows then."
)
_FETCHED = 20
"""Rows that are in memory at a time: each may hold a few MiB."""


@contextmanager
def filling(database_url: str) -> Iterator[Connection]:
    """A transaction of a database of PostgreSQL that has ERA's tables and no rows, and that nobody else uses. It is
    committed when the block ends.

    Raises NotReady for a database that can't be had, Conflict for one that has rows, Unavailable where it fails;
    where that was during the commit, rows may have been stored.
    """
    name = place.place_of(database_url)
    writer = dialects.connect(database_url).writer
    is_complete = False
    try:
        dialects.check_server(writer)
        upgrade(writer)
        with writer.begin() as connection:
            for table in metadata.sorted_tables:
                if connection.execute(select(table).limit(1)).first() is not None:
                    raise Conflict(f"{name} has rows already.", hint="Name an empty database: createdb makes one.")
            yield connection
            is_complete = True
    except (SQLAlchemyError, dialects.driver_error(writer)) as error:
        may_be_stored = is_complete and not dialects.was_undone(error)
        hint = _MAY_BE_STORED if may_be_stored else "Nothing was stored there."
        raise Unavailable(f"{name} failed: {dialects.message(error)}", hint=hint) from error
    finally:
        writer.dispose()


def counted_if_same(rows: Connection, database_url: str) -> dict[str, int] | None:
    """How many rows a database of PostgreSQL has, by table, where these are the same ones; None where they aren't.
    Raises NotReady, Unavailable."""
    reader = dialects.connect(database_url, alone=False).reader
    try:
        with reader.connect() as other, other.begin():
            counts = {table.name: _count_if_same(rows, other, table) for table in metadata.sorted_tables}
    except (SQLAlchemyError, dialects.driver_error(reader)) as error:
        raise Unavailable(f"{place.place_of(database_url)} failed: {dialects.message(error)}") from error
    finally:
        reader.dispose()
    known = {name: count for name, count in counts.items() if count is not None}
    return known if len(known) == len(counts) else None


def _count_if_same(one: Connection, other: Connection, table: Table) -> int | None:
    """How many rows a table has in both databases, None where they differ."""
    in_order = select(table).order_by(
        *(dialects.bytewise(key) if isinstance(key.type, String) else key for key in table.primary_key)
    )
    found, there = (each.execute(in_order, execution_options={"yield_per": _FETCHED}) for each in (one, other))
    count = 0
    for row, its in zip_longest(found, there):
        if row != its:
            found.close()
            there.close()
            return None
        count += 1
    return count


def remove_all(database_url: str) -> None:
    """Remove the rows that were put into a database of PostgreSQL. Raises SQLAlchemyError."""
    writer = dialects.connect(database_url).writer
    try:
        with writer.begin() as connection:
            for table in reversed(metadata.sorted_tables):
                connection.execute(table.delete())
    finally:
        writer.dispose()


def make_file(rows: Connection, database: Path) -> None:
    """Make an SQLite database of all rows. Raises SQLAlchemyError, Unavailable, OSError."""
    engine = create_engine(f"sqlite:///{database}", hide_parameters=True)
    try:
        upgrade(engine)
        with engine.begin() as connection:
            copy(rows, connection)
    finally:
        engine.dispose()
    database.chmod(0o600)


def copy(rows: Connection, target: Connection) -> dict[str, int]:
    """Copy all rows into the empty tables of the target, and let automatic keys go on where they were; how many by
    table. Raises BadRequest for rows that the target can't hold, Unavailable."""
    put = _put_into_file if target.dialect.name == "sqlite" else _put_into_postgresql
    counts = {}
    for table in metadata.sorted_tables:
        put(rows.execute(select(table), execution_options={"yield_per": _FETCHED}), target, table)
        there, here = (each.execute(select(func.count()).select_from(table)).scalar_one() for each in (rows, target))
        if there != here:
            raise Unavailable(f"Of {there} rows of {table.name} {here} arrived.", hint="Nothing was stored there.")
        counts[table.name] = int(here)
    _give_no_key_twice(rows, target)
    if target.dialect.name != "sqlite":
        # PostgreSQL plans by what it believes about its tables, and would count so many new rows only minutes later.
        target.execute(text("ANALYZE"))
    return counts


def _put_into_file(found: Any, target: Connection, table: Table) -> None:
    for some in batched(found.mappings(), _FETCHED):
        target.execute(insert(table), [dict(row) for row in some])


def _put_into_postgresql(found: Any, target: Connection, table: Table) -> None:
    names = ", ".join(f'"{column.name}"' for column in table.columns)
    cursor: Any = target.connection.cursor()
    try:
        with cursor.copy(f'COPY "{table.name}" ({names}) FROM STDIN') as copying:
            for row in found:
                if any(isinstance(value, str) and "\0" in value for value in row):
                    raise BadRequest(
                        f"A row of {table.name} ({row[0]}) has text with a NUL character, which PostgreSQL can't hold.",
                        hint="Nothing was stored there. Change or purge what it belongs to first.",
                    )
                copying.write_row(row)
    finally:
        cursor.close()


def _give_no_key_twice(rows: Connection, target: Connection) -> None:
    """Let automatic keys go on where they were, though the newest rows may be gone."""
    for table in metadata.sorted_tables:
        if (key := table.autoincrement_column) is None:
            continue
        highest = max(_given(rows, table, key.name), rows.execute(select(func.max(key))).scalar_one() or 0)
        if not highest:
            continue
        if target.dialect.name == "sqlite":
            for statement in (
                "DELETE FROM sqlite_sequence WHERE name = :name",
                "INSERT INTO sqlite_sequence (name, seq) VALUES (:name, :seq)",
            ):
                target.execute(text(statement), {"name": table.name, "seq": highest})
        else:
            target.execute(select(func.setval(func.pg_get_serial_sequence(table.name, key.name), highest)))


def _given(rows: Connection, table: Table, key: str) -> int:
    """The highest key that a table's rows were given, as far as the database has noted it."""
    if rows.dialect.name == "sqlite":
        found = rows.execute(text("SELECT seq FROM sqlite_sequence WHERE name = :name"), {"name": table.name}).scalar()
    else:
        sequence = rows.execute(select(func.pg_get_serial_sequence(table.name, key))).scalar()
        found = rows.execute(
            text("SELECT pg_sequence_last_value(CAST(:name AS regclass))"), {"name": sequence}
        ).scalar()
    return int(found or 0)


MOVED = f"{place.SQLITE}.moved"


@dataclass(frozen=True, slots=True)
class Moved:
    """What was moved: where to, and the number of rows by table."""

    target: str
    rows: dict[str, int]


def migrate(directory: Path, database_url: str) -> Moved:
    """Move the rows of a data directory, whose lock the caller holds, to a database of PostgreSQL without any.

    Raises NotFound where there is no such data directory, NotReady for a database that can't be had, Conflict for one
    that has rows or for rows of another version, BadRequest for rows that PostgreSQL can't hold, Unavailable, OSError.
    Nothing has changed then but the target's tables, which may be there, without rows.
    """
    if not (directory / place.SQLITE).is_file():
        raise NotFound(f"{directory} has no {place.SQLITE}.", hint="Name a server's data directory (ERA_DATA_DIR).")
    target = place.place_of(database_url)
    with reading(f"sqlite:///{directory / place.SQLITE}") as found:
        try:
            with filling(database_url) as connection:
                moved = copy(found, connection)
        except Conflict:
            same = counted_if_same(found, database_url)
            if same is None:
                raise
            moved = same
    place.note(directory, database_url)
    _put_aside(directory)
    return Moved(target, moved)


def _put_aside(directory: Path) -> None:
    """Keep the SQLite file under another name. Raises OSError."""
    with closing(sqlite3.connect(directory / place.SQLITE)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")  # so that it is one file
    (directory / place.SQLITE).rename(directory / MOVED)
    sync(directory)
