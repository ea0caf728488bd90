"""Routes of a session's whole tree of files, as an archive."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from era.api.context import Answer, Number, SessionId, StrictRoute, UseContext, errors
from era.api.files import SAFE, Wait, body_of
from era.api.streaming import ClosingResponse
from era.core.files.session_files import PATIENCE
from era.core.files.unpack import Format
from era.wire.base import dropped_answer
from era.wire.files import ArchiveAnswer

router = APIRouter(prefix="/api/sessions/{session_id}", tags=["files"], route_class=StrictRoute)

_TYPES: dict[Format, str] = {"tar": "application/x-tar", "tar.gz": "application/gzip", "zip": "application/zip"}
_FORMAT_OF_TYPE: dict[str, Format] = {
    **{media_type: form for form, media_type in _TYPES.items()},
    "application/tar": "tar",
    "application/x-gzip": "tar.gz",
    "application/x-gtar-compressed": "tar.gz",
    "application/x-zip-compressed": "zip",
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            name: {"schema": {"type": "string", "format": "binary"}}
            # Generated clients that can't tell these apart send the last, by which the server looks for itself.
            for name in (*_TYPES.values(), "application/octet-stream")
        },
    }
}


_ARCHIVE: dict[int | str, dict[str, Any]] = {
    200: {"content": {name: {} for name in _TYPES.values()}, "description": "The archive."},
    **errors(404, 409),
}
WantedFormat = Annotated[Literal["tar", "tar.gz", "zip"], Query(alias="format", description="What kind of archive.")]


@router.get("/archive", responses=_ARCHIVE, response_class=StreamingResponse)
async def get_archive(session_id: SessionId, context: UseContext, form: WantedFormat = "tar") -> Response:
    """Download all files, directories and links; of a live session as they are now, of which it makes a checkpoint."""
    await context.files.keep(session_id)
    return _archive_response(await context.archives.get(session_id, form), str(session_id), form)


@router.get("/versions/{number}/archive", responses=_ARCHIVE, response_class=StreamingResponse, tags=["versions"])
async def get_archive_of_version(
    session_id: SessionId, number: Number, context: UseContext, form: WantedFormat = "tar"
) -> Response:
    """Download all files, directories and links of a version."""
    pieces = await context.archives.get(session_id, form, number)
    return _archive_response(pieces, f"{session_id}-{number}", form)


def _archive_response(pieces: AsyncIterator[bytes], name: str, form: Format) -> Response:
    """An archive to be saved under this name."""
    headers = {
        **SAFE,
        "Content-Type": _TYPES[form],
        "Content-Disposition": f'attachment; filename="{name}.{form}"',
    }
    return ClosingResponse(pieces, headers=headers)


@router.put(
    "/archive",
    responses={200: {"model": ArchiveAnswer}, **errors(404, 408, 409, 413, 429)},
    openapi_extra=_BODY,
)
async def put_archive(
    session_id: SessionId,
    request: Request,
    context: UseContext,
    replace: Annotated[bool, Query(description="Remove everything that isn't in the archive.")] = False,
    wait: Wait = True,
) -> Response:
    """Add the content of a tar, tar.gz or zip archive, all or nothing. Waits for the run under way."""
    if wait or not context.turns.taken(session_id):
        await context.live_sessions.put_away_if_ended(session_id)
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    count, session, dropped = await context.archives.put(
        session_id,
        body_of(request, context),
        _FORMAT_OF_TYPE.get(media_type),
        replace=replace,
        patience=PATIENCE if wait else 0,
    )
    return Answer(
        {
            "success": True,
            "count": count,
            "total_count": session.snapshot.file_count,
            "total_size_bytes": session.snapshot.total_bytes,
            **dropped_answer(dropped),
        }
    )
