"""What all bodies and answers share: strict request models, the shape of an error, output as text."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from era.few_errors import FewErrors


class Body(FewErrors):
    """A request body: types are not converted, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    may_be_empty: ClassVar[bool] = False
    """Whether no body at all is as good as an object without fields."""


class ErrorAnswer(BaseModel):
    error: str = Field(description="What is wrong, in a sentence.", examples=["There is no session 'demo'."])
    code: str = Field(description="For programs: it stays the same.", examples=["not_found"])
    hint: str = Field(description="What to do.", examples=["GET /api/sessions lists the sessions there are."])
    request_id: str = Field(
        description="Names the request, also in the server's log.", examples=["req_5f1d7a84b86b5f0e"]
    )
    details: Any = Field(None, description="More for programs, where there is more.")


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
