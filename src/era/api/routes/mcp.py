"""/mcp and /mcp/v1: the Model Context Protocol over HTTP, served by the tools of era.mcp.

Tools are calls of this server's own HTTP API, with the caller's key, so they have its rights and no others, and all of
the API's checks. The protocol's library is loaded at the first request: that takes a second, and most servers never get
one.
"""

from __future__ import annotations

import asyncio
import importlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import httpx
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from era import __version__
from era.api.protocol.answers import MAX_BODY_BYTES
from era.api.routing.event_stream import STREAM_TYPE, takes
from era.core import jsontext
from era.core.models import JsonObject
from era.core.sessions.sessions import check_long_body
from era.errors import BadRequest, TooLarge

if TYPE_CHECKING:
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

PATHS = ("/mcp", "/mcp/", "/mcp/v1", "/mcp/v1/")
_CALLERS_HEADERS = ("authorization", "host")
_CONNECT_SECONDS = 10.0

_ARGUMENTS = "mcp_arguments"
"""What a request's state has of a long message."""

_SESSION = "mcp-session-id"
"""Header with the id of a client's session of the protocol, from the answer to `initialize`. Each client numbers its
calls from 0, so the id is needed to find the call that a `notifications/cancelled` means. The server stores none."""

_CANCELLED = -32800
"""JSON-RPC error of a call that its client has cancelled, as in the Language Server Protocol."""


class Mcp:
    """The endpoint, and what runs behind it as long as the application does."""

    def __init__(self) -> None:
        self._managers: asyncio.Task[tuple[StreamableHTTPSessionManager, StreamableHTTPSessionManager]] | None = None
        self._running: asyncio.Task[None] | None = None
        self._cancellable: dict[Hashable, anyio.CancelScope] = {}
        """Calls under way, by caller, session of the protocol and request id."""

    def routes(self) -> list[Route]:
        return [Route(path, endpoint=self, methods=["POST"]) for path in PATHS]

    @asynccontextmanager
    async def lifespan(self, _: Any) -> AsyncIterator[None]:
        yield
        for task in (self._managers, self._running):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (room := scope.get("state", {}).get("room")) is not None:
            room.is_passed_on = True  # it is the call of the API that holds it: one of the two would wait for the other
        message = await _whole_body(receive)
        if jsontext.takes_long(body := message.get("body", b"")):
            body, arguments = await _without_arguments(body)
            message = {**message, "body": body}
            scope.setdefault("state", {})[_ARGUMENTS] = arguments
        else:
            asked = _handshake(body)
            if asked.get("method") == "initialize":
                send = _with_session(send)
            elif asked.get("method") == "notifications/cancelled":
                self._cancel(scope, asked.get("params"))
        receive = _again(message, receive)
        del message  # which is let go once it has been read again
        if self._managers is None:
            self._managers = asyncio.create_task(self._start(scope["server"]))
        try:
            in_one, streamed = await asyncio.shield(self._managers)
        except Exception:
            self._managers = None  # the next request tries again
            raise
        scope = {**scope, "headers": list(scope["headers"])}
        headers = MutableHeaders(scope=scope)
        streams = takes(",".join(headers.getlist("accept")), STREAM_TYPE)
        # Clients of plain JSON-RPC say less than the protocol's transport asks for, which knows no weights either. The
        # guard has turned pages of other sites away already, so nothing hangs on the type that a body has.
        headers["accept"] = f"application/json, {STREAM_TYPE}" if streams else "application/json"
        headers["content-type"] = "application/json"
        headers["content-length"] = str(len(body))
        await (streamed if streams else in_one).handle_request(scope, receive, send)

    async def _start(
        self, address: tuple[str, int]
    ) -> tuple[StreamableHTTPSessionManager, StreamableHTTPSessionManager]:
        """Load the library, and serve from now on: answers in one piece, and as streams of events. `address` is this
        server's."""
        await asyncio.to_thread(importlib.import_module, "era.mcp.protocol")
        from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
        from mcp.server.transport_security import TransportSecuritySettings

        from era.mcp.calls import Calls
        from era.mcp.protocol import mcp_server

        host, port = address
        client = httpx.AsyncClient(
            base_url=f"http://{f'[{host}]' if ':' in host else host}:{port}",
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),  # a new one costs next to nothing
            trust_env=False,
            verify=False,  # noqa: S501  it is plain HTTP, and reading certificates takes time
        )

        def calls_of(context: Any) -> Calls:
            headers = context.request.headers
            return Calls(client, {name: headers[name] for name in _CALLERS_HEADERS if name in headers})

        def long_arguments(context: Any) -> Mapping[str, Any] | None:
            return getattr(context.request.state, _ARGUMENTS, None)

        server = mcp_server(__version__, calls_of, long_arguments)
        server.middleware.append(self._until_cancelled)
        in_one, streamed = (
            StreamableHTTPSessionManager(
                server,
                json_response=json,
                stateless=True,
                max_request_body_size=MAX_BODY_BYTES,
                # The guard has checked Host and Origin.
                security_settings=TransportSecuritySettings(enable_dns_rebinding_protection=False),
            )
            for json in (True, False)
        )
        ready = asyncio.Event()

        async def run() -> None:
            async with client, in_one.run(), streamed.run():
                ready.set()
                await asyncio.Event().wait()

        self._running = asyncio.create_task(run())
        self._running.add_done_callback(lambda _: ready.set())
        await ready.wait()
        if self._running.done():
            self._running.result()  # raises what it failed by
        return in_one, streamed

    async def _until_cancelled(self, ctx: Any, call_next: Callable[[Any], Awaitable[Any]]) -> Any:
        """Answer a request unless its client cancels it. Raises MCPError if it does."""
        request, request_id = ctx.request, ctx.request_id
        if request_id is None or (key := _call_key(request.scope, request_id)) is None:
            return await call_next(ctx)
        with anyio.CancelScope() as call:
            self._cancellable[key] = call
            try:
                return await call_next(ctx)
            finally:
                if self._cancellable.get(key) is call:  # a client may have used the id again
                    del self._cancellable[key]
        from mcp.shared.exceptions import MCPError

        raise MCPError(code=_CANCELLED, message="The client cancelled this call.")

    def _cancel(self, scope: Scope, params: Any) -> None:
        """Cancel the call that a `notifications/cancelled` names, if both come from the same client."""
        request_id = params.get("requestId") if isinstance(params, dict) else None
        if isinstance(request_id, int | str) and (call := self._cancellable.get(_call_key(scope, request_id))):
            call.cancel()


def _handshake(body: bytes) -> JsonObject:
    """Parse a message that may be `initialize` or `notifications/cancelled`; return an empty object for any other.

    The library shows a message only once it has answered it."""
    if b"initialize" not in body and b"cancelled" not in body:
        return {}
    try:
        message = jsontext.loads(body)
    except jsontext.JsonProblem:
        return {}
    return message if isinstance(message, dict) else {}


def _with_session(send: Send) -> Send:
    """Add the id of a new session of the protocol to an answer."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            MutableHeaders(scope=message)[_SESSION] = secrets.token_urlsafe(16)
        await send(message)

    return sending


def _call_key(scope: Scope, request_id: int | str) -> Hashable:
    """Return the key of a call that can be cancelled; None where the request has no session id of the protocol."""
    session = Headers(scope=scope).get(_SESSION)
    caller = scope.get("state", {}).get("caller")
    return (caller and (caller.owner, caller.key_id), session, request_id) if session else None


async def _without_arguments(text: bytes) -> tuple[bytes, JsonObject]:
    """A long message without the arguments of the tool that it calls, and these, parsed beside the event loop: all that
    the library does is done by the event loop. Raises BadRequest or TooLarge for what is no such message."""
    try:
        return await jsontext.aside(_parted, text)
    except jsontext.JsonTooLarge as error:
        raise TooLarge(f"The body {error}.") from None
    except jsontext.JsonProblem as error:
        raise BadRequest(f"The body {error}.", code="invalid_json") from None


def _parted(text: bytes) -> tuple[bytes, JsonObject]:
    """`_without_arguments`, at once."""
    message = jsontext.loads(text)
    params = message.get("params") if isinstance(message, dict) else None
    arguments = params.pop("arguments", None) if isinstance(params, dict) else None
    if not isinstance(arguments, dict):
        raise jsontext.JsonTooLarge("is too large for a message that has no arguments of a tool")
    check_long_body(arguments)
    rest = jsontext.compact(message).encode()
    if jsontext.takes_long(rest):
        raise jsontext.JsonTooLarge("is too large beside the arguments of a tool")
    return rest, arguments


async def _whole_body(receive: Receive) -> Message:
    """The body of a request in one message, or the last message where the client hangs up. The client decides how many
    pieces its bytes come in, and a message takes far more memory than a byte: so no more than one is kept."""
    message, content = await receive(), bytearray()
    while message.get("more_body"):
        content += message.get("body", b"")
        message = await receive()
    if not content or message["type"] != "http.request":
        return message
    return {**message, "body": bytes(content + message.get("body", b""))}


def _again(message: Message, receive: Receive) -> Receive:
    """A `receive` that gives this message once more, lets go of it, and then goes on."""
    kept = [message]

    async def receive_again() -> Message:
        return kept.pop() if kept else await receive()

    return receive_again
