"""A reverse proxy for one request: forwarded to a live server in a session, and its answer back, both streamed.

Theory of operation
===================

The server inside may be hostile, and so may be the caller; both may try to smuggle bytes past us to the other, or to a
proxy in front of us. So nothing is copied: the request that uvicorn has parsed is written anew by h11, and the answer
is parsed by h11, which is strict, and written anew by uvicorn. Each request gets a connection of its own inside, and
whatever is left over on that is dropped with it.

An answer that breaks off must not pass for a complete one: the caller's connection is then reset, too.

A WebSocket is a connection that both ends have agreed to use for something other than HTTP. Once the server inside has
agreed (101), bytes pass unchanged in both directions, and the caller's connection carries no HTTP any more.

No wait is endless: HEAD_SECONDS for an answer to begin, IDLE_SECONDS while nothing moves in either direction. Memory is
flat: each direction waits for its receiver. Pieces of an answer that are there already are sent as one, and reading
them has a budget (core/loop_slices.py), which all calls of a session share.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11
from starlette.types import Message, Receive, Scope, Send

from era.api.protocol import Protocol
from era.core.loop_slices import Budget
from era.core.public import headers
from era.core.public.live_servers import LiveConnection
from era.core.public.relay import ascii_target
from era.core.tasks import until_one_ends
from era.errors import BadRequest, EraError, RelayFailed, RelayTimeout

HEAD_SECONDS = 60.0
IDLE_SECONDS = 300.0
_PIECE = 64 << 10
_MAX_HEAD_BYTES = 64 << 10
_MAX_INFORMATIONAL = 16
"""Informational responses (1xx) that may come before an answer."""

_EVENT_US = 40
"""What it costs to parse a piece of an answer."""

_FORWARDED = ("forwarded", "x-real-ip")
"""Headers about the caller that it can't be believed about, dropped together with all `x-forwarded-…`."""


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
    reader, writer = await asyncio.open_connection(sock=live.socket.dup(), limit=_PIECE)
    try:
        await _Exchange(scope, receive, send, live, target, reader, writer).run()
    finally:
        writer.transport.abort()


class _Exchange:
    """One request and its answer: two tasks, one for each direction, under a common clock."""

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
        self._scope = scope
        self._receive = receive
        self._send = send
        self._run_id = live.run_id
        self._target = target
        self._reader = reader
        self._writer = writer
        self._caller: Protocol = scope["extensions"]["era.connection"]
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)
        self._budget = Budget(("session", target.place.cookie_path))
        self._gathered = bytearray()
        """Content of the answer that is still to be sent."""

        self._informational = 0
        self._began = False
        self._clock = asyncio.timeout(HEAD_SECONDS)
        self._moved: Callable[[], None] = lambda: None
        """Called for each byte or more that passes: it winds the clock up."""

    async def run(self) -> None:
        """Forward until the answer is complete, the caller is gone, or the time is up. Raises as `forward` does."""
        self._write(self._request())
        loop = asyncio.get_running_loop()
        self._moved = lambda: self._clock.reschedule(loop.time() + (IDLE_SECONDS if self._began else HEAD_SECONDS))
        tasks: list[asyncio.Task[None]] = []
        try:
            async with self._clock:
                upload = asyncio.create_task(self._upload())
                download = asyncio.create_task(self._download())
                tasks = [upload, download]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if download.done():
                    download.result()
                else:
                    upload.result()  # the caller has gone, or its body was refused
        except TimeoutError:
            await self._failed(RelayTimeout(f"The session's server gave no answer within {HEAD_SECONDS:g} seconds."))
        except h11.RemoteProtocolError as error:
            await self._failed(RelayFailed(f"The session's server answered what is no HTTP: {_reason(error)}."))
        except OSError:
            await self._failed(RelayFailed("The session's server hung up before it had answered."))
        except EraError as error:
            await self._failed(error)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _failed(self, error: EraError) -> None:
        """Raise `error`, or reset the caller's connection if the answer has begun: no error can be sent then."""
        if not self._began:
            raise error
        await self._caller.cut()

    # -- the request ------------------------------------------------------------------------------------------------

    def _request(self) -> h11.Request:
        """The request to write, with headers about its forwarding. Raises BadRequest."""
        scope = self._scope
        sent = [
            (name, value)
            for name, value in headers.of_request(
                scope["headers"], self._target.key, own_origin=self._target.place.own_origin
            )
            if not name.startswith("x-forwarded-") and name not in (*_FORWARDED, "expect", "content-length")
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
            *self._framing(),
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
            reason = _reason(error)
            raise BadRequest(f"The request can't be handed on: {reason}.", hint="Send plain HTTP/1.1.") from None

    def _framing(self) -> list[tuple[str, str]]:
        """The header that delimits the body, of the same kind as the caller's."""
        received = {name: value.decode("latin-1") for name, value in self._scope["headers"]}
        if b"transfer-encoding" in received:
            return [("transfer-encoding", "chunked")]
        return [("content-length", received[b"content-length"])] if b"content-length" in received else []

    async def _upload(self) -> None:
        """Forward the body, then wait until the caller is gone."""
        more = True
        while (message := await self._receive())["type"] == "http.request":
            if not more:
                continue
            more = message.get("more_body", False)
            try:
                if message.get("body"):
                    self._write(h11.Data(data=message["body"]))
                if not more:
                    self._write(h11.EndOfMessage())
                await self._writer.drain()
            except (OSError, h11.LocalProtocolError):
                more = False  # the server has answered and takes no more of the body
            self._moved()

    def _write(self, event: Any) -> None:
        self._writer.write(self._h11.send(event) or b"")

    # -- the answer -------------------------------------------------------------------------------------------------

    async def _download(self) -> None:
        """Send the server's answer to the caller. Raises RelayFailed, and h11.RemoteProtocolError for bad HTTP."""
        while True:
            event = self._h11.next_event()
            if event is h11.NEED_DATA:
                await self._send_gathered()
                self._h11.receive_data(await self._reader.read(_PIECE))
                if self._began:
                    self._moved()
                continue
            if isinstance(event, h11.InformationalResponse):
                if event.status_code == 101:
                    await self._switch(event)
                    return
                self._informational += 1
                if self._informational > _MAX_INFORMATIONAL:
                    raise RelayFailed("The session's server announced an answer again and again, and gave none.")
            elif isinstance(event, h11.Response):
                await self._begin(event)
            elif isinstance(event, h11.Data):
                self._gathered += event.data
            elif isinstance(event, h11.EndOfMessage):
                await self._send({"type": "http.response.body", "body": bytes(self._gathered), "more_body": False})
                return
            else:
                raise RelayFailed("The session's server hung up before it had answered.")
            self._budget.charge(_EVENT_US)
            if self._budget.used_up:
                await self._send_gathered()
                await self._budget.next_slice()

    async def _send_gathered(self) -> None:
        """Send what of the answer's content has been read."""
        if self._gathered:
            await self._send({"type": "http.response.body", "body": bytes(self._gathered), "more_body": True})
            self._gathered.clear()
            self._moved()

    async def _begin(self, response: h11.Response) -> None:
        """Send status and headers. Raises RelayFailed for an answer that two readers could understand differently."""
        status = response.status_code
        if status > 599:
            raise RelayFailed(f"The session's server answered the status {status}, which is none.")
        names = [name for name, _ in response.headers]
        if b"transfer-encoding" in names and b"content-length" in names:
            raise RelayFailed("The session's server answered two lengths of one body.")
        answer: Message = {"type": "http.response.start", "status": status, "headers": self._response_headers(response)}
        if status != 304 and b"content-length" in names:
            answer["headers"] += [pair for pair in response.headers if pair[0] == b"content-length"]
        self._began = True
        self._moved()
        await self._send(answer)

    def _response_headers(self, response: h11.Response | h11.InformationalResponse) -> list[tuple[bytes, bytes]]:
        """The headers to send. Raises RelayFailed."""
        received = [(name.decode(), value.decode("latin-1")) for name, value in response.headers]
        allowed = headers.of_answer(received, self._target.place)
        return [
            *((name.encode(), value.encode("latin-1")) for name, value in allowed),
            *([(b"x-era-run", self._run_id.encode())] if self._run_id else ()),
        ]

    async def _switch(self, response: h11.InformationalResponse) -> None:
        """Accept the WebSocket, then pass bytes in both directions until one side ends."""
        accepted = [
            (b"connection", b"Upgrade"),
            (b"upgrade", b"websocket"),
            *self._response_headers(response),
            (b"x-request-id", self._scope["state"]["request_id"].encode()),
        ]
        self._began = True
        self._moved()
        from_caller = self._caller.open_tunnel(accepted)
        await self._caller.send_raw(self._h11.trailing_data[0])
        await until_one_ends(self._to_caller(), self._to_server(from_caller))
        await self._caller.hang_up()

    async def _to_caller(self) -> None:
        while piece := await self._reader.read(_PIECE):
            await self._caller.send_raw(piece)
            self._moved()

    async def _to_server(self, from_caller: asyncio.StreamReader) -> None:
        while piece := await from_caller.read(_PIECE):
            self._writer.write(piece)
            await self._writer.drain()
            self._moved()


def _reason(error: Exception) -> str:
    return str(error)[:200].rstrip(".")
