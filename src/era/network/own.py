"""Programs that call this service itself, by ERA_BASE_URL and ERA_PROXY_URL.

Theory of operation. The machine and its loopback are closed to programs, and without a key the API is open to the whole
machine. So nobody is connected to the service. Who connects to its address finds this, which reads one request, passes
on exactly that and its body if it's for what is open to everybody, and closes. Nothing else that was sent gets there.
"""

from __future__ import annotations

import asyncio
import re
import socket
from urllib.parse import unquote_to_bytes

from era.network.http1 import (
    CHUNK,
    HEAD_SECONDS,
    IDLE_SECONDS,
    LINE,
    Ends,
    Refused,
    Traffic,
    answered,
    end_to_end,
    fields_of,
)

type Place = tuple[str, int]

_OPEN = re.compile(rb"/(proxy/.*|health)", re.DOTALL)
_DIGITS = re.compile(rb"[0-9]{1,18}")


async def serve(client: socket.socket, service: Place, traffic: Traffic) -> None:
    """Answer one request. The caller closes `client`."""
    await answered(client, lambda ends: _serve(ends, service, traffic))


async def _serve(ends: Ends, service: Place, traffic: Traffic) -> None:
    async with asyncio.timeout(HEAD_SECONDS):
        head = await ends[0].readuntil(b"\r\n\r\n")
    await _pass_on(ends, *_checked(head), service, traffic)


def _checked(head: bytes) -> tuple[bytes, int, bool]:
    """The head to pass on, the size of the body, and whether the client waits to be asked for it. Raises Refused."""
    first, *lines = head[:-4].split(b"\r\n")
    match = LINE.fullmatch(first)
    if match is None:
        raise Refused(400, "bad_request", "this is no HTTP request")
    path = unquote_to_bytes(match[2].partition(b"?")[0])
    if not _OPEN.fullmatch(path) or b".." in path.split(b"/"):
        raise Refused(403, "not_public", "programs may call /proxy/… and /health here, and nothing else")
    fields = fields_of(lines, 400)
    named = {name.lower(): value for name, value in fields}
    sizes = [value for name, value in fields if name.lower() == b"content-length"]
    if b"transfer-encoding" in named:
        raise Refused(411, "no_length", "a body must come with its Content-Length here")
    if len(sizes) > 1 or not all(map(_DIGITS.fullmatch, sizes)):
        raise Refused(400, "bad_header", "the Content-Length is malformed")
    kept = [
        (name, value)
        for name, value in end_to_end(fields)
        if name.lower() not in (b"expect", b"forwarded") and not name.lower().startswith(b"x-forwarded-")
    ]
    lines = [match[1] + b" " + match[2] + b" HTTP/1.1", *(name + b": " + value for name, value in kept)]
    asks = named.get(b"expect", b"").lower() == b"100-continue"
    return b"\r\n".join([*lines, b"Connection: close", b"", b""]), int(sizes[0]) if sizes else 0, asks


async def _pass_on(
    client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    head: bytes,
    size: int,
    asks: bool,
    service: Place,
    traffic: Traffic,
) -> None:
    reader, writer = await asyncio.open_connection(*service, limit=CHUNK)
    loop = asyncio.get_running_loop()

    async def body() -> None:
        left = size
        while left and (piece := await client[0].read(min(left, CHUNK))):
            left -= len(piece)
            await passed(writer, piece)
            traffic.sent += len(piece)

    async def passed(sink: asyncio.StreamWriter, piece: bytes) -> None:
        clock.reschedule(loop.time() + IDLE_SECONDS)
        sink.write(piece)
        await sink.drain()

    try:
        async with asyncio.timeout(IDLE_SECONDS) as clock:
            writer.write(head)
            traffic.sent += len(head)
            if asks:
                client[1].write(b"HTTP/1.1 100 Continue\r\n\r\n")
            sending = loop.create_task(body())
            try:
                while piece := await reader.read(CHUNK):
                    traffic.received += len(piece)
                    await passed(client[1], piece)
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
            client[1].write_eof()
            client[1].transport.set_write_buffer_limits(0)
            await client[1].drain()
    finally:
        writer.transport.abort()
