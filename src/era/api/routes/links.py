"""Routes of links: URLs by which whoever has them reads or writes one file, without a key."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import StreamingResponse

from era.api.protocol.addresses import called_url
from era.api.protocol.answers import Answer
from era.api.routes.files import BYTES, FILE, body_of, file_response
from era.api.routing.context import SessionId, StrictRoute, UseContext, caller_of, errors
from era.core.files.session_files import Condition
from era.core.models import timestamp
from era.core.trees.paths import parse
from era.wire.base import dropped_answer
from era.wire.files import FileWrittenAnswer, LinkAnswer, LinkBody

router = APIRouter(prefix="/api/sessions/{session_id}", tags=["files"], route_class=StrictRoute)
public = APIRouter(prefix="/links", tags=["files"], route_class=StrictRoute)

# The token is all that a caller shows, and no browser adds it by itself. So pages of any site may use a link.
_ANY_SITE = {"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": "ETag, Content-Range"}
_PREFLIGHT = {
    **_ANY_SITE,
    "Access-Control-Allow-Methods": "GET, HEAD, PUT",
    "Access-Control-Allow-Headers": "Content-Type, Range, If-None-Match, If-Range",
    "Access-Control-Max-Age": "600",
}

Token = Annotated[str, Path(description="Of the `url` of a link.")]


@router.post("/links", status_code=201, responses={201: {"model": LinkAnswer}, **errors(404)})
async def create_link(session_id: SessionId, body: LinkBody, request: Request, context: UseContext) -> Response:
    """Make a URL by which one file can be read or written for a while, without a key. The file needn't be there yet."""
    session = await context.sessions.get(session_id)
    path = parse(body.path)
    context.files.check_depth(path)
    token, link = await context.links.make(
        session, path, body.method, body.expires_in, caller_of(request), body.max_bytes
    )
    await context.audit.record(caller_of(request), "link.create", session_id.id, method=body.method)
    answer = {
        "url": f"{called_url(request, context.settings)}/links/{token}",
        "path": body.path,
        "method": body.method,
        "expires_at": timestamp(link.expires_at),
    }
    return Answer(answer, 201, headers={"Cache-Control": "no-store"})


@public.head("/{token}", include_in_schema=False)
@public.get("/{token}", responses=FILE, response_class=StreamingResponse)
async def get_by_link(token: Token, request: Request, context: UseContext) -> Response:
    """Download the file that a link is for, as an attachment."""
    link, session = await context.links.find(token, request.method)
    file = await context.files.open(session.owned_id, link.path)
    try:
        response = file_response(file, link.path, request)
    except BaseException:
        file.close()
        raise
    response.headers.update(_ANY_SITE)
    return response


@public.put(
    "/{token}", responses={200: {"model": FileWrittenAnswer}, **errors(404, 408, 409, 413, 429)}, openapi_extra=BYTES
)
async def put_by_link(token: Token, request: Request, context: UseContext) -> Response:
    """Write the file that a link is for: its content is the body. Waits for the run under way."""
    link, session = await context.links.find(token, "PUT")
    body = body_of(request, context, link.max_bytes)
    upload, dropped = await context.files.put(session.owned_id, link.path, body, Condition())
    answer = {"path": "/".join(link.path), "size": upload.size, **dropped_answer(dropped)}
    return Answer(answer, headers={"ETag": f'"{upload.digest}"', **_ANY_SITE})


@public.options("/{token}", include_in_schema=False)
async def ask_for_link(token: Token) -> Response:
    """Answer a browser that asks whether a page of another site may use a link. It says nothing about the link."""
    return Response(status_code=204, headers=_PREFLIGHT)
