"""Files of a session, as clients see them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, Field

from era.core.files.edits import Listed
from era.core.models import timestamp

_FIRST, _LAST = -62_135_596_800_000_000, 253_402_300_799_000_000
"""What RFC 3339 can tell of, in microseconds. Programs may give their files any time there is."""


class FileAnswer(BaseModel):
    path: str
    size: int


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


class ArchiveAnswer(BaseModel):
    success: bool
    count: int
    total_count: int
    total_size_bytes: int


def files_answer(files: Iterable[Listed]) -> list[dict[str, Any]]:
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
    """A path as text: bytes that are not UTF-8 show as U+FFFD."""
    return path.encode(errors="surrogateescape").decode(errors="replace")
