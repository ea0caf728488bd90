"""HTTP/1.1 on a connection: uvicorn's, with the bounds that it lacks and errors in the contract's shape."""

from __future__ import annotations

import asyncio
import json
import secrets

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from era.api.guard import error_body, error_headers
from era.errors import BadRequest, EraError, HeadersTooLarge, TooSlow

MAX_HEAD_BYTES = 64 << 10
HEAD_SECONDS = 30.0


class Protocol(HttpToolsProtocol):
    """Without these bounds whoever can connect could fill the memory with one endless header, or take all
    descriptors with requests that never end."""

    _unparsed = 0
    _too_slow: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.cycle is not None and self.cycle.response_complete:
            self._expect_head()
        self._unparsed += len(data)
        super().data_received(data)
        if self._unparsed > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(HeadersTooLarge(f"The request's headers are over {MAX_HEAD_BYTES} bytes."))

    def on_headers_complete(self) -> None:
        self._unparsed = 0
        self._head_came()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0  # so that what counts is the head, the trailer and what stands between chunks
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        self._refuse(BadRequest("These bytes are no HTTP/1.1 request.", hint="Speak plain HTTP/1.1 to this address."))

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
