"""Where the rows of a data directory are: in its own SQLite file, or in a database of PostgreSQL.

Content that no row names is removed in time, and an empty database names none. So a server that was started with
another database than before would lose what it has. Therefore a directory notes where its rows are once they aren't in
it, and no other place is taken for that.
"""

from __future__ import annotations

import os
from pathlib import Path

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from era.core.metadata import Retention
from era.core.trees.durable import sync
from era.errors import NotReady
from era.store.engine import dialects
from era.store.metadata import SqlStore

SQLITE = "era.sqlite"
NOTE = "rows-in"
"""The file that notes it."""


async def open_store(
    directory: Path, database_url: str | None, retention: Retention, lease_seconds: float | None
) -> SqlStore:
    """Open the store of this data directory's rows, and note where they are. See `rows_url`, and SqlStore for
    `lease_seconds`, None for a server that is alone.

    Raises NotReady where they can't be had, Unavailable, OSError.
    """
    store = SqlStore(
        rows_url(directory, database_url), retention, alone=lease_seconds is None, lease_seconds=lease_seconds
    )
    try:
        await store.open()
        if database_url is not None:
            note(directory, database_url)
    except BaseException:
        await store.close()
        raise
    return store


def rows_url(directory: Path, database_url: str | None) -> str:
    """The URL of the rows of this data directory. `database_url` is what the operator says: None for its own file.

    Raises NotReady where that makes no sense, or the rows are somewhere else.
    """
    noted = _noted(directory)
    if database_url is None:
        if noted is not None:
            raise NotReady(
                f"The rows of {directory} are in {noted}: set ERA_DATABASE_URL to that, or, to begin without them, "
                f"remove {directory / NOTE}."
            )
        return f"sqlite:///{directory / SQLITE}"
    place = place_of(database_url)
    if noted not in (None, place):
        raise NotReady(
            f"The rows of {directory} are in {noted}, not in {place}: correct ERA_DATABASE_URL, or, if they were "
            f"moved, remove {directory / NOTE}."
        )
    if noted is None and (directory / SQLITE).exists():
        raise NotReady(
            f"The rows of {directory} are in its {SQLITE}: move them with `era migrate {directory} URL`, or leave "
            "ERA_DATABASE_URL out."
        )
    return database_url


def check_database(database_url: str) -> None:
    """Raises NotReady where PostgreSQL can't be reached at this URL, or can't hold a store. Nothing is written."""
    place_of(database_url)
    engines = dialects.connect(database_url, alone=False)
    try:
        dialects.check_server(engines.writer)
    finally:
        engines.writer.dispose()
        engines.reader.dispose()


def place_of(database_url: str) -> str:
    """A database of PostgreSQL, named without user and password. Raises NotReady for a URL that is of no such."""
    try:
        url = make_url(database_url)
        is_complete = url.drivername in ("postgresql", "postgres") and bool(url.database)
    except (ArgumentError, ValueError):
        is_complete = False
    if not is_complete:
        raise NotReady("ERA_DATABASE_URL must be like postgresql://USER:PASSWORD@HOST:5432/DATABASE.")
    return dialects.place_of(url)


def servers_of(database_url: str) -> list[str]:
    """The names and addresses of the servers that a URL names; none for one that is reached by a socket of Unix."""
    url = make_url(database_url)
    said = [url.host or "", *(url.query.get(name, "") for name in ("host", "hostaddr"))]
    several = [each for some in said for each in ([some] if isinstance(some, str) else some)]
    names = [name.partition(":")[0] if name.count(":") == 1 else name for each in several for name in each.split(",")]
    return [name.strip("[]") for name in names if name and not name.startswith("/")]


def note(directory: Path, database_url: str) -> None:
    """Note that the rows of this data directory are in that database of PostgreSQL. Raises OSError."""
    place = place_of(database_url)
    if _noted(directory) == place:
        return
    draft = directory / f"{NOTE}.new"
    with draft.open("w") as file:
        file.write(f"{place}\n")
        file.flush()
        os.fsync(file.fileno())
    draft.rename(directory / NOTE)
    sync(directory)


def _noted(directory: Path) -> str | None:
    try:
        return (directory / NOTE).read_text().strip()
    except FileNotFoundError:
        return None
