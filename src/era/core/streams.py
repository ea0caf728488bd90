"""Writing to streams, of asyncio's event loop and of uvloop's alike."""

from __future__ import annotations

import asyncio
import errno


def write(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Write to a connection. Raises ConnectionResetError if it is closed, as by the other end between two calls.
    asyncio drops what is written then, and uvloop raises RuntimeError, which nobody takes for the end of one."""
    if writer.is_closing():
        raise ConnectionResetError(errno.ECONNRESET, "the connection is closed")
    writer.write(data)


def write_eof(writer: asyncio.StreamWriter) -> None:
    """End what is written to a connection. Raises as `write` does."""
    if writer.is_closing():
        raise ConnectionResetError(errno.ECONNRESET, "the connection is closed")
    writer.write_eof()


def limit_buffer(transport: asyncio.WriteTransport, most: int) -> None:
    """Have writing wait where more bytes than this aren't taken by the kernel yet; nothing where it is closed."""
    if not transport.is_closing():
        transport.set_write_buffer_limits(most)
