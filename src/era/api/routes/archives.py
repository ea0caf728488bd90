"""Routes of archives: a session's whole tree of files, or the whole session as a capsule."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from era.api.protocol.answers import Answer
from era.api.routes.files import SAFE, Wait, body_of
from era.api.routing.context import (
    CallerId,
    Number,
    SessionId,
    StrictRoute,
    UseContext,
    caller_of,
    errors,
    session_view,
)
from era.api.routing.streaming import ClosingResponse
from era.core.files.session_files import PATIENCE
from era.core.trees.unpack import Format
from era.errors import BadRequest
from era.wire.base import dropped_answer
from era.wire.files import ArchiveAnswer
from era.wire.sessions import SESSION_ID, SessionAnswer

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


capsules = APIRouter(prefix="/api/sessions", tags=["capsules"], route_class=StrictRoute)

IMPORT_PATH = "/api/sessions/import"
_TAR = "application/x-tar"
# A page of another site may send a body without a type or with a form's type unasked; these need a CORS preflight.
_TAR_TYPES = ("application/octet-stream", _TAR, "application/tar")
_TAR_BODY = {"schema": {"type": "string", "format": "binary"}}


@capsules.get(
    "/{session_id}/capsule",
    responses={200: {"content": {_TAR: _TAR_BODY}}, **errors(404, 410, 413)},
    response_class=Response,
)
async def export_session(
    session_id: SessionId,
    context: UseContext,
    versions: Annotated[
        Literal["all", "current"], Query(description="`current` leaves out older versions and the records of runs.")
    ] = "all",
) -> Response:
    """Download a session with everything that belongs to it, as one archive (a capsule)."""
    export = await context.capsules.open(session_id, history=versions == "all")
    headers = {
        "Content-Length": str(export.size),
        "Content-Disposition": f'attachment; filename="{export.session_id}.era.tar"',
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }
    return ClosingResponse(export.chunks(), export.close, media_type=_TAR, headers=headers)


@capsules.post(
    "/import",
    status_code=201,
    responses={201: {"model": SessionAnswer}, **errors(408, 409, 413)},
    openapi_extra={"requestBody": {"required": True, "content": dict.fromkeys(_TAR_TYPES[:2], _TAR_BODY)}},
)
async def import_session(
    request: Request,
    caller: CallerId,
    context: UseContext,
    new_id: Annotated[str | None, Query(alias="id", pattern=SESSION_ID, description="Left out: the id it had.")] = None,
    public: Annotated[
        bool, Query(description="Leave it open to anybody by its public URL if it was so where the capsule was made.")
    ] = False,
) -> Response:
    """Make a session from a capsule, all of it or nothing. Without `public=true` it isn't public."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in _TAR_TYPES:
        raise BadRequest("The body must be a capsule.", hint=f"Send it with the header 'Content-Type: {_TAR}'.")
    session = await context.capsules.load(request.stream(), caller, new_id, public=public)
    details = {"public": session.allow_public, "how": "import"}
    await context.audit.record(caller_of(request), "session.create", session.id, **details)
    return Answer(session_view(session, context), 201)
