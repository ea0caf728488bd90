"""Files of a session, as answers show them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, Field

from era.core.files.edits import FileEntry
from era.core.models import timestamp
from era.wire.base import VERSIONS_DROPPED

_FIRST, _LAST = -62_135_596_800_000_000, 253_402_300_799_000_000
"""The times that RFC 3339 can express (years 1 to 9999), in microseconds since 1970. Programs may set a file's time to
anything."""


class FileAnswer(BaseModel):
    path: str
    size: int


class FileWrittenAnswer(FileAnswer):
    versions_dropped: int = VERSIONS_DROPPED


class ListedFile(BaseModel):
    path: str
    size: int
    modified_at: str
    uploaded: bool
    etag: str | None = Field(description="SHA-256 of the content, as in its `ETag`; null for a link.")


class FilesAnswer(BaseModel):
    files: list[ListedFile]
    count: int
    total_count: int
    total_size_bytes: int
    next_cursor: str | None


class FileDeletedAnswer(BaseModel):
    success: bool
    path: str
    versions_dropped: int = VERSIONS_DROPPED


class ArchiveAnswer(BaseModel):
    success: bool
    count: int
    total_count: int
    total_size_bytes: int
    versions_dropped: int = VERSIONS_DROPPED


def files_answer(files: Iterable[FileEntry]) -> list[dict[str, Any]]:
    return [
        {
            "path": path_text(file.path),
            "size": file.size,
            "modified_at": timestamp(min(max(file.mtime_ns // 1000, _FIRST), _LAST)),
            "uploaded": file.uploaded,
            "etag": file.digest,
        }
        for file in files
    ]


def path_text(path: str) -> str:
    """A path as text; bytes that aren't UTF-8 become U+FFFD."""
    return path.encode(errors="surrogateescape").decode(errors="replace")
