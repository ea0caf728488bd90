"""Moving the rows of a stopped server from its data directory to a database of PostgreSQL.

All or nothing: rows are copied and counted in one transaction of each database. Then the data directory notes where
its rows are (store/place.py), and its own file is kept under another name. All else that is in a data directory, the
content of files and programs' SQL databases, stays as it is.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, create_engine, func, select, text
from sqlalchemy.exc import SQLAlchemyError

from era.core.files.durable import sync
from era.errors import BadRequest, Conflict, NotFound, Unavailable
from era.operation import contents
from era.store import dialects, place
from era.store.migrations import upgrade
from era.store.tables import metadata

MOVED = f"{contents.DATABASE}.moved"
_FETCHED = 200
"""Rows that are in memory at a time: each may hold a few MiB."""


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
    source = directory / contents.DATABASE
    if not source.is_file():
        raise NotFound(
            f"{directory} has no {contents.DATABASE}.", hint="Name a server's data directory (ERA_DATA_DIR)."
        )
    target = place.place_of(database_url)
    contents.named(source)  # which refuses rows of another version
    writer = dialects.connect(database_url).writer
    reader = create_engine(f"sqlite:///{source}", hide_parameters=True)
    try:
        dialects.check_server(writer)
        upgrade(writer)
        with reader.connect() as rows, writer.begin() as connection:
            moved = {table.name: _copy(rows, connection, table, target) for table in metadata.sorted_tables}
            _give_no_key_twice(rows, connection)
    except (SQLAlchemyError, dialects.driver_error(writer)) as error:
        raise Unavailable(f"{target} failed: {dialects.message(error)}", hint="Nothing was moved.") from error
    finally:
        reader.dispose()
        writer.dispose()
    place.note(directory, database_url)
    _put_aside(directory)
    return Moved(target, moved)


def _copy(rows: Connection, connection: Connection, table: Table, target: str) -> int:
    """Copy a table's rows into the same table of the target, which must have none; how many."""
    if connection.execute(select(table).limit(1)).first() is not None:
        raise Conflict(f"{target} has rows already.", hint="Name an empty database: createdb makes one.")
    names = ", ".join(f'"{column.name}"' for column in table.columns)
    found = rows.execute(select(table), execution_options={"yield_per": _FETCHED})
    cursor: Any = connection.connection.cursor()
    try:
        with cursor.copy(f'COPY "{table.name}" ({names}) FROM STDIN') as copy:
            for row in found:
                _write(copy, row, table)
    finally:
        cursor.close()
    there, here = (each.execute(select(func.count()).select_from(table)).scalar_one() for each in (rows, connection))
    if there != here:
        raise Unavailable(f"Of {there} rows of {table.name} {here} arrived.", hint="Nothing was moved.")
    return int(here)


def _write(copy: Any, row: Any, table: Table) -> None:
    if any(isinstance(value, str) and "\0" in value for value in row):
        raise BadRequest(
            f"A row of {table.name} ({row[0]}) has text with a NUL character, which PostgreSQL can't hold.",
            hint="Nothing was moved. Change or purge what it belongs to first.",
        )
    copy.write_row(row)


def _give_no_key_twice(rows: Connection, connection: Connection) -> None:
    """Let automatic keys go on where they were, though the newest rows may be gone."""
    given = {row.name: row.seq for row in rows.execute(text("SELECT name, seq FROM sqlite_sequence"))}
    for table in metadata.sorted_tables:
        if (key := table.autoincrement_column) is not None:
            highest = max(given.get(table.name) or 0, rows.execute(select(func.max(key))).scalar_one() or 0)
            if highest:
                connection.execute(select(func.setval(func.pg_get_serial_sequence(table.name, key.name), highest)))


def _put_aside(directory: Path) -> None:
    """Keep the SQLite file under another name. Raises OSError."""
    with closing(sqlite3.connect(directory / contents.DATABASE)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")  # so that it is one file
    (directory / contents.DATABASE).rename(directory / MOVED)
    sync(directory)
