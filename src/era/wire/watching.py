"""The events of a watch of a session's files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from era.wire.base import ErrorEvent, GapEvent


class WatchingEvent(BaseModel):
    """The first event: what changes from now on is told."""

    type: Literal["watching"]
    path: str


class FileChangedEvent(BaseModel):
    type: Literal["create", "write", "remove", "chmod"]
    path: str


class FileRenamedEvent(BaseModel):
    type: Literal["rename"]
    path: str
    to: str


class OverflowEvent(BaseModel):
    """More has changed in a moment than could be told: list the files again."""

    type: Literal["overflow"]


FileWatchEvent = Annotated[
    WatchingEvent | FileChangedEvent | FileRenamedEvent | OverflowEvent | GapEvent | ErrorEvent,
    Field(discriminator="type"),
]
