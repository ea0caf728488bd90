"""The schema's history, shipped with the package and applied at every start."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Engine, inspect, text

from era.errors import Unavailable

HEAD = "0001"
"""The newest revision; a test holds it against the files beside."""


def upgrade(engine: Engine) -> None:
    """Bring the database to `HEAD` in one transaction. Raises Unavailable where a newer ERA has been at it."""
    if _revision(engine) == HEAD:
        return  # The usual start, without the 0.3 s that importing alembic costs.

    from alembic import command
    from alembic.config import Config
    from alembic.util.exc import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise Unavailable(
                f"the database can't be brought to revision {HEAD}: {error}",
                hint="It was last used by a newer version of ERA; start that version instead.",
            ) from error


def _revision(engine: Engine) -> str | None:
    with engine.begin() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
