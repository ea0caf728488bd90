"""What all bodies and answers share: strict request models, the shape of an error, output as text."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field


class Body(BaseModel):
    """A request body: types are not converted, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    may_be_empty: ClassVar[bool] = False
    """Whether no body at all is as good as an object without fields."""


class ErrorAnswer(BaseModel):
    error: str
    code: str
    hint: str
    request_id: str
    details: Any = None


class GapEvent(BaseModel):
    """Says which events of a stream are not kept any more, by their numbers, both included."""

    type: Literal["gap"]
    first: int = Field(alias="from")
    to: int


class ErrorEvent(BaseModel):
    """Ends a stream whose end can't be told."""

    type: Literal["error"]
    error: str
    code: str
    hint: str = ""


def text(output: bytes) -> str:
    """Output as text; bytes that aren't UTF-8 become U+FFFD."""
    return output.decode(errors="replace")


VERSIONS_DROPPED: Any = Field(
    0, description="How many old versions the commit dropped to keep the history within its bound. Left out if none."
)


def dropped_answer(count: int) -> dict[str, int]:
    """The field of an answer that says how many versions a commit dropped, none where it dropped none."""
    return {"versions_dropped": count} if count else {}
