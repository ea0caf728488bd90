"""Rows of what runs wrote."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, select

from era.core.metadata import Retention
from era.core.models import KeptOutputs
from era.store.commits import Commits
from era.store.tables import outputs, runs

COLUMNS = ("stdout", "stderr", "stdout_digest", "stderr_digest")

_NEW = insert(outputs).values({column.name: bindparam(f"new_{column.name}") for column in outputs.c}).inline()
FIRST_TOO_OLD = (
    select(runs.c.key)
    .where(runs.c.session_key == bindparam("session"))
    .order_by(runs.c.key.desc())
    .limit(1)
    .offset(bindparam("kept"))
    .scalar_subquery()
)
"""The newest run of a session that isn't among its newest `:kept`."""

_PRUNE = delete(outputs).where(outputs.c.session_key == bindparam("session"), outputs.c.run_key <= FIRST_TOO_OLD)
_ONE = select(*(outputs.c[name] for name in COLUMNS)).where(
    outputs.c.session_key == bindparam("session"), outputs.c.run_key == bindparam("run")
)


class OutputRows(Commits):
    """The part of SqlStore that deals in outputs."""

    def __init__(self, url: str, retention: Retention = Retention()) -> None:  # noqa: B008 - it is frozen
        super().__init__(url, retention)
        self._new_outputs = self._prepared(_NEW)
        self._prune_outputs = self._prepared(_PRUNE)

    def _keep_outputs(self, connection: Connection, session_key: int, run_key: int, kept: KeptOutputs | None) -> None:
        """Keep what a run wrote, if anything, and drop that of the run which is one too many now."""
        if kept is None or not self._retention.outputs:
            return
        self._add_outputs(connection, session_key, run_key, kept)
        self._prune_outputs.count(connection, {"session": session_key, "kept": self._retention.outputs})

    def _add_outputs(self, connection: Connection, session_key: int, run_key: int, kept: KeptOutputs | None) -> None:
        if kept is not None and kept != NOTHING:
            values = {"new_session_key": session_key, "new_run_key": run_key, **output_values(kept, "new_")}
            self._new_outputs.count(connection, values)

    def _outputs_of(self, connection: Connection, session_key: int, run_key: int) -> KeptOutputs | None:
        row = connection.execute(_ONE, {"session": session_key, "run": run_key}).one_or_none()
        return None if row is None else KeptOutputs(*row)


NOTHING = KeptOutputs(b"", b"")


def output_values(kept: KeptOutputs, prefix: str = "") -> dict[str, Any]:
    return {f"{prefix}{name}": getattr(kept, name) for name in COLUMNS}
