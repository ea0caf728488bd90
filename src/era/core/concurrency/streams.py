"""Streams, of asyncio's event loop and of uvloop's alike."""

from __future__ import annotations

import asyncio
import errno
import socket


class _Reader(asyncio.StreamReader):
    """A reader for which a connection that breaks has ended: what came before can be read. asyncio's forgets that."""

    def set_exception(self, exc: Exception) -> None:
        if isinstance(exc, ConnectionError):
            self.feed_eof()
        else:
            super().set_exception(exc)


async def over_socket(sock: socket.socket, limit: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A reader and a writer over a connected socket, which they own. `limit` is asyncio.open_connection's. The other
    end may be killed at any time: where it has not read all by then, that is a reset."""
    loop = asyncio.get_running_loop()
    reader = _Reader(limit=limit, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await loop.create_connection(lambda: protocol, sock=sock)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


def write(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Write to a connection. Raises ConnectionResetError if it is closed, as by the other end between two calls.
    asyncio drops what is written then, and uvloop raises RuntimeError, which nobody takes for the end of one."""
    _check_open(writer)
    writer.write(data)


def write_eof(writer: asyncio.StreamWriter) -> None:
    """End what is written to a connection. Raises as `write` does."""
    _check_open(writer)
    writer.write_eof()


def _check_open(writer: asyncio.StreamWriter) -> None:
    if writer.is_closing():
        raise ConnectionResetError(errno.ECONNRESET, "the connection is closed")


def limit_buffer(transport: asyncio.WriteTransport, most: int) -> None:
    """Have writing wait where more bytes than this aren't taken by the kernel yet; nothing where it is closed."""
    if not transport.is_closing():
        transport.set_write_buffer_limits(most)
