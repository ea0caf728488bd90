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


class ShownEvent(BaseModel):
    """Something that a cell shows, by MIME type."""

    data: dict[str, Any] = Field(description="The value by MIME type; what is not text as Base64.")
    metadata: dict[str, Any]


class DisplayEvent(ShownEvent):
    """The cell shows something."""

    type: Literal["display"]
    display_id: str | None = Field(None, description="Names it for `update_display`; left out where it has no name.")


class UpdateDisplayEvent(ShownEvent):
    """The cell replaces what it shows under a `display_id`."""

    type: Literal["update_display"]
    display_id: str


class ResultEvent(ShownEvent):
    """The value of the cell's last expression."""

    type: Literal["result"]
    execution_count: int | None


class ClearOutputEvent(BaseModel):
    """The cell takes back all that it has shown and written so far."""

    type: Literal["clear_output"]
    wait: bool = Field(description="Take it back only when the cell shows or writes something new.")


class CellErrorEvent(BaseModel):
    """The error that the cell ends with."""

    type: Literal["cell_error"]
    name: str
    value: str
    traceback: str = Field(description="As text. stderr has it, too.")


CellEvents = DisplayEvent | UpdateDisplayEvent | ResultEvent | ClearOutputEvent | CellErrorEvent


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
