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
