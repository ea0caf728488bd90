"""Versions of a session and what changed between them: bodies and answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, Field

from era.core.models import Cause, Version, timestamp
from era.core.sessions.versions import MAX_NAME, NAME
from era.core.trees.diffs import DataChange, FileChange, Kind
from era.wire.base import Body
from era.wire.files import FileAnswer, path_text

MAX_VERSION = (1 << 63) - 1  # the largest integer of an SQL column


class RollbackBody(Body):
    version: int = Field(ge=1, le=MAX_VERSION, description="The version whose content becomes the newest again.")
    stop: bool = Field(
        default=False, description="End the session's processes and contexts first, as `POST …/stop` does."
    )


class NameBody(Body):
    name: str = Field(
        max_length=MAX_NAME, pattern=NAME, description="No other version of the session has it.", examples=["before"]
    )


class VersionHeader(BaseModel):
    version: int
    name: str | None
    created_at: str
    cause: Cause
    run_id: str | None
    file_count: int
    total_size_bytes: int


class VersionsAnswer(BaseModel):
    versions: list[VersionHeader]
    count: int
    next_cursor: str | None


class VersionAnswer(VersionHeader):
    data: dict[str, Any]
    files: list[dict[str, Any]] | None = None


class DataChangeAnswer(BaseModel):
    path: str
    op: Literal["add", "remove", "replace"]
    old: Any = None
    new: Any = None


class ChangedFileAnswer(FileAnswer):
    old_size: int


class FileChangesAnswer(BaseModel):
    added: list[FileAnswer]
    changed: list[ChangedFileAnswer]
    removed: list[FileAnswer]


class DiffAnswer(BaseModel):
    version: int
    data: list[DataChangeAnswer]
    files: FileChangesAnswer


class NameDeletedAnswer(BaseModel):
    success: bool
    version: int


def version_answer(version: Version) -> dict[str, Any]:
    """A version without its data and files."""
    return {
        "version": version.n,
        "name": version.name,
        "created_at": timestamp(version.created_at),
        "cause": version.cause,
        "run_id": version.run_id,
        "file_count": version.snapshot.file_count,
        "total_size_bytes": version.snapshot.total_bytes,
    }


def data_changes_answer(changes: Iterable[DataChange]) -> list[dict[str, Any]]:
    """Changes of the data; `old` and `new` are there where they exist."""
    return [
        {
            "path": change.path,
            "op": change.op,
            **({} if change.op == "add" else {"old": change.old}),
            **({} if change.op == "remove" else {"new": change.new}),
        }
        for change in changes
    ]


def file_changes_answer(kind: Kind, changes: Iterable[FileChange]) -> list[dict[str, Any]]:
    if kind == "changed":
        return [{"path": path_text(path), "size": size, "old_size": old} for path, old, size in changes]
    return [{"path": path_text(path), "size": size if kind == "added" else old} for path, old, size in changes]
