"""Parts that bodies and answers share: strict request models, errors, output as text, limits, isolation and egress."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field

from era.common.few_errors import FewErrors
from era.core.allowlist import MAX_ENTRIES
from era.core.limits import LEAST


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


class LimitsBody(Body):
    """A limit left out is the server's default. In a change, null brings the default back."""

    memory_mb: int | None = Field(None, ge=LEAST["memory_mb"], description="Memory, in MiB.")
    cpus: float | None = Field(None, ge=LEAST["cpus"], description="Processors.")
    pids: int | None = Field(None, ge=LEAST["pids"], description="Processes and threads at a time.")
    disk_mb: int | None = Field(None, ge=LEAST["disk_mb"], description="Size of all files, in MiB.")
    files: int | None = Field(None, ge=LEAST["files"], description="Files, directories and links.")
    output_bytes: int | None = Field(
        None, ge=1024, description="Bytes of stdout, and of stderr, that a run may answer."
    )


class EgressBody(Body):
    allow: Annotated[list[Annotated[str, Field(max_length=300)]], FailFast()] = Field(
        default_factory=list,
        max_length=MAX_ENTRIES,
        description="Hosts (api.example.com), all below one (*.example.com), addresses (203.0.113.0/24). An empty list "
        "allows the whole internet.",
    )


Egress = Annotated[EgressBody | None, Field(description="Where its programs may connect to.")]
Limits = Annotated[LimitsBody | None, Field(description="Limits of its own, up to the server's maxima.")]
Isolation = Annotated[
    Literal["auto", "gvisor", "bubblewrap"],
    Field(description="Which sandbox; `auto` is the server's choice. A run is refused where this server lacks it."),
]


class LimitsAnswer(BaseModel):
    memory_mb: int
    cpus: float
    pids: int
    disk_mb: int
    files: int
    output_bytes: int


class EgressAnswer(BaseModel):
    allow: list[str]


def requested_limits(limits: LimitsBody | None) -> dict[str, float | None]:
    """The limits that a body names; None takes an earlier one back."""
    return limits.model_dump(exclude_unset=True) if limits else {}
