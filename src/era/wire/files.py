"""Answers about a session's files, and the events of a watch of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from era.core.files.links import MAX_SECONDS, Method
from era.core.models import timestamp
from era.core.trees.edits import FileEntry, Kind
from era.wire.base import VERSIONS_DROPPED, Body, ErrorEvent, GapEvent

MODE = "^0?[0-7]{3}$"
"""Permissions of a file or directory in octal digits. Setuid and the like aren't kept."""

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
    type: Kind
    size: int = Field(description="In bytes; of a link that of its target's path, of a directory 0.")
    mode: str | None = Field(
        description="Permissions in octal digits; null for a link, and for the working directory itself.",
        examples=["0644"],
    )
    modified_at: str | None = Field(description="Null for a directory.")
    uploaded: bool
    etag: str | None = Field(
        description="SHA-256 of the content, as in its `ETag`; null for what is no file, and for large ones while live."
    )
    link: str | None = Field(description="Where a link points to.")


class FilesAnswer(BaseModel):
    files: list[ListedFile]
    count: int
    total_count: int
    total_size_bytes: int
    next_cursor: str | None


class MoveBody(Body):
    source: str = Field(alias="from", description="The path of a file, link or directory.", examples=["draft.txt"])
    to: str = Field(description="Its new path. Directories on the way to it are made.", examples=["out/final.txt"])
    replace: bool = Field(False, description="Replace a file or link that is there.")


class MovedAnswer(BaseModel):
    success: bool
    source: str = Field(alias="from")
    to: str
    versions_dropped: int = VERSIONS_DROPPED


class DirectoryBody(Body):
    path: str = Field(description="Directories on the way to it are made, too.", examples=["out/plots"])
    mode: str | None = Field(None, pattern=MODE, description="Permissions in octal digits.", examples=["0755"])


class DirectoryMadeAnswer(BaseModel):
    success: bool
    path: str
    created: bool = Field(description="False where it was there already.")
    versions_dropped: int = VERSIONS_DROPPED


class LinkBody(Body):
    path: str = Field(description="The path of the file.", examples=["out/report.pdf"])
    method: Method = Field("GET", description="What the link is for: `GET` to read, `PUT` to write.")
    expires_in: float = Field(3600, gt=0, le=MAX_SECONDS, allow_inf_nan=False, description="Seconds.")
    max_bytes: int | None = Field(
        None,
        ge=0,
        le=1 << 62,
        description="Size of the largest file that may be put; else what the session may hold.",
    )


class LinkAnswer(BaseModel):
    url: str = Field(description="Needs no key: whoever has it may use it.")
    path: str
    method: Method
    expires_at: str


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
            "type": file.kind,
            "size": file.size,
            "mode": None if file.mode is None else f"{file.mode:04o}",
            "modified_at": None if file.mtime_ns is None else _time(file.mtime_ns),
            "uploaded": file.uploaded,
            "etag": file.digest,
            "link": None if file.target is None else path_text(file.target),
        }
        for file in files
    ]


def _time(mtime_ns: int) -> str:
    return timestamp(min(max(mtime_ns // 1000, _FIRST), _LAST))


def mode_of(digits: str | None) -> int | None:
    """Permission bits from octal digits that match MODE."""
    return None if digits is None else int(digits, 8)


def path_text(path: str) -> str:
    """A path as text; bytes that aren't UTF-8 become U+FFFD."""
    return path.encode(errors="surrogateescape").decode(errors="replace")


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
