"""The files of a session."""

from __future__ import annotations

import base64
import binascii
import mimetypes
import os
import re
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from era.api.context import Answer, Context, SessionId, StrictRoute, UseContext, errors
from era.api.ranges import wanted_range
from era.core.files.paths import Parts, from_url
from era.core.files.session_files import ANY, Condition, OpenFile
from era.core.files.spool import bounded
from era.core.files.trees import raw
from era.core.models import OwnedId
from era.errors import BadRequest
from era.wire.files import FileAnswer, FileDeletedAnswer, FilesAnswer, files_answer

router = APIRouter(prefix="/api/sessions/{session_id}", tags=["files"], route_class=StrictRoute)

_TYPES = mimetypes.MimeTypes().types_map[True] | {
    ".bz2": "application/x-bzip2",
    ".gz": "application/gzip",
    ".tgz": "application/gzip",
    ".xz": "application/x-xz",
    ".zst": "application/zstd",
}
"""Python's own table: what a type is doesn't depend on the machine."""

_IN_URL = re.compile(rb"/api/sessions/[^/]+/files/(.*)", re.DOTALL)
_TAG = re.compile(r'\s*(W/)?"([^"]*)"\s*(?:,|$)')

# A session's file is whatever its program or its client says. A browser that is led to it must neither show it as a
# page of this server nor let another site's page have it.
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


class _Rest(Convertor[str]):
    """All that is left of a path, whatever is in it: Starlette's own stops at a newline."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("rest", _Rest())


async def existing_path(request: Request) -> Parts:  # not async, it would take a hop through a thread
    """The path of a file as it stands in the URL, decoded once and by us. Raises BadRequest."""
    found = _IN_URL.fullmatch(request.scope["raw_path"])
    if found is None:
        raise BadRequest("The slashes of this URL are escaped.", hint="Write '/' as it is.", code="bad_path")
    return from_url(found[1])


Path = Annotated[Parts, Depends(existing_path)]


@router.get("/files", responses={200: {"model": FilesAnswer}, **errors(404)})
async def list_files(
    session_id: SessionId,
    context: UseContext,
    limit: Annotated[int, Query(ge=1, le=1000, description="Files a page.")] = 1000,
    cursor: Annotated[str | None, Query(max_length=1 << 16, description="`next_cursor` of the page before.")] = None,
    prefix: Annotated[str, Query(max_length=4096, description="Only paths that begin with this.")] = "",
) -> Response:
    """List files in the order of their paths. The totals are those of the whole session."""
    page = await context.session_files.page(
        session_id, limit=limit, after=_path_of(cursor) if cursor else (), prefix=tuple(prefix.split("/"))
    )
    following = _cursor_of(page.files[-1].path) if page.more else None
    return Answer(
        {
            "files": files_answer(page.files),
            "count": len(page.files),
            "total_count": page.session.snapshot.file_count,
            "total_size_bytes": page.session.snapshot.total_bytes,
            "next_cursor": following,
        }
    )


@router.put(
    "/files/{path:rest}",
    responses={200: {"model": FileAnswer}, **errors(404, 408, 409, 412, 413, 429)},
    openapi_extra=BYTES,
)
async def put_file(session_id: SessionId, path: Path, request: Request, context: UseContext) -> Response:
    """Put a file: the body as it is. Waits for the run under way."""
    body = body_of(session_id, request, context)
    upload = await context.session_files.put(session_id, path, body, _condition(request))
    return Answer({"path": "/".join(path), "size": upload.size}, headers={"ETag": f'"{upload.digest}"'})


@router.head("/files/{path:rest}", include_in_schema=False)
@router.get(
    "/files/{path:rest}",
    responses={
        200: {"content": {"application/octet-stream": {}}, "description": "The file, or a part of it as 206."},
        **errors(404, 409, 416),
    },
    response_class=StreamingResponse,
)
async def get_file(session_id: SessionId, path: Path, request: Request, context: UseContext) -> Response:
    """Get a file as it was when the last run or change was committed."""
    file = await context.session_files.open(session_id, path)
    try:
        return _content(file, path, request)
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
) -> Response:
    """Delete a file or link, or a directory. Waits for the run under way."""
    await context.session_files.delete(session_id, path, recursive=recursive, condition=_condition(request))
    return Answer({"success": True, "path": "/".join(path)})


async def body_of(session_id: OwnedId, request: Request, context: Context) -> AsyncIterator[bytes]:
    """The body as it comes. Raises TooLarge where it is over its bound, also where it only says so."""
    check = await context.session_files.size_check(session_id)
    declared = request.headers.get("content-length", "0")
    check(int(declared) if declared.isdigit() else 0)
    try:
        async for piece in bounded(request.stream(), check):
            yield piece
    except ClientDisconnect:
        raise BadRequest("The body ended before it was complete.") from None


def _content(file: OpenFile, path: Parts, request: Request) -> Response:
    etag = f'"{file.digest}"'
    headers = {**SAFE, "ETag": etag, "Accept-Ranges": "bytes", **_last_modified(file.mtime_ns)}
    known = _tags(request, "if-none-match")
    if known is not None and known & {ANY, file.digest}:
        file.close()
        return Response(status_code=304, headers=headers)
    is_same = request.headers.get("if-range", etag) == etag
    part = wanted_range(request.headers.get("range") if is_same else None, file.size)
    start, end = part or (0, file.size)
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
    headers["Content-Length"] = str(end - start)
    headers["Content-Type"] = _type(path[-1])
    headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{quote(path[-1], safe='')}"
    status = 200 if part is None else 206
    if request.method == "HEAD":
        file.close()
        return Response(status_code=status, headers=headers)
    return _Closing(file.pieces(start, end), file.close, status_code=status, headers=headers)


def _condition(request: Request) -> Condition:
    return Condition(_tags(request, "if-match", strong=True), _tags(request, "if-none-match"))


def _tags(request: Request, name: str, *, strong: bool = False) -> frozenset[str] | None:
    """The entity tags of a header, or ANY; None without the header. Weak ones don't count where `strong`.

    Raises BadRequest.
    """
    given = ",".join(request.headers.getlist(name)).strip()
    if not given:
        return None
    if given == ANY:
        return frozenset({ANY})
    found, at = set(), 0
    while at < len(given):
        tag = _TAG.match(given, at)
        if tag is None:
            raise BadRequest(
                f"The header '{name}' is not a list of entity tags.", hint='Send an ETag as it came, in its "".'
            )
        if not (strong and tag[1]):
            found.add(tag[2])
        at = tag.end()
    return frozenset(found)


def _type(name: str) -> str:
    """What a file's name says of its content."""
    suffix = os.path.splitext(name)[1].lower()
    return _TYPES.get(suffix, "application/octet-stream")


def _last_modified(mtime_ns: int) -> dict[str, str]:
    try:
        moment = datetime.fromtimestamp(mtime_ns // 1_000_000_000, UTC)
    except (ValueError, OverflowError, OSError):
        return {}  # Programs may give their files any time there is.
    return {"Last-Modified": format_datetime(moment, usegmt=True)}


def _cursor_of(path: str) -> str:
    return base64.urlsafe_b64encode(raw(path)).decode().rstrip("=")


def _path_of(cursor: str) -> Parts:
    try:
        path = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        raise BadRequest(
            "'cursor' is not one of ours.", hint="Use the next_cursor of the page before, or none."
        ) from None
    return tuple(path.decode("utf-8", "surrogateescape").split("/"))


class _Closing(StreamingResponse):
    """Streams, and closes what it streams from whether it came to that or not."""

    def __init__(self, pieces: AsyncIterator[bytes], close: Callable[[], None], **options: Any) -> None:
        super().__init__(pieces, **options)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()
