"""Answers about usage by owner and day, and the audit log."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, Field

from era.core.models import timestamp
from era.core.owners.audit import Action, AuditEntry
from era.core.owners.usage import DAY_MICROS, DayOfUsage
from era.errors import BadRequest


class DayAnswer(BaseModel):
    owner: str
    day: str = Field(description="In UTC.", examples=["2026-01-31"])
    runs: int
    cpu_seconds: float = Field(description="Processor time of runs.")
    egress_bytes: int = Field(description="Sent to and received from the network by runs.")
    storage_bytes: int | None = Field(description="The most in storage (kv, r2, d1) that was measured that day.")
    disk_bytes: int | None = Field(description="The same of the files of sessions.")


class UsageAnswer(BaseModel):
    usage: list[DayAnswer]
    count: int


def day_answer(of: DayOfUsage) -> dict[str, Any]:
    return {
        "owner": of.owner,
        "day": datetime.fromtimestamp(of.day * DAY_MICROS / 1e6, UTC).date().isoformat(),
        "runs": of.runs,
        "cpu_seconds": of.cpu_us / 1e6,
        "egress_bytes": of.egress_bytes,
        "storage_bytes": of.storage_bytes,
        "disk_bytes": of.disk_bytes,
    }


def day_number(field: str, text: str) -> int:
    """The day, since 1970, of a date. Raises BadRequest, which names `field`."""
    try:
        parsed = datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        raise BadRequest(f"'{field}' is not a date.", hint="Write it as 2026-01-31.", code="invalid_field") from None
    return int(parsed.timestamp() * 1e6) // DAY_MICROS


class AuditEntryAnswer(BaseModel):
    id: str = Field(description="Of the entry.")
    at: str = Field(description="When it was done.")
    owner: str = Field(description="Whose key it was done with.")
    key: str | None = Field(description="The id of that key; `operator` for that of the server, null without one.")
    action: Action = Field(description="What was done.")
    target: str | None = Field(
        description="The session or key that it was done to; null for a run outside of any session."
    )
    request_id: str = Field(description="The request, as its answer and the server's log name it.")
    details: dict[str, Any] = Field(description="More, by action.")


class AuditAnswer(BaseModel):
    entries: list[AuditEntryAnswer]
    count: int
    next_cursor: str | None


def audit_answer(entry: AuditEntry) -> dict[str, Any]:
    return {
        "id": f"entry_{entry.key}",
        "at": timestamp(entry.at),
        "owner": entry.owner,
        "key": entry.key_id or None,
        "action": entry.action,
        "target": entry.target or None,
        "request_id": entry.request_id,
        "details": entry.details,
    }
