"""What an operator is shown of a server, as answers have it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, Field

from era.core.models import Finding, SettingInForce


class LimitAnswer(BaseModel):
    name: str = Field(
        description="Of the setting, and of which of its numbers.", examples=["ERA_MEMORY_MB", "ERA_QUOTAS sessions"]
    )
    value: float | None = Field(description="What holds, in the unit of `description`; null: nothing is set.")
    default: float | None = Field(description="What holds where nothing is set.")
    description: str


class FindingAnswer(BaseModel):
    about: str = Field(description="A language or a kind of sandbox.", examples=["python", "bubblewrap"])
    there: bool = Field(description="Whether this machine has it.")
    text: str = Field(examples=["system calls filtered"])
    remedy: str | None = Field(description="How to get what isn't there.")


class ServerAnswer(BaseModel):
    version: str
    at_a_time: dict[str, int] = Field(
        description="How many `runs` may work, and how many `sandboxes` sessions may have."
    )
    limits: list[LimitAnswer]
    findings: list[FindingAnswer]


def server_answer(
    version: str, at_a_time: Mapping[str, int], limits: Iterable[SettingInForce], findings: Iterable[Finding]
) -> dict[str, Any]:
    """What holds and what was found, as `ServerAnswer`."""
    return {
        "version": version,
        "at_a_time": dict(at_a_time),
        "limits": [asdict(limit) for limit in limits],
        "findings": [{**asdict(finding), "remedy": finding.remedy or None} for finding in findings],
    }
