"""Moving the rows of a stopped server from its data directory to a database of PostgreSQL.

All or nothing: rows are copied and counted in one transaction of each database. Then the data directory notes where
its rows are (store/place.py), and its own file is kept under another name. Where it was interrupted in between it can
be repeated: a database that has these very rows, and no others, is one to which they were moved. All else that is in a
data directory, the content of files and programs' SQL databases, stays as it is.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from era.core.files.durable import sync
from era.errors import Conflict, NotFound
from era.operation import rows
from era.operation.server_data import reading
from era.store import place

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
            with rows.filling(database_url) as connection:
                moved = rows.copy(found, connection)
        except Conflict:
            same = rows.counted_if_same(found, database_url)
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
