"""Migrations of the schema, by alembic: shipped with the package and applied at every start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text

from era.errors import Unavailable
from era.store.dialects import begin_migration

HEAD = "0026"
"""The newest revision; a test compares it with the files in versions/."""


def upgrade(engine: Engine) -> None:
    """Bring the database to `HEAD` in one transaction. Raises Unavailable where a newer ERA has migrated it."""
    if _revision(engine) == HEAD:
        return  # The usual start, without the 0.3 s that importing alembic costs.

    from alembic import command
    from alembic.config import Config
    from alembic.util.exc import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    with _without_foreign_keys(engine) as connection:
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise Unavailable(
                f"the database can't be brought to revision {HEAD}: {error}",
                hint="It was last used by a newer version of ERA; start that version instead.",
            ) from error


@contextmanager
def _without_foreign_keys(engine: Engine) -> Iterator[Connection]:
    """A connection in a transaction. On SQLite foreign keys are off in it and checked at its end: there a table may
    have to be recreated to be changed, and dropping the old one would delete all rows that refer to it."""
    with engine.connect() as connection:
        if engine.dialect.name != "sqlite":
            with connection.begin():
                begin_migration(connection)
                yield connection
            return
        pragma = connection.connection.cursor()  # The driver's own: it begins no transaction.
        pragma.execute("PRAGMA foreign_keys = OFF")
        try:
            with connection.begin():
                yield connection
                if broken := connection.exec_driver_sql("PRAGMA foreign_key_check").all():
                    raise Unavailable(f"the database's rows do not fit together: {broken[0][0]} lacks {broken[0][2]}")
        finally:
            pragma.execute("PRAGMA foreign_keys = ON")
            pragma.close()


def _revision(engine: Engine) -> str | None:
    """The revision of the database; None for a new one."""
    with engine.begin() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
