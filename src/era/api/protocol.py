"""HTTP/1.1 on a connection: uvicorn's, with the bounds that it lacks, errors in the contract's shape, and connections
that become something else (forward.py).

A request that asks for a WebSocket at a public URL is a request like any other, with this protocol in its scope as the
extension `era.connection`. Its connection carries no other: after it come only the WebSocket's bytes.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Iterable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from era.api.guard import error_body, error_headers
from era.errors import BadRequest, EraError, HeadersTooLarge, TooSlow

MAX_HEAD_BYTES = 64 << 10
HEAD_SECONDS = 30.0
_MAX_EARLY_BYTES = 64 << 10
"""Of what a caller sends before it knows that it has a WebSocket."""

_PUBLIC = re.compile(rb"/proxy/")


class Protocol(HttpToolsProtocol):
    """Without these bounds whoever can connect could fill the memory with one endless header, or take all
    descriptors with requests that never end."""

    _unparsed = 0
    _too_slow: asyncio.TimerHandle | None = None
    _later: asyncio.StreamReader | None = None
    """What comes after the head of a request that asks for a WebSocket."""

    upgrading = False
    """Whether the request asks for a WebSocket."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._lost = asyncio.Event()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)
        self._lost.set()
        if self._later is not None:
            self._later.feed_eof()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {"era.connection": self}  # type: ignore[dict-item]  # it need be no dictionary

    def data_received(self, data: bytes) -> None:
        if self._later is not None:
            self._later.feed_data(data)  # it stops the reading where nobody takes it
            return
        if self.cycle is not None and self.cycle.response_complete:
            self._expect_head()
        self._unparsed += len(data)
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.send_400_response("")
            return
        except httptools.HttpParserUpgrade as upgrade:
            if self.upgrading:
                self._later = asyncio.StreamReader(_MAX_EARLY_BYTES, self.loop)
                self._later.set_transport(self.transport)
                self._later.feed_data(data[upgrade.args[0] :])
            return
        if self._unparsed > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(HeadersTooLarge(f"The request's headers are over {MAX_HEAD_BYTES} bytes."))

    def on_headers_complete(self) -> None:
        self._unparsed = 0
        self._head_came()
        self.upgrading = (
            self.parser.get_http_version() == "1.1"
            and self.parser.get_method() == b"GET"
            and self._get_upgrade() == b"websocket"
            and _PUBLIC.match(self.url) is not None
        )
        super().on_headers_complete()
        if self.upgrading:
            self.cycle.keep_alive = False  # there is no more HTTP on it, whatever the answer

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0  # so that what counts is the head, the trailer and what stands between chunks
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        self._refuse(BadRequest("These bytes are no HTTP/1.1 request.", hint="Speak plain HTTP/1.1 to this address."))

    def open_tunnel(self, headers: Iterable[tuple[bytes, bytes]]) -> asyncio.StreamReader:
        """Answer that the connection isn't HTTP from here on; the answer is what the caller sends on it."""
        lines = [STATUS_LINE[101], *(b"%b: %b\r\n" % pair for pair in headers), b"\r\n"]
        self.transport.write(b"".join(lines))
        if self._later is None:
            raise ConnectionError("The caller has gone.")
        return self._later

    async def tell(self, piece: bytes) -> None:
        """Send bytes as they are, once there is room for them. Raises ConnectionError where nobody is there."""
        if self.transport.is_closing():
            raise ConnectionError("The caller has gone.")
        self.transport.write(piece)
        await self.flow.drain()

    async def hang_up(self) -> None:
        """Close the connection when all has been sent."""
        self.transport.close()
        await self._lost.wait()

    async def cut(self) -> None:
        """End the connection in such a way that its caller can't take what came for the whole."""
        self.transport.abort()
        await self._lost.wait()

    def _expect_head(self) -> None:
        if self._too_slow is None:
            error = TooSlow(f"The request's headers took more than {HEAD_SECONDS:g} seconds.")
            self._too_slow = self.loop.call_later(HEAD_SECONDS, self._refuse, error)

    def _head_came(self) -> None:
        if self._too_slow is not None:
            self._too_slow.cancel()
            self._too_slow = None

    def _refuse(self, error: EraError) -> None:
        if self.transport.is_closing():
            return
        request_id = "req_" + secrets.token_hex(8)
        body = json.dumps(error_body(error, request_id)).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "x-request-id": request_id,
            **error_headers(error),
            "Connection": "close",
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(STATUS_LINE[error.status] + head.encode() + b"\r\n" + body)
        self.transport.close()
