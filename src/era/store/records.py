"""Conversion between rows and the models that several modules read: run records, versions, snapshots."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from sqlalchemy import select

from era.core.models import EMPTY, RunRecord, Snapshot
from era.store.tables import runs

RUN_FIELDS = tuple(field.name for field in fields(RunRecord))
RUNS = select(*(runs.c[name] for name in RUN_FIELDS))
"""Runs, as `record_from_row` reads them."""


def record_from_row(row: Iterable[Any]) -> RunRecord:
    """Convert a row of `RUNS`."""
    values = dict(zip(RUN_FIELDS, row, strict=True))
    for name in ("enforced", "egress", "artifacts"):
        values[name] = json.loads(values[name])
    return RunRecord(**values)


def snapshot_from_row(root: str | None, file_count: int, total_bytes: int) -> Snapshot:
    """Convert the three columns of a version that describe its snapshot."""
    return EMPTY if root is None else Snapshot(root, file_count, total_bytes)
