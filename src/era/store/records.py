"""Conversion between rows and the models that several modules read: run records, versions, snapshots."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from sqlalchemy import case, func, select

from era.core.models import EMPTY, RunRecord, Snapshot
from era.store.engine.tables import runs

RUN_FIELDS = tuple(field.name for field in fields(RunRecord))
RUNS = select(*(runs.c[name] for name in RUN_FIELDS))
"""Runs, as `record_from_row` reads them."""

LISTED_CHARACTERS = 200
"""Characters of a run's code that lists of runs show, so that a page of a thousand runs stays small."""

_INVOCATION_CHARACTERS = 1000
"""Characters of JSON up to which lists of runs show a run's command or arguments; longer ones are left out."""

_shown = {
    # One character more shows that the code is longer.
    "code": func.substr(runs.c.code, 1, LISTED_CHARACTERS + 1),
    "invocation": case(
        (func.length(runs.c.invocation) <= _INVOCATION_CHARACTERS, runs.c.invocation), else_='{"truncated": true}'
    ),
}
LISTED_RUNS = select(*(_shown[name].label(name) if name in _shown else runs.c[name] for name in RUN_FIELDS))
"""Runs, as `listed_from_row` reads them."""


def record_from_row(row: Iterable[Any]) -> RunRecord:
    """Convert a row of `RUNS`."""
    values = dict(zip(RUN_FIELDS, row, strict=True))
    for name in ("enforced", "egress", "artifacts", "invocation"):
        values[name] = json.loads(values[name])
    return RunRecord(**values)


def listed_from_row(row: Iterable[Any]) -> RunRecord:
    """Convert a row of `LISTED_RUNS`, with its code cut to LISTED_CHARACTERS."""
    record = record_from_row(row)
    if record.code is None or len(record.code) <= LISTED_CHARACTERS:
        return record
    invocation = {**record.invocation, "truncated": True}
    return replace(record, code=record.code[:LISTED_CHARACTERS], invocation=invocation)


def without_nul(text: str | None) -> str | None:
    """Replace NUL characters, which PostgreSQL has in no text."""
    return text and text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def snapshot_from_row(root: str | None, file_count: int, total_bytes: int) -> Snapshot:
    """Convert the three columns of a version that describe its snapshot."""
    return EMPTY if root is None else Snapshot(root, file_count, total_bytes)
