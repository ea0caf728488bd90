"""The public URLs of sessions, /proxy/{id}/{port}/…: answered by a live server, by stored code or by the inbox.

Theory of operation
===================

A live server gets the request forwarded, and its answer goes back, both streamed. The server may be hostile, and so may
be the caller; both may try to smuggle bytes past us to the other, or to a proxy in front of us. So nothing is copied
(exchange.py): headers are chosen one by one, and what stands for itself on a connection is said by us. Each request
gets a connection of its own inside, and whatever is left over on that is dropped with it.

No wait is endless: HEAD_SECONDS for an answer to begin, IDLE_SECONDS while nothing moves in either direction. All calls
of a session are at the cost of its account (core/concurrency/meter.py).
"""

from __future__ import annotations

import asyncio
import re
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

import h11
from fastapi import APIRouter, Query, Request, Response
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

from era.api.protocol.addresses import base_url, called_url, served_port, served_url
from era.api.protocol.answers import Answer, error_body, error_headers
from era.api.protocol.exchange import Exchange, reason
from era.api.protocol.tunnel import connect
from era.api.routing.context import Context, SessionId, StrictRoute, UseContext, errors, possible_id
from era.api.routing.streaming import ClosingResponse
from era.core.concurrency.meter import charge_to
from era.core.execution.run_messages import RunRequest
from era.core.models import Session
from era.core.public import headers, relay
from era.core.public.live_servers import LiveConnection
from era.core.public.relay import ascii_target
from era.core.public.sites import SiteName
from era.core.runs.runs import check_public, check_stored
from era.errors import (
    BadRequest,
    EraError,
    MethodNotAllowed,
    NotFound,
    NothingListens,
    RelayFailed,
    RelayTimeout,
    TooSlow,
    Unavailable,
)
from era.wire.sessions import HostAnswer

router = APIRouter(prefix="/api/sessions/{session_id}", tags=["public URL"], route_class=StrictRoute)

_PUBLIC = re.compile(r"/proxy(/|$)")
_RAW_PATH = re.compile(rb"/[^/]*(?:/([^/]*)(?:/([^/]*)(/.*)?)?)?", re.DOTALL)
"""The parts of a raw path: the session's id, the port, and the path that the program sees."""

_INBOX = b"inbox"
"""Stands in the place of the port in a URL for deliveries."""

_BODY_SECONDS = 60.0


@router.get("/host", responses={200: {"model": HostAnswer}, **errors(404)})
async def public_url(
    session_id: SessionId,
    request: Request,
    context: UseContext,
    port: Annotated[int, Query(ge=1, le=65535, description="The port that the URL names.")],
) -> Response:
    """Show the URL by which anybody may call the session."""
    session = await context.sessions.get(session_id)
    base = called_url(request, context.settings)
    url = f"{base}/proxy/{session.id}/{port}"
    return Answer(
        {
            "url": url,
            "base_url": base,
            "session_id": session.id,
            "port": port,
            "label": context.sites.label(session),
            "site_url": context.sites.url(session, port, served_port(request, context.settings)),
        }
    )


class PublicUrls(BaseRoute):
    """Route of every path below /proxy, with any method.

    Starlette's own routes need the methods by name, and see only decoded paths, where an escaped slash can't be told
    from a slash.
    """

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        is_public = scope["type"] == "http" and _PUBLIC.match(scope["path"])
        return (Match.FULL if is_public else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a call, by whatever serves the session's URL."""
        request = Request(scope, receive, send)
        context: Context = request.app.state.context
        session, port, path = await _resolve(request, context)
        if port is None:
            answer = await _receive_delivery(request, context, session, path)
            await answer(scope, receive, send)
            return
        above = urlsplit(context.settings.public_url or "").path.rstrip("/")  # the path of a proxy in front of us
        place = headers.place(above, session.id, scope["raw_path"])
        target = Target(path, scope["scheme"], f"{place.cookie_path}{port}", place, _api_key(context))
        await _answer_call(request, send, session, port, target)


class SiteUrls(BaseRoute):
    """Route of every request under a session's own name, whatever its path: no other route sees such a request."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return (Match.FULL if "site" in scope.get("state", ()) else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a call, by whatever serves the session's URL."""
        request = Request(scope, receive, send)
        context: Context = request.app.state.context
        name: SiteName = scope["state"]["site"]
        _check_method(request)
        session = await context.sites.session(name)
        check_public(session)
        scheme = "https" if name.is_public else scope["scheme"]  # a TLS proxy is in front of us
        target = Target(scope["raw_path"], scheme, "", headers.site(name.label), _api_key(context))
        await _answer_call(request, send, session, name.port, target)


async def _answer_call(request: Request, send: Send, session: Session, port: int, target: Target) -> None:
    """Answer a call by the session's live server, or else by its stored code."""
    context: Context = request.app.state.context
    charge_to(session.owner, session.id)
    scope, receive = request.scope, request.receive
    run_id = None
    try:
        async with context.live_servers.connection(session, port, served_url(request, context.settings)) as live:
            if live is not None:
                run_id = live.run_id
                await forward(scope, receive, send, live, target)
                return
        answer = await _run_stored_code(request, context, session, port, target)
    except (RelayFailed, Unavailable) as error:
        run_id = run_id or (error.details or {}).get("run_id")
        told = {**error_headers(error), **({"X-Era-Run": run_id} if run_id else {})}
        answer = Answer(error_body(error, request.state.request_id), error.status, headers=told)
    await answer(scope, receive, send)


async def _run_stored_code(request: Request, context: Context, session: Session, port: int, target: Target) -> Response:
    """Run the session's stored code for this request, and return its answer. Raises NothingListens for a live session
    that has no stored code."""
    if session.stored is None and context.live_sessions.get(session.key) is not None:
        raise NothingListens(f"Nothing listens on port {port} of session '{session.id}' now.")
    check_stored(session, public=True, port=port)
    call = await _read_call(request, target.path)
    base = base_url(request, context.settings)
    variables = relay.environment(call, key=target.key, own_origin=target.place.own_origin)
    asked = RunRequest(base, env=variables, public=True, session_key=session.key)
    run = await context.runs.run(session.owned_id, asked)
    told = {"X-Era-Run": run.result.run_id}
    try:
        reply = await relay.reply(run, target.place, session.owner)
    except RelayFailed as error:
        run.close()
        return Answer(error_body(error, request.state.request_id), error.status, headers=told)
    body = reply.body
    if isinstance(body, bytes):
        run.close()
        answer = Response(body, reply.status, headers=told)
    else:
        told["Content-Length"] = str(body.size)
        kept = ExitStack()
        for each in (run, body):
            kept.callback(each.close)
        answer = ClosingResponse(body.pieces(0, body.size), kept.close, status_code=reply.status, headers=told)
    answer.raw_headers += [(name.encode(), value.encode()) for name, value in reply.headers]
    return answer


async def _receive_delivery(request: Request, context: Context, session: Session, path: bytes) -> Response:
    """Store a delivery in the session's inbox, and acknowledge it once it is durable."""
    await context.inbox.settings(session)
    if request.method != "POST":
        error = MethodNotAllowed("An inbox takes deliveries by POST.")
        return Answer(error_body(error, request.state.request_id), error.status, headers={"Allow": "POST"})
    call = await _read_call(request, path)
    received = await context.inbox.receive(session, call, base_url(request, context.settings), _api_key(context))
    answer = {"delivery_id": received.delivery_id, "status": received.status}
    return Answer(answer, 202 if received.first else 200)


async def _read_call(request: Request, path: bytes) -> relay.Call:
    """The whole request, read. Raises as `_body` does."""
    return relay.Call(
        method=request.method,
        path=path,
        query=request.scope["query_string"],
        headers=request.scope["headers"],
        body=await _body(request),
    )


def _api_key(context: Context) -> bytes | None:
    """The operator's key."""
    return context.settings.api_key.get_secret_value().encode() if context.settings.api_key else None


async def _resolve(request: Request, context: Context) -> tuple[Session, int | None, bytes]:
    """What a URL means: a session that may be called, the port (None for its inbox), and the path for its program.

    Raises MethodNotAllowed, NotFound, BadRequest, or Forbidden for a session that isn't public.
    """
    _check_method(request)
    match = _RAW_PATH.fullmatch(request.scope["raw_path"])
    session_id, port, path = match.groups() if match else (None, None, None)
    try:
        session = await context.store.public_session(possible_id((session_id or b"").decode("latin-1")))
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


def _check_method(request: Request) -> None:
    """Raises MethodNotAllowed."""
    if request.method == "CONNECT":
        raise MethodNotAllowed("CONNECT asks for a tunnel, and there is none here.")


async def _body(request: Request) -> bytes:
    """The request's body. Raises TooLarge as soon as it exceeds what a variable can hold; TooSlow."""
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > relay.MAX_BODY_BYTES:
                    raise relay.too_large("ERA_HTTP_BODY")
    except TimeoutError:
        raise TooSlow(f"The request's body took more than {_BODY_SECONDS:g} seconds.") from None
    return bytes(body)


HEAD_SECONDS = 60.0
IDLE_SECONDS = 300.0
_FORWARDED = ("forwarded", "x-real-ip")
"""Headers about the caller that it can't be believed about, dropped together with all `x-forwarded-…`. Many servers of
programs (WSGI, CGI, PHP) don't tell `_` from `-` in names, so they are dropped with either."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where in the session a request goes, which its ASGI scope doesn't say."""

    path: bytes
    """The path that the session's program sees, still escaped."""

    scheme: str
    """Of the URL."""

    prefix: str
    """What stands before that path in the URL, if anything."""

    place: headers.Place
    """Where the session answers."""

    key: bytes | None
    """The operator's API key, which no program may see."""


async def forward(scope: Scope, receive: Receive, send: Send, live: LiveConnection, target: Target) -> None:
    """Have the server at the other end of `live` answer a request.

    Raises RelayFailed, RelayTimeout or whatever `receive` raises, as long as nothing has been sent to the caller.
    """
    reader, writer = await connect(sock=live.socket.dup())
    try:
        await _ToProgram(scope, receive, send, live, target, reader, writer).run()
    finally:
        writer.transport.abort()


class _ToProgram(Exchange):
    """An exchange with a server in a session."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        live: LiveConnection,
        target: Target,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.head_seconds, self.idle_seconds = HEAD_SECONDS, IDLE_SECONDS
        super().__init__(scope, receive, send, reader, writer)
        self._run_id = live.run_id
        self._target = target

    def failure(self, what: str | None) -> EraError:
        if what is None:
            return RelayTimeout(f"The session's server gave no answer within {HEAD_SECONDS:g} seconds.")
        return RelayFailed(f"The session's server {what}.")

    def request(self) -> h11.Request:
        """The request to write, with headers about its forwarding. Raises BadRequest."""
        scope = self._scope
        sent = [
            (name, value)
            for name, value in headers.of_request(
                scope["headers"], self._target.key, own_origin=self._target.place.own_origin
            )
            if not (plain := name.replace("_", "-")).startswith("x-forwarded-")
            and plain not in (*_FORWARDED, "expect", "content-length")
        ]
        hosts = [value for name, value in sent if name == "host"]
        if len(hosts) > 1:
            raise BadRequest("The request has more than one Host header.", hint="Send one.")
        if not hosts:
            sent.insert(0, ("host", "localhost"))
        sent += [
            ("x-forwarded-for", scope["client"][0] if scope["client"] else "unknown"),
            ("x-forwarded-proto", self._target.scheme),
            ("x-forwarded-host", hosts[0] if hosts else "localhost"),
            *([("x-forwarded-prefix", self._target.prefix)] if self._target.prefix else []),
            *self.framing(),
        ]
        if self._caller.upgrading:
            sent += [("connection", "Upgrade"), ("upgrade", "websocket")]
        else:
            sent.append(("connection", "close"))
        query = "?" + ascii_target(scope["query_string"]) if scope["query_string"] else ""
        try:
            return h11.Request(
                method=scope["method"].encode(),
                target=(ascii_target(self._target.path) + query).encode(),
                headers=[(name.encode("latin-1"), value.encode("latin-1")) for name, value in sent],
            )
        except h11.LocalProtocolError as error:
            raise BadRequest(f"The request can't be handed on: {reason(error)}.", hint="Send plain HTTP/1.1.") from None

    def answer_headers(self, response: h11.Response | h11.InformationalResponse) -> list[tuple[bytes, bytes]]:
        """The headers that a session may send. Raises RelayFailed."""
        received = [(name.decode(), value.decode("latin-1")) for name, value in response.headers]
        allowed = headers.of_answer(received, self._target.place)
        return [
            *((name.encode(), value.encode("latin-1")) for name, value in allowed),
            *([(b"x-era-run", self._run_id.encode())] if self._run_id else ()),
        ]
