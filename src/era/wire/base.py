"""What all bodies and answers share: strict request models, the shape of an error, output as text."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Body(BaseModel):
    """A request body: types are not converted, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ErrorAnswer(BaseModel):
    error: str
    code: str
    hint: str
    request_id: str
    details: Any = None


def text(output: bytes) -> str:
    """Output as text; bytes that aren't UTF-8 become U+FFFD."""
    return output.decode(errors="replace")
