"""Calling in: the public URL of a session, answered by a server in it, by its stored code or by its inbox."""

from __future__ import annotations

import asyncio
import re
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import APIRouter, Query, Request, Response
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

from era.api.context import Answer, Context, SessionId, StrictRoute, UseContext, base_url, errors, possible_id
from era.api.forward import Call, forward
from era.api.guard import error_body, error_headers
from era.core.models import Session
from era.core.public import relay
from era.core.run_messages import RunRequest
from era.core.runs import check_public, check_stored
from era.errors import BadRequest, MethodNotAllowed, NotFound, RelayFailed, TooSlow, Unavailable
from era.wire.sessions import HostAnswer

router = APIRouter(prefix="/api/sessions/{session_id}", tags=["public URL"], route_class=StrictRoute)

_OURS = re.compile(r"/proxy(/|$)")
_TARGET = re.compile(rb"/[^/]*(?:/([^/]*)(?:/([^/]*)(/.*)?)?)?", re.DOTALL)
"""Of a path as it came: the session's id, the port and the rest."""

_INBOX = b"inbox"
"""What stands in the port's place for deliveries."""

_BODY_SECONDS = 60.0


@router.get("/host", responses={200: {"model": HostAnswer}, **errors(404)})
async def public_url(
    session_id: SessionId,
    request: Request,
    context: UseContext,
    port: Annotated[int, Query(ge=1, le=65535, description="The port that the URL names.")],
) -> Response:
    """Tell the URL under which anybody may call the session."""
    session = await context.sessions.get(session_id)
    base = base_url(request, context.settings)
    url = f"{base}/proxy/{session.id}/{port}"
    return Answer({"url": url, "base_url": base, "session_id": session.id, "port": port})


class PublicUrls(BaseRoute):
    """Every method of every path below /proxy. Starlette's own routes know methods by their names, and see paths only
    decoded, where an escaped slash can't be told from a slash."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        ours = scope["type"] == "http" and _OURS.match(scope["path"])
        return (Match.FULL if ours else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        context: Context = request.app.state.context
        session, port, path = await _checked(request, context)
        if port is None:
            await (await _delivered(request, context, session, path))(scope, receive, send)
            return
        above = urlsplit(context.settings.public_url or "").path.rstrip("/")  # where a proxy in front has put us
        key = _api_key(context)
        call = Call(path or b"/", f"{above}/proxy/{session.id}/{port}", f"{above}/proxy/{session.id}/", key)
        run_id = None
        try:
            async with context.live_servers.way(session, port, base_url(request, context.settings)) as way:
                if way is not None:
                    run_id = way.run_id
                    await forward(scope, receive, send, way, call)
                    return
            answer = await _relayed(request, context, session, call)
        except (RelayFailed, Unavailable) as error:
            run_id = run_id or (error.details or {}).get("run_id")
            told = {**error_headers(error), **({"X-Era-Run": run_id} if run_id else {})}
            answer = Answer(error_body(error, request.state.request_id), error.status, headers=told)
        await answer(scope, receive, send)


async def _relayed(request: Request, context: Context, session: Session, call: Call) -> Response:
    """The answer of the session's stored code."""
    check_stored(session, public=True)
    told = await _told(request, call.path)
    base = base_url(request, context.settings)
    variables = relay.environment(told, key=call.key)
    run = await context.runs.run(session.owned_id, RunRequest(base, env=variables, public=True))
    about = {"X-Era-Run": run.result.run_id}
    try:
        found = relay.reply(run, call.cookie_path)
    except RelayFailed as error:
        return Answer(error_body(error, request.state.request_id), error.status, headers=about)
    answer = Response(found.body, found.status, headers=about)
    answer.raw_headers += [(name.encode(), value.encode()) for name, value in found.headers]
    return answer


async def _delivered(request: Request, context: Context, session: Session, path: bytes) -> Response:
    """The answer to a delivery, once it is durable."""
    await context.inbox.settings(session)
    if request.method != "POST":
        error = MethodNotAllowed("An inbox takes deliveries by POST.")
        return Answer(error_body(error, request.state.request_id), error.status, headers={"Allow": "POST"})
    call = await _told(request, path)
    received = await context.inbox.receive(session, call, base_url(request, context.settings), _api_key(context))
    told = {"delivery_id": received.delivery_id, "status": received.status}
    return Answer(told, 202 if received.first else 200)


async def _told(request: Request, path: bytes) -> relay.Call:
    """The request as stored code is told of it."""
    return relay.Call(
        method=request.method,
        path=path,
        query=request.scope["query_string"],
        headers=request.scope["headers"],
        body=await _body(request),
    )


def _api_key(context: Context) -> bytes | None:
    return context.settings.api_key.get_secret_value().encode() if context.settings.api_key else None


async def _checked(request: Request, context: Context) -> tuple[Session, int | None, bytes]:
    """A session that may be called, the port, None for its inbox, and the path that its program is to see. Raises
    EraError."""
    if request.method == "CONNECT":
        raise MethodNotAllowed("CONNECT asks for a tunnel, and there is none here.")
    found = _TARGET.fullmatch(request.scope["raw_path"])
    given, port, path = found.groups() if found else (None, None, None)
    try:
        session = await context.store.public_session(possible_id((given or b"").decode("latin-1")))
    except NotFound:
        raise NotFound("There is no session at this URL.", hint="Ask the owner of the session for its URL.") from None
    check_public(session)
    if port == _INBOX:
        return session, None, path or b"/"
    if port and not (re.fullmatch(rb"\d{1,5}", port) and 1 <= int(port) <= 65535):
        raise BadRequest(
            "The URL has no port behind the session's id.", hint="/proxy/{id}/{port}/{path}, with a port of 1 to 65535."
        )
    return session, int(port or 0), path or b"/"


async def _body(request: Request) -> bytes:
    """The request's body. Raises TooLarge for more than could be handed on, without waiting for the rest."""
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > relay.MAX_BODY_BYTES:
                    raise relay.too_large("ERA_HTTP_BODY")
    except ClientDisconnect:
        raise BadRequest("The body ended before it was complete.") from None
    except TimeoutError:
        raise TooSlow(f"The request's body took more than {_BODY_SECONDS:g} seconds.") from None
    return bytes(body)
