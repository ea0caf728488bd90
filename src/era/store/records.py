"""Run records as rows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from sqlalchemy import select

from era.core.models import RunRecord
from era.store.tables import runs

RUN_FIELDS = tuple(field.name for field in fields(RunRecord))
RUNS = select(*(runs.c[name] for name in RUN_FIELDS))
"""Runs, as `record_of` reads them."""


def record_of(row: Iterable[Any]) -> RunRecord:
    """A row of `RUNS`."""
    values = dict(zip(RUN_FIELDS, row, strict=True))
    for name in ("enforced", "egress", "artifacts"):
        values[name] = json.loads(values[name])
    return RunRecord(**values)


def finished(record: RunRecord) -> dict[str, Any]:
    """A record as values for the statement that ends a run."""
    return {
        "run_id": record.id,
        "new_status": record.status,
        "new_started_at": record.started_at,
        "new_ended_at": record.ended_at,
        "new_exit_code": record.exit_code,
        "new_duration_us": record.duration_us,
        "new_stdout_bytes": record.stdout_bytes,
        "new_stderr_bytes": record.stderr_bytes,
        "new_stdout_truncated": record.stdout_truncated,
        "new_stderr_truncated": record.stderr_truncated,
        "new_committed": record.committed,
        "new_reason": record.reason,
        "new_version": record.version,
        "new_peak_memory_bytes": record.peak_memory_bytes,
        "new_cpu_us": record.cpu_us,
        "new_reaped": record.reaped,
        "new_enforced": json.dumps(record.enforced),
        "new_egress": json.dumps(record.egress),
        "new_artifacts": json.dumps(record.artifacts),
    }
