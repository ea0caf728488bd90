"""Routes of a session's files, and of what changes in them."""

from __future__ import annotations

import mimetypes
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from email.utils import format_datetime
from functools import lru_cache
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from era.api.protocol.answers import Answer
from era.api.routing.context import (
    Context,
    Number,
    SessionId,
    StrictRoute,
    UseContext,
    cursor_of,
    errors,
    last_of,
    until_barred,
)
from era.api.routing.event_stream import After, Event, described, encoded, event_stream
from era.api.routing.streaming import ClosingResponse, requested_range
from era.core.concurrency.event_log import Gap
from era.core.files.current_files import LiveFile
from era.core.files.session_files import ANY, PATIENCE, Body, Condition, OpenFile
from era.core.files.watching import FileEvent
from era.core.models import OwnedId, Session
from era.core.trees.paths import ROOT, Parts, bad_path, from_url, parse_place
from era.core.trees.spool import bounded
from era.errors import BadRequest
from era.wire.base import dropped_answer
from era.wire.files import (
    MODE,
    DirectoryBody,
    DirectoryMadeAnswer,
    FileDeletedAnswer,
    FilesAnswer,
    FileWatchEvent,
    FileWrittenAnswer,
    ListedFile,
    MoveBody,
    MovedAnswer,
    files_answer,
    mode_of,
    path_text,
)

router = APIRouter(prefix="/api/sessions/{session_id}", tags=["files"], route_class=StrictRoute)

_TYPES = mimetypes.MimeTypes().types_map[True] | {
    ".bz2": "application/x-bzip2",
    ".gz": "application/gzip",
    ".tgz": "application/gzip",
    ".xz": "application/x-xz",
    ".zst": "application/zstd",
}
"""Python's built-in table and a few more, so that a file's type doesn't depend on the machine."""

_IN_URL = re.compile(rb"/api/sessions/[^/]+/(?:(?:versions/[^/]+/)?files|stat)/(.*)", re.DOTALL)
_TAG = re.compile(r'\s*(W/)?"([^"]*)"\s*(?:,|$)')

# A session's file may hold anything. A browser that opens one must not show it as a page of this server, and a page of
# another site must not be able to load it.
SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "sandbox; default-src 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "private, no-cache",
}
BYTES: dict[str, Any] = {
    "requestBody": {
        "required": False,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
FILE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {}}, "description": "The file, or a part of it as 206."},
    **errors(404, 409, 416),
}


async def path_in_url(request: Request) -> Parts:
    """The path of a file, decoded once from the raw URL. Raises BadRequest."""
    return _path_in_url(request)


async def place_in_url(request: Request) -> Parts:
    """The same for a path that may also be that of the working directory itself."""
    return _path_in_url(request, root=True)


def _path_in_url(request: Request, *, root: bool = False) -> Parts:
    match = _IN_URL.fullmatch(request.scope["raw_path"])
    if match is None:
        raise BadRequest("The slashes of this URL are escaped.", hint="Write '/' as it is.", code="bad_path")
    return from_url(match[1], root=root)


Path = Annotated[Parts, Depends(path_in_url)]
Place = Annotated[Parts, Depends(place_in_url)]


Wait = Annotated[
    bool,
    Query(description=f"`false` answers 409 at once if a run is under way; else that is waited for {PATIENCE:g} s."),
]
FilesLimit = Annotated[int, Query(ge=1, le=1000, description="Files per page.")]
FilesCursor = Annotated[str | None, Query(max_length=1 << 16, description="`next_cursor` of the page before.")]
Prefix = Annotated[str, Query(max_length=4096, description="Only paths that begin with this; empty or `.` for all.")]
Directories = Annotated[bool, Query(description="List directories, too. The totals never count them.")]
Mode = Annotated[
    str | None, Query(pattern=MODE, description="The file's permissions in octal digits; else it keeps those it has.")
]


@router.get("/files", responses={200: {"model": FilesAnswer}, **errors(404)})
async def list_files(
    session_id: SessionId,
    context: UseContext,
    limit: FilesLimit = 1000,
    cursor: FilesCursor = None,
    prefix: Prefix = "",
    directories: Directories = False,
) -> Response:
    """List files in the order of their paths, those of a live session as they are now. The totals count all files."""
    return await _files(context, session_id, None, limit, cursor, prefix, directories=directories)


@router.get("/versions/{number}/files", responses={200: {"model": FilesAnswer}, **errors(404)}, tags=["versions"])
async def list_files_of_version(
    session_id: SessionId,
    number: Number,
    context: UseContext,
    limit: FilesLimit = 1000,
    cursor: FilesCursor = None,
    prefix: Prefix = "",
    directories: Directories = False,
) -> Response:
    """List files of a version in the order of their paths. The totals count all files of the version."""
    return await _files(context, session_id, number, limit, cursor, prefix, directories=directories)


async def _files(
    context: Context,
    session_id: OwnedId,
    version: int | None,
    limit: int,
    cursor: str | None,
    prefix: str,
    *,
    directories: bool,
) -> Response:
    """A page of the files of a version, of the current one if it is None."""
    after = tuple(last_of(cursor, errors="surrogateescape").split("/")) if cursor else ()
    page = await context.files.page(
        session_id,
        limit=limit,
        after=after,
        prefix=() if prefix in ROOT else tuple(prefix.split("/")),
        directories=directories,
        version=version,
    )
    following = cursor_of(page.files[-1].path) if page.more else None
    return Answer(
        {
            "files": files_answer(page.files),
            "count": len(page.files),
            "total_count": page.snapshot.file_count,
            "total_size_bytes": page.snapshot.total_bytes,
            "next_cursor": following,
        }
    )


@router.put(
    "/files/{path:rest}",
    responses={200: {"model": FileWrittenAnswer}, **errors(404, 408, 409, 412, 413, 429)},
    openapi_extra=BYTES,
)
async def put_file(
    session_id: SessionId, path: Path, request: Request, context: UseContext, wait: Wait = True, mode: Mode = None
) -> Response:
    """Write a file: its content is the body. Waits for the run under way."""
    body = body_of(request, context)
    upload, dropped = await context.files.put(
        session_id, path, body, _condition(request), mode=mode_of(mode), patience=PATIENCE if wait else 0
    )
    answer = {"path": "/".join(path), "size": upload.size, **dropped_answer(dropped)}
    return Answer(answer, headers={"ETag": f'"{upload.digest}"'})


@router.head("/files/{path:rest}", include_in_schema=False)
@router.get("/files/{path:rest}", responses=FILE, response_class=StreamingResponse)
async def get_file(session_id: SessionId, path: Path, request: Request, context: UseContext) -> Response:
    """Download a file: of a live session as it is now, else as of the last commit."""
    return await _file(context, session_id, None, path, request)


@router.head("/versions/{number}/files/{path:rest}", include_in_schema=False)
@router.get("/versions/{number}/files/{path:rest}", responses=FILE, response_class=StreamingResponse, tags=["versions"])
async def get_file_of_version(
    session_id: SessionId, number: Number, path: Path, request: Request, context: UseContext
) -> Response:
    """Download a file as it was in a version."""
    return await _file(context, session_id, number, path, request)


async def _file(context: Context, session_id: OwnedId, version: int | None, path: Parts, request: Request) -> Response:
    """A file of a version, of the current one if it is None."""
    file = await context.files.open(session_id, path, version)
    try:
        return file_response(file, path, request)
    except BaseException:
        file.close()
        raise


@router.delete("/files/{path:rest}", responses={200: {"model": FileDeletedAnswer}, **errors(404, 409, 412, 429)})
async def delete_file(
    session_id: SessionId,
    path: Path,
    request: Request,
    context: UseContext,
    recursive: Annotated[bool, Query(description="Delete a directory with all that is in it.")] = False,
    wait: Wait = True,
) -> Response:
    """Delete a file or link, or a directory. Waits for the run under way."""
    dropped = await context.files.delete(
        session_id, path, recursive=recursive, condition=_condition(request), patience=PATIENCE if wait else 0
    )
    return Answer({"success": True, "path": "/".join(path), **dropped_answer(dropped)})


@router.get("/stat/{path:rest}", responses={200: {"model": ListedFile}, **errors(404, 409)})
async def stat_file(session_id: SessionId, path: Place, context: UseContext) -> Response:
    """Show what is at a path: a file, a link or a directory."""
    return Answer(files_answer([await context.files.stat(session_id, path)])[0])


@router.post("/move", responses={200: {"model": MovedAnswer}, **errors(404, 409, 413, 429)})
async def move_file(session_id: SessionId, body: MoveBody, context: UseContext, wait: Wait = True) -> Response:
    """Move a file, a link or a directory to another path. Waits for the run under way."""
    source, target = parse_place(body.source), parse_place(body.to)
    if not source or not target:
        raise bad_path(".", "is the working directory itself, which can't be moved or replaced")
    dropped = await context.files.move(
        session_id, source, target, replace=body.replace, patience=PATIENCE if wait else 0
    )
    return Answer({"success": True, "from": body.source, "to": body.to, **dropped_answer(dropped)})


@router.post("/mkdir", responses={200: {"model": DirectoryMadeAnswer}, **errors(404, 409, 413, 429)})
async def make_directory(
    session_id: SessionId, body: DirectoryBody, context: UseContext, wait: Wait = True
) -> Response:
    """Make a directory, and those on the way to it. Waits for the run under way."""
    created, dropped = await context.files.make_directory(
        session_id, parse_place(body.path), mode=mode_of(body.mode), patience=PATIENCE if wait else 0
    )
    return Answer({"success": True, "path": body.path, "created": created, **dropped_answer(dropped)})


def body_of(request: Request, context: Context, most: int | None = None) -> Body:
    """The request's body in pieces, as they arrive. Raises BadRequest for one that is a part of the whole (RFC 9110,
    14.5): stored as it is, it would replace what it belongs to.

    The pieces raise TooLarge beyond what the session may hold, or `most` bytes, at once where Content-Length says so;
    BadRequest where the client hangs up.
    """
    if "content-range" in request.headers:
        raise BadRequest(
            "The header Content-Range says that this is only a part.",
            hint="Send all of it, without that header: nothing can be put in parts.",
        )

    async def pieces(session: Session) -> AsyncIterator[bytes]:
        check = context.files.size_check(session, most)
        declared = request.headers.get("content-length", "0")
        check(int(declared) if declared.isdigit() else 0)
        try:
            async for piece in bounded(request.stream(), check):
                yield piece
        except ClientDisconnect:
            raise BadRequest("The body ended before it was complete.") from None

    return pieces


def file_response(file: OpenFile | LiveFile, path: Parts, request: Request) -> Response:
    """A file, a range of it (206), or 304 where the client has it. Takes over closing `file`, unless it raises."""
    etag = f'"{file.digest}"'
    headers = {**SAFE, "ETag": etag, "Accept-Ranges": "bytes", **_last_modified(file.mtime_ns)}
    known = _tags(request, "if-none-match")
    if known is not None and known & {ANY, file.digest}:
        file.close()
        return Response(status_code=304, headers=headers)
    is_same = request.headers.get("if-range", etag) == etag
    part = requested_range(request.headers.get("range") if is_same else None, file.size)
    start, end = part or (0, file.size)
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
    headers["Content-Length"] = str(end - start)
    headers["Content-Type"] = _media_type(path[-1])
    headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{quote(path[-1], safe='')}"
    status = 200 if part is None else 206
    if request.method == "HEAD":
        file.close()
        return Response(status_code=status, headers=headers)
    return ClosingResponse(file.pieces(start, end), file.close, status_code=status, headers=headers)


def _condition(request: Request) -> Condition:
    """The preconditions of a write: If-Match and If-None-Match."""
    return Condition(_tags(request, "if-match", strong=True), _tags(request, "if-none-match"))


def _tags(request: Request, name: str, *, strong: bool = False) -> frozenset[str] | None:
    """The entity tags of a header, or ANY; None without the header. With `strong`, weak tags (`W/"…"`) are ignored.

    Raises BadRequest for what is no list of tags (RFC 9110, 13.1).
    """
    header = ",".join(request.headers.getlist(name)).strip()
    if not header:
        return None
    if header == ANY:
        return frozenset({ANY})
    tags, at = set(), 0
    while at < len(header):
        tag = _TAG.match(header, at)
        if tag is None:
            raise BadRequest(
                f"The header '{name}' is not a list of entity tags.", hint='Send an ETag as it came, in its "".'
            )
        if not (strong and tag[1]):
            tags.add(tag[2])
        at = tag.end()
    return frozenset(tags)


def _media_type(name: str) -> str:
    """The media type of a file, by the ending of its name."""
    suffix = os.path.splitext(name)[1].lower()
    return _TYPES.get(suffix, "application/octet-stream")


def _last_modified(mtime_ns: int) -> dict[str, str]:
    """The Last-Modified header, none for a time that no date can express."""
    try:
        moment = datetime.fromtimestamp(mtime_ns // 1_000_000_000, UTC)
    except (ValueError, OverflowError, OSError):
        return {}  # programs may set a file's time to anything
    return {"Last-Modified": format_datetime(moment, usegmt=True)}


watching = APIRouter(prefix="/api/sessions/{session_id}", tags=["files"], route_class=StrictRoute)


@watching.get(
    "/watch",
    **described(
        "First `watching`, then `create`, `write`, `remove`, `rename`, `chmod`; `overflow` or `gap` for what was lost.",
        "FileWatchEvent",
        FileWatchEvent,
        404,
        409,
    ),
)
async def watch_files(
    session_id: SessionId,
    request: Request,
    context: UseContext,
    after: After,
    path: Annotated[str, Query(max_length=4096, description="A directory or file; empty or `.` for all.")] = "",
    recursive: Annotated[bool, Query(description="Also what is in directories below.")] = False,
) -> Response:
    """Follow what changes in a session's files, from now on, or from where a connection broke. Those of a session that
    isn't live are followed by its versions."""
    async with AsyncExitStack() as stack:
        watched = context.watching.watched(session_id, parse_place(path), recursive=recursive, after=after)
        items = await stack.enter_async_context(watched)
        kept = stack.pop_all()

    async def events() -> AsyncGenerator[bytes | Gap]:
        async with kept:
            async for piece in items:
                yield piece if isinstance(piece, Gap) else b"".join(_encoded(*numbered) for numbered in piece)

    made = events()
    return event_stream(_begun(await anext(made), made), barred=until_barred(context, request, "read"))


@lru_cache(1000)
def _encoded(number: int, event: FileEvent) -> bytes:
    """An event as it is sent, encoded once for all readers."""
    fields = {"path": event.path, "to": event.to}
    return encoded(Event(number, event.kind, {name: path_text(at) for name, at in fields.items() if at is not None}))


async def _begun(first: bytes | Gap, others: AsyncGenerator[bytes | Gap]) -> AsyncGenerator[bytes | Gap]:
    """All events. The others have begun by then, so that the watch ends also where nobody asks for the first."""
    try:
        yield first
        async for event in others:
            yield event
    finally:
        await others.aclose()
