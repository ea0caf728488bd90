"""The audit log, as it is shown."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from era.core.audit import Action, AuditEntry
from era.core.models import timestamp


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
