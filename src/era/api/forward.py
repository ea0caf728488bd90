"""A reverse proxy for one request: forwarded to a live server in a session, and its answer back, both streamed.

Theory of operation
===================

The server inside may be hostile, and so may be the caller; both may try to smuggle bytes past us to the other, or to a
proxy in front of us. So nothing is copied (exchange.py): headers are chosen one by one, and what stands for itself on a
connection is said by us. Each request gets a connection of its own inside, and whatever is left over on that is dropped
with it.

No wait is endless: HEAD_SECONDS for an answer to begin, IDLE_SECONDS while nothing moves in either direction. All calls
of a session are at the cost of its account (core/meter.py).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import h11
from starlette.types import Receive, Scope, Send

from era.api.exchange import Exchange, reason
from era.api.tunnel import connect
from era.core.public import headers
from era.core.public.live_servers import LiveConnection
from era.core.public.relay import ascii_target
from era.errors import BadRequest, EraError, RelayFailed, RelayTimeout

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
