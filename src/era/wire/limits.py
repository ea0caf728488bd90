"""Limits, isolation and egress: fields that several bodies have, and how they are shown."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, FailFast, Field

from era.core.allowlist import MAX_ENTRIES
from era.core.limits import LEAST
from era.wire.base import Body


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
