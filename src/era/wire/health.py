"""Whether the service works, as /health and /ready show it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class HealthAnswer(BaseModel):
    status: Literal["ok"]
    version: str
    languages: list[str] = Field(description="Those that this machine can run.")
    isolation: dict[str, Any] = Field(description="What sandboxes get here.")
    sandboxes: dict[str, int] = Field(description="How many there are, by use.")


class ReadyAnswer(BaseModel):
    status: Literal["ready"]
    sandboxes: dict[str, int] = Field(
        description="How many sessions may have a sandbox (`places`), have one (`taken`) and wait for one (`waiting`)."
    )
