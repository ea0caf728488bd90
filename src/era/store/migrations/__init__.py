"""Migrations of the schema, by alembic: shipped with the package and applied at every start."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, Engine, Select, String, column, inspect, select, table

from era.errors import NotReady, Unavailable
from era.store.engine.dialects import begin_migration

HEAD = "v001"
"""The newest revision; a test compares it with the files in versions/."""

MOVE = "`scripts/move-data OLD_CHECKOUT OLD_DATA NEW_DATA`"
"""The command that moves the data of a checkout from before `v001`, whose revisions were numbers."""

_REVISION: Select[str] = select(column("version_num", String)).select_from(table("alembic_version"))


def upgrade(engine: Engine) -> None:
    """Bring the database to `HEAD` in one transaction. Raises NotReady for a database of a checkout from before `v001`,
    Unavailable for one that a newer ERA has migrated. Neither changes anything."""
    with engine.begin() as connection:
        revision = revision_of(connection)
    if revision == HEAD:
        return  # The usual start, without the 0.3 s that importing alembic costs.
    refuse_old(revision)

    from alembic import command
    from alembic.config import Config
    from alembic.util.exc import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    with engine.begin() as connection:
        begin_migration(connection)
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise Unavailable(
                f"the database can't be brought to revision {HEAD}: {error}",
                hint="It was last used by a newer version of ERA; start that version instead.",
            ) from error


def check_revision(connection: Connection) -> None:
    """See to it that the database isn't migrated until this transaction ends. For a host that joins. Raises Unavailable
    where it was since this process opened it."""
    if (revision := connection.execute(_REVISION.with_for_update(read=True)).scalar()) != HEAD:
        raise Unavailable(
            f"the database was brought to revision {revision} while this host started",
            hint="A newer version of ERA uses it; start that version instead.",
        )


def revision_of(connection: Connection) -> str | None:
    """The revision of a database; None for a new one."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(_REVISION).scalar()


def refuse_old(revision: str | None) -> None:
    """Raises NotReady for the revision of a checkout from before `v001`."""
    if revision is not None and revision.isdigit():
        raise NotReady(f"The data is of an older checkout of ERA: move it into a new data directory with {MOVE}.")
