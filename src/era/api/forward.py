"""A request handed on to a server inside a session, as it is, and its answer back, both as they come.

Theory of operation
===================

The server inside may be hostile, and so may be the caller; both want to talk past us to the other or to what stands in
front of us. So nothing is copied: the request that uvicorn has read is written anew, and the answer is read by h11,
which is strict, and written anew by uvicorn. Whatever is left over on the connection inside is dropped with it, since
each request gets a connection of its own.

An answer that breaks off must not pass for a whole one: then the caller's connection is cut, too.

A WebSocket is a connection that both ends have agreed to use for something else than HTTP. Once the server inside has
said so (101), bytes pass as they are, either way, and the caller's connection ends with it.

Nobody is waited for without end: HEAD_SECONDS for an answer to begin, IDLE_SECONDS while nothing moves in either
direction. Memory is flat: each direction waits for its receiver.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11
from starlette.types import Message, Receive, Scope, Send

from era.api.protocol import Protocol
from era.core.public import headers
from era.core.public.live_servers import Way
from era.core.public.relay import ascii_target
from era.core.tasks import until_one_ends
from era.errors import BadRequest, EraError, RelayFailed, RelayTimeout

HEAD_SECONDS = 60.0
IDLE_SECONDS = 300.0
_PIECE = 64 << 10
_MAX_HEAD_BYTES = 64 << 10
_FORWARDED = ("forwarded", "x-real-ip")
"""Besides all `x-forwarded-…`: what callers say of themselves and we say instead."""


@dataclass(frozen=True, slots=True)
class Call:
    """What of a request isn't in its scope: `path` is the session's own part as it came, `prefix` what stands before
    it in the URL, `cookie_path` where the session's cookies belong, `key` the API's."""

    path: bytes
    prefix: str
    cookie_path: str
    key: bytes | None


async def forward(scope: Scope, receive: Receive, send: Send, way: Way, call: Call) -> None:
    """Answer a request by the server at the other end of `way`. Raises RelayFailed, RelayTimeout or what `receive`
    raises, as long as nothing has been sent."""
    reader, writer = await asyncio.open_connection(sock=way.connection.dup(), limit=_PIECE)
    try:
        await _Exchange(scope, receive, send, way, call, reader, writer).run()
    finally:
        writer.transport.abort()


class _Exchange:
    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        way: Way,
        call: Call,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._way = way
        self._call = call
        self._reader = reader
        self._writer = writer
        self._connection: Protocol = scope["extensions"]["era.connection"]
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)
        self._began = False
        self._clock = asyncio.timeout(HEAD_SECONDS)
        self._moved: Callable[[], None] = lambda: None

    async def run(self) -> None:
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
                    upload.result()  # the caller has gone, or his body can't be had
        except TimeoutError:
            await self._failed(RelayTimeout(f"The session's server gave no answer within {HEAD_SECONDS:g} seconds."))
        except h11.RemoteProtocolError as error:
            await self._failed(RelayFailed(f"The session's server answered what is no HTTP: {_told(error)}."))
        except OSError:
            await self._failed(RelayFailed("The session's server hung up before it had answered."))
        except EraError as error:
            await self._failed(error)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _failed(self, error: EraError) -> None:
        if not self._began:
            raise error
        await self._connection.cut()

    # -- there ------------------------------------------------------------------------------------------------------

    def _request(self) -> h11.Request:
        scope, call = self._scope, self._call
        given = headers.of_request(scope["headers"], call.key)
        told = [
            (name, value)
            for name, value in given
            if not name.startswith("x-forwarded-") and name not in (*_FORWARDED, "expect", "content-length")
        ]
        hosts = [value for name, value in told if name == "host"]
        if len(hosts) > 1:
            raise BadRequest("The request has more than one Host header.", hint="Send one.")
        if not hosts:
            told.insert(0, ("host", "localhost"))
        told += [
            ("x-forwarded-for", scope["client"][0] if scope["client"] else "unknown"),
            ("x-forwarded-proto", scope["scheme"]),
            ("x-forwarded-host", hosts[0] if hosts else "localhost"),
            ("x-forwarded-prefix", call.prefix),
            *self._framing(),
        ]
        if self._connection.upgrading:
            told += [("connection", "Upgrade"), ("upgrade", "websocket")]
        else:
            told.append(("connection", "close"))
        target = ascii_target(call.path) + ("?" + ascii_target(scope["query_string"]) if scope["query_string"] else "")
        try:
            return h11.Request(
                method=scope["method"].encode(),
                target=target.encode(),
                headers=[(name.encode("latin-1"), value.encode("latin-1")) for name, value in told],
            )
        except h11.LocalProtocolError as error:
            raise BadRequest(f"The request can't be handed on: {_told(error)}.", hint="Send plain HTTP/1.1.") from None

    def _framing(self) -> list[tuple[str, str]]:
        """How the body's end is told: as the caller tells it."""
        given = {name: value.decode("latin-1") for name, value in self._scope["headers"]}
        if b"transfer-encoding" in given:
            return [("transfer-encoding", "chunked")]
        return [("content-length", given[b"content-length"])] if b"content-length" in given else []

    async def _upload(self) -> None:
        """Hand on the body, then wait until the caller is gone."""
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
                more = False  # it has answered and wants no more of it
            self._moved()

    def _write(self, event: Any) -> None:
        self._writer.write(self._h11.send(event) or b"")

    # -- and back ---------------------------------------------------------------------------------------------------

    async def _download(self) -> None:
        while True:
            event = self._h11.next_event()
            if event is h11.NEED_DATA:
                self._h11.receive_data(await self._reader.read(_PIECE))
                if self._began:
                    self._moved()
            elif isinstance(event, h11.InformationalResponse):
                if event.status_code == 101:
                    await self._switch(event)
                    return
            elif isinstance(event, h11.Response):
                await self._begin(event)
            elif isinstance(event, h11.Data):
                await self._send({"type": "http.response.body", "body": bytes(event.data), "more_body": True})
                self._moved()
            elif isinstance(event, h11.EndOfMessage):
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})
                return
            else:
                raise RelayFailed("The session's server hung up before it had answered.")

    async def _begin(self, response: h11.Response) -> None:
        status = response.status_code
        if status > 599:
            raise RelayFailed(f"The session's server answered the status {status}, which is none.")
        names = [name for name, _ in response.headers]
        if b"transfer-encoding" in names and b"content-length" in names:
            raise RelayFailed("The session's server answered two lengths of one body.")
        answer: Message = {"type": "http.response.start", "status": status, "headers": self._answered(response)}
        if status != 304 and b"content-length" in names:
            answer["headers"] += [pair for pair in response.headers if pair[0] == b"content-length"]
        self._began = True
        self._moved()
        await self._send(answer)

    def _answered(self, response: h11.Response | h11.InformationalResponse) -> list[tuple[bytes, bytes]]:
        """The headers to send."""
        given = [(name.decode(), value.decode("latin-1")) for name, value in response.headers]
        found = headers.of_answer(given, self._call.cookie_path)
        return [
            *((name.encode(), value.encode("latin-1")) for name, value in found),
            (b"x-era-run", self._way.run_id.encode()),
        ]

    async def _switch(self, response: h11.InformationalResponse) -> None:
        """From here on bytes pass as they are."""
        told = [
            (b"connection", b"Upgrade"),
            (b"upgrade", b"websocket"),
            *self._answered(response),
            (b"x-request-id", self._scope["state"]["request_id"].encode()),
        ]
        self._began = True
        self._moved()
        caller = self._connection.open_tunnel(told)
        await self._connection.tell(self._h11.trailing_data[0])
        await until_one_ends(self._to_caller(), self._to_server(caller))
        await self._connection.hang_up()

    async def _to_caller(self) -> None:
        while piece := await self._reader.read(_PIECE):
            await self._connection.tell(piece)
            self._moved()

    async def _to_server(self, caller: asyncio.StreamReader) -> None:
        while piece := await caller.read(_PIECE):
            self._writer.write(piece)
            await self._writer.drain()
            self._moved()


def _told(error: Exception) -> str:
    return str(error)[:200].rstrip(".")
