"""A WebSocket that is passed on: bytes between its caller and another server, unchanged, until one of them ends it.

Theory of operation. The end is part of the conversation: a Close frame says why, and whoever hangs up too early takes
it away from the other one. Where a connection is closed with bytes unread, the kernel throws away what it still had to
send; where one is written to that the other end has closed, what was received there is lost. So neither direction ends
because the other one has failed. What a caller that has gone had sent still goes to the server, and what a server that
has gone had sent still goes to the caller. Both wait for each other's Close frame, for a moment.

A server that stops can't have others wait for its end. So it puts a Close frame of its own where the next frame would
begin, which takes following the frames that pass (frames.py). The answer to it passes as usual, and ends the
conversation at the other end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from era.api.protocol.protocol import Protocol
from era.core.concurrency import frames
from era.core.concurrency.meter import turn
from era.core.concurrency.streams import write

PIECE = 64 << 10
_CLOSE_SECONDS = 5.0
"""How long one side may take to hear of the other one's end."""

_DELIVERY_SECONDS = 30.0
"""How long a server has to take what a caller that is gone had sent. Over TLS the other end is a host. Until that has
taken all, it doesn't confirm that this is the end, and what it hasn't is lost if the connection is cut. The event loop
waits no longer either (its ssl_shutdown_timeout)."""


class KeepingReader(asyncio.StreamReader):
    """A stream in which a connection's failure comes after all that was received before it, as its end."""

    def set_exception(self, exc: Exception) -> None:
        self.feed_eof()


async def connect(**where: Any) -> tuple[KeepingReader, asyncio.StreamWriter]:
    """A connection to another server, with the arguments of an event loop's `create_connection`. Raises OSError."""
    loop = asyncio.get_running_loop()
    reader = KeepingReader(limit=PIECE, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await loop.create_connection(lambda: protocol, **where)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


class Tunnel:
    """Such a WebSocket. `run` it once."""

    def __init__(
        self,
        caller: Protocol,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        moved: Callable[[], None],
    ) -> None:
        """`reader` and `writer` are the connection to the server. `moved` is called for each byte or more that
        passes."""
        self._caller = caller
        self._reader = reader
        self._writer = writer
        self._moved = moved
        self._down, self._up = frames.FrameFollower(), frames.FrameFollower()
        self._caller_closed = asyncio.Event()
        """Set when the caller has sent a Close frame, or is gone."""

        self._to_be_ended = False
        self._left = caller.left = asyncio.Event()
        self.ended = asyncio.Event()

    async def run(self, from_caller: asyncio.StreamReader, first: bytes) -> None:
        """Pass bytes until the WebSocket has ended, or the caller is to go elsewhere. `first` has come from the server
        already. The caller's connection is closed then, the one to the server isn't."""
        down = asyncio.create_task(self._to_caller(first))
        up = asyncio.create_task(self._to_server(from_caller))
        leaving = asyncio.create_task(self._caller.leave.wait())
        try:
            await asyncio.wait((down, up, leaving), return_when=asyncio.FIRST_COMPLETED)
            if up.done():
                await self._end_server(down)
            else:
                with suppress(TimeoutError, ConnectionError):
                    async with asyncio.timeout(_CLOSE_SECONDS):
                        if not down.done():
                            await self._send_close(down)
                        self._left.set()
                        if self._down.has_closed:
                            await self._caller_closed.wait()
            await self._hang_up()
        finally:
            for task in (down, up, leaving):
                task.cancel()
            await asyncio.gather(down, up, leaving, return_exceptions=True)
            self._left.set()
            self.ended.set()

    async def _to_caller(self, piece: bytes) -> None:
        """Pass on what the server sends, until it ends, or the frame under way does where the caller is to leave."""
        has_caller = True
        while not (self._to_be_ended and self._down.is_between):
            if self._to_be_ended:
                # Perhaps no piece ever ends where a frame does, as each comes with the beginning of the next.
                piece = piece[: self._down.left_of_frame(piece)]
            self._down.follow(piece)
            if has_caller:
                try:
                    await self._caller.send_raw(piece)
                except ConnectionError:
                    has_caller = False
                self._moved()
            await turn()
            piece = await self._reader.read(PIECE)
            if not piece:
                return

    async def _to_server(self, from_caller: asyncio.StreamReader) -> None:
        """Pass on what the caller sends until it is gone; nowhere once the server takes no more."""
        has_server = True
        while piece := await from_caller.read(PIECE):
            self._up.follow(piece)
            if has_server:
                try:
                    write(self._writer, piece)
                    await self._writer.drain()
                except OSError:
                    has_server = False
                self._moved()
            if self._up.has_closed:
                self._caller_closed.set()
            await turn()
        self._caller_closed.set()

    async def _end_server(self, down: asyncio.Task[None]) -> None:
        """Have the server get all that the caller, who is gone, has sent."""
        if self._writer.is_closing():
            return
        if not self._writer.can_write_eof():
            self._writer.close()
            await asyncio.wait([down], timeout=_DELIVERY_SECONDS)
            return
        self._writer.write_eof()
        left = self._writer.transport.get_write_buffer_size()
        for _ in range(int(_DELIVERY_SECONDS / _CLOSE_SECONDS)):
            await asyncio.wait([down], timeout=_CLOSE_SECONDS)
            before, left = left, self._writer.transport.get_write_buffer_size()
            if down.done() or left in (0, before):
                return

    async def _send_close(self, down: asyncio.Task[None]) -> None:
        """Send a Close frame of ours in place of what the server would send next, unless it has sent one."""
        self._to_be_ended = True
        if self._down.is_between:
            down.cancel()
        await asyncio.wait([down])
        if self._down.is_between and not self._down.has_closed:
            frame = frames.closing(frames.RESTART)
            self._down.follow(frame)
            await self._caller.send_raw(frame)

    async def _hang_up(self) -> None:
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._caller.hang_up()
        except TimeoutError:
            await self._caller.cut()  # it doesn't read what is left for it
