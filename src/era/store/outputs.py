"""What runs wrote to stdout and stderr, and which blobs rows need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, delete, exists, func, insert, select, union

from era.core.metadata import Retention
from era.core.models import KeptOutputs
from era.store.engine.dialects import Asked, Precompiled
from era.store.engine.tables import idempotency_keys, outputs, runs, storage_items

OUTPUT_COLUMNS = (
    *("stdout", "stderr", "stdout_digest", "stderr_digest"),
    *("piece_order", "piece_order_digest", "cell", "cell_digest"),
)
"""The columns of KeptOutputs, in the order of its fields."""

_NOTHING = KeptOutputs(b"", b"")

NEWEST_TOO_OLD = (
    select(runs.c.key)
    .where(runs.c.session_key == bindparam("session"))
    .order_by(runs.c.key.desc())
    .limit(1)
    .offset(bindparam("kept"))
    .scalar_subquery()
)
"""The key of the newest run of a session that isn't among its newest `:kept`."""

_insert = Precompiled(
    insert(outputs).values({column.name: bindparam(f"new_{column.name}") for column in outputs.c}).inline()
)
_insert_of_run = Precompiled(
    insert(outputs).from_select(
        [column.name for column in outputs.c],
        select(
            *(
                runs.c.key if column.name == "run_key" else bindparam(f"new_{column.name}", type_=column.type)
                for column in outputs.c
            )
        ).where(
            runs.c.id == bindparam("of_run"),
            ~exists().where(outputs.c.session_key == runs.c.session_key, outputs.c.run_key == runs.c.key),
        ),
    )
)
"""Where they are there, the run has ended before. Whoever ends it again finds that out."""

_prune = Precompiled(
    delete(outputs).where(outputs.c.session_key == bindparam("session"), outputs.c.run_key <= NEWEST_TOO_OLD)
)
_sizes = (
    select(
        runs.c.key,
        func.sum(runs.c.stdout_bytes + runs.c.stderr_bytes).over(order_by=runs.c.key.desc()).label("bytes"),
    )
    .where(runs.c.session_key == bindparam("session"))
    .order_by(runs.c.key.desc())
    .limit(bindparam("kept"))
    .subquery()
)
_prune_bytes = Precompiled(
    delete(outputs).where(
        outputs.c.session_key == bindparam("session"),
        outputs.c.run_key
        <= select(func.max(_sizes.c.key)).where(_sizes.c.bytes > bindparam("most_bytes")).scalar_subquery(),
        outputs.c.run_key != select(runs.c.key).where(runs.c.id == bindparam("of_run")).scalar_subquery(),
    )
)
_OF_RUN = select(*(outputs.c[name] for name in OUTPUT_COLUMNS)).where(
    outputs.c.session_key == bindparam("session"), outputs.c.run_key == bindparam("run")
)
OUTPUT_DIGESTS = union(
    *(
        select(table.c[name]).where(table.c[name].is_not(None))
        for table in (outputs, idempotency_keys)
        for name in OUTPUT_COLUMNS
        if name.endswith("_digest")
    ),
    select(storage_items.c.digest).where(storage_items.c.digest.is_not(None)),
)
"""The digest of every blob that holds an output, an answer to an idempotency key, or a value of storage."""


def keeping_outputs(retention: Retention, session_key: int, run_id: str, kept: KeptOutputs | None) -> Sequence[Asked]:
    """The statements that keep what a run wrote, if anything, and drop what older runs wrote, beyond as many runs and
    bytes as retention says."""
    if kept is None or not retention.outputs:
        return ()
    which = {"session": session_key, "kept": retention.outputs}
    prunes: Sequence[Asked] = ((_prune, which),)
    if kept == _NOTHING:
        return prunes
    if kept.blob_bytes:  # others are small, and most runs have only those
        prunes = (*prunes, (_prune_bytes, which | {"of_run": run_id, "most_bytes": retention.output_bytes}))
    values = {"of_run": run_id, "new_session_key": session_key, **output_values(kept, "new_")}
    return (_insert_of_run, values), *prunes


def insert_outputs(connection: Connection, session_key: int, run_key: int, kept: KeptOutputs | None) -> None:
    """Insert the row of what a run wrote, unless it wrote nothing."""
    if kept is not None and kept != _NOTHING:
        values = {"new_session_key": session_key, "new_run_key": run_key, **output_values(kept, "new_")}
        _insert.execute(connection, values)


def outputs_of_run(connection: Connection, session_key: int, run_key: int) -> KeptOutputs | None:
    """What a run wrote; None where it wrote nothing or that is no longer kept."""
    row = connection.execute(_OF_RUN, {"session": session_key, "run": run_key}).one_or_none()
    return None if row is None else KeptOutputs(*row)


def output_values(kept: KeptOutputs, prefix: str = "") -> dict[str, Any]:
    """The values of `OUTPUT_COLUMNS`, by their names behind `prefix`."""
    return {f"{prefix}{name}": getattr(kept, name) for name in OUTPUT_COLUMNS}
