"""A WebSocket of our own, over a tunnel (protocol.py): accepted, read, written, kept alive, closed.

Theory of operation. A WebSocket begins as an HTTP request, and is one until it is accepted: guard, routes and
dependencies treat it like any other, and what is refused gets an ordinary answer. A route that accepts it answers with
a WebSocketResponse. Whoever sends waits until the connection has room, so a slow client costs no memory but what the
kernel buffers. A client that doesn't read what it is sent, and one that answers no ping, is given up after a minute.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from era.api.protocol import Protocol
from era.core import frames
from era.core.meter import turn
from era.core.tasks import until_one_ends
from era.errors import BadRequest

MAX_MESSAGE_BYTES = 1 << 20
_MAX_TEXT_BYTES = 64 << 10
PING_SECONDS = 20.0
_DEAD_SECONDS = 60.0
"""A client that has answered no ping for so long is gone."""

_CLOSE_SECONDS = 5.0
_PIECE = 16 << 10
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class Closed(Exception):
    """The WebSocket is closed, or its client is gone."""


class WebSocket:
    """An accepted WebSocket. One task reads; any number may send."""

    def __init__(self, connection: Protocol, reader: asyncio.StreamReader) -> None:
        self._connection = connection
        self._reader = reader
        self._frames = frames.FrameReader(MAX_MESSAGE_BYTES, _MAX_TEXT_BYTES)
        self.is_closed = False
        """Whether we have said that it is closed."""

        self._heard = asyncio.Event()
        """Set when the client has said so, or is gone."""

        self._has_reader = False
        """Whether `messages` are being read, by one task."""

        self._unanswered = 0.0
        """When the first ping was sent that hasn't been answered, by the loop's clock; 0 for none."""

        self._reading = False

    async def send(self, data: bytes | str) -> None:
        """Send a message, and wait until there is room for more. Raises Closed."""
        if isinstance(data, str):
            await self._send(frames.made(frames.TEXT, data.encode()))
        else:
            await self._send(frames.made(frames.BINARY, data))

    async def messages(self) -> AsyncGenerator[bytes | str]:
        """What the client sends, messages in binary piece by piece, until it closes or is gone; also where nothing
        can be sent to it any more."""
        self._has_reader = True
        try:
            while data := await self._read():
                for frame in self._frames.feed(data):
                    await turn()
                    if frame.opcode == frames.CLOSE:
                        self._heard.set()
                        await self.close()
                        return
                    if frame.opcode == frames.PING:
                        with suppress(Closed):
                            await self._send(frames.made(frames.PONG, frame.data))
                    elif frame.opcode != frames.PONG:
                        yield frame.data.decode() if frame.opcode == frames.TEXT else frame.data
            self._heard.set()
        except frames.BadFrame as error:
            self._has_reader = False
            await self.close(error.code)
        finally:
            self._has_reader = False

    async def _read(self) -> bytes:
        self._reading = True
        data = await self._reader.read(_PIECE)
        self._reading = False
        self._unanswered = 0.0
        return data

    async def keep_alive(self) -> None:
        """Ping the client from time to time, until it is gone."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(PING_SECONDS)
            if self.is_closed:
                continue  # what came before that may still be on its way to where it goes
            if self._unanswered and self._reading and loop.time() > self._unanswered + _DEAD_SECONDS:
                return
            self._unanswered = self._unanswered or loop.time()
            try:
                await self._send(frames.made(frames.PING, b""))
            except Closed:
                if not self._reading:
                    await asyncio.sleep(_DEAD_SECONDS)  # likewise
                return

    async def close(self, code: int = frames.NORMAL) -> None:
        """Close it, and wait a moment for the client to say that it has understood: to hang up with bytes unread would
        take the code away from it."""
        with suppress(TimeoutError, Closed):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._send(frames.closing(code))
                self.is_closed = True
                if self._has_reader:
                    await self._heard.wait()
                elif not self._heard.is_set():
                    await self._read_to_close()

    async def _read_to_close(self) -> None:
        """Read until the client has closed it or is gone. What comes before that is dropped, however wrong it is."""
        follower = self._frames.follower()
        while not follower.has_closed and (data := await self._reader.read(_PIECE)):
            follower.follow(data)
            await turn()

    async def _send(self, frame: bytes) -> None:
        """Send a frame, and wait until there is room for more. Raises Closed."""
        if self.is_closed:
            raise Closed
        try:
            async with asyncio.timeout(_DEAD_SECONDS):
                await self._connection.send_raw(frame)
        except (ConnectionError, TimeoutError) as error:
            raise Closed from error


class WebSocketResponse(Response):
    """Accepts the WebSocket that a request asks for, and has it served until that ends."""

    def __init__(
        self,
        serve: Callable[[WebSocket], Awaitable[None]],
        barred: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        """`serve` returns or raises Closed. `barred` returns when its client may have it no longer, which closes it as
        a violation of policy (1008)."""
        super().__init__(status_code=101)
        self._serve = serve
        self._barred = barred

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection: Protocol = scope["extensions"]["era.connection"]
        key = dict(scope["headers"])[b"sec-websocket-key"]
        accept = base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest())
        headers = [
            (b"connection", b"Upgrade"),
            (b"upgrade", b"websocket"),
            (b"sec-websocket-accept", accept),
            (b"x-request-id", scope["state"]["request_id"].encode()),
        ]
        try:
            socket = WebSocket(connection, connection.open_tunnel(headers))
            await until_one_ends(self._served(socket), socket.keep_alive())
        except ConnectionError:
            pass  # the caller has gone before it was accepted
        finally:
            connection.transport.close()
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await connection.hang_up()
        except TimeoutError:
            await connection.cut()  # a client that doesn't read what is left for it

    async def _served(self, socket: WebSocket) -> None:
        with suppress(Closed):
            barred, serving = asyncio.ensure_future(self._barred()), asyncio.ensure_future(self._serve(socket))
            try:
                await asyncio.wait({barred, serving}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                barred.cancel()
                serving.cancel()
                await asyncio.gather(barred, serving, return_exceptions=True)
            if serving.cancelled():
                await socket.close(frames.POLICY)
                return
            serving.result()
            await socket.close()


def check_upgrade(request: Request) -> None:
    """Raises BadRequest for a request that is none for a WebSocket."""
    connection = request.scope.get("extensions", {}).get("era.connection")
    key = request.headers.get("sec-websocket-key", "")
    if connection is None or not connection.upgrading or not key:
        raise BadRequest("This call is a WebSocket.", hint="Open it with a WebSocket client.", code="not_a_websocket")
    if request.headers.get("sec-websocket-version") != "13":
        raise BadRequest("This server speaks version 13 of WebSocket.", code="not_a_websocket")
