"""What all of the contract's bodies have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ErrorAnswer(BaseModel):
    error: str
    code: str
    hint: str
    request_id: str
    details: Any = None


def text(output: bytes) -> str:
    """Output as text: what is not UTF-8 shows as U+FFFD."""
    return output.decode(errors="replace")
