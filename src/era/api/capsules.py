"""Routes that export a session as a capsule and import one."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from era.api.context import Answer, CallerId, SessionId, StrictRoute, UseContext, caller_of, errors, session_view
from era.api.streaming import ClosingResponse
from era.errors import BadRequest
from era.wire.sessions import SESSION_ID, SessionAnswer

router = APIRouter(prefix="/api/sessions", tags=["capsules"], route_class=StrictRoute)

IMPORT_PATH = "/api/sessions/import"
_TAR = "application/x-tar"
# A page of another site may send a body without a type or with a form's type unasked; these need a CORS preflight.
_TAR_TYPES = ("application/octet-stream", _TAR, "application/tar")
_TAR_BODY = {"schema": {"type": "string", "format": "binary"}}


@router.get(
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


@router.post(
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
