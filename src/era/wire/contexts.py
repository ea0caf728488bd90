"""Contexts: answers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from era.core.live.context import Context
from era.core.models import timestamp


class ContextAnswer(BaseModel):
    name: str
    language: str
    kernel: str = Field(description="The interpreter and its version.", examples=["IPython 9.18.1"])
    status: Literal["busy", "idle"] = Field(description="`busy` while a cell is under way.")
    execution_count: int = Field(description="How many cells it has executed.")
    memory_bytes: int | None = Field(description="What its interpreter had in memory after the last cell.")
    started_at: str


class ContextsAnswer(BaseModel):
    contexts: list[ContextAnswer]
    count: int


class ContextDeletedAnswer(BaseModel):
    success: bool
    name: str


class InterruptedAnswer(BaseModel):
    success: bool
    name: str
    interrupted: bool = Field(description="Whether a cell was under way.")


def context_answer(context: Context) -> dict[str, Any]:
    return {
        "name": context.name,
        "language": context.language,
        "kernel": context.kernel,
        "status": "busy" if context.busy else "idle",
        "execution_count": context.execution_count,
        "memory_bytes": context.memory_bytes,
        "started_at": timestamp(context.started_at),
    }
