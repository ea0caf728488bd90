"""How much of a connection is parsed before the event loop goes on to others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from era.api.protocol import Protocol

CHUNKS, REQUESTS, FIELDS = 200_000, 3000, 15_000
CALL = b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(params=["sound", "weak"])
def is_sound(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Weakened, a connection is parsed as far as bytes have come."""
    if request.param == "weak":
        monkeypatch.setattr(Protocol, "_parse", parse_all)
    return str(request.param) == "sound"


def parse_all(self: Protocol, data: bytes) -> None:
    self._parse_piece(memoryview(data), memoryview(b""))


class Counted(Protocol):
    """Counts heads, their fields, and pieces of bodies."""

    heads = fields = pieces = 0

    def on_url(self, url: bytes) -> None:
        Counted.fields += url.count(b"&")
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        Counted.fields += 1
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        Counted.heads += 1
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        Counted.pieces += 1
        super().on_body(body)


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers the path and the size of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message["body"])
        more = message["more_body"]
    body = f"{scope['path']} {size}\n".encode()
    head = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": body})


def most(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], count: Callable[[], int]
) -> int:
    """The most that `count` grows by in one iteration of the event loop, while a client talks."""
    seen, largest = count(), 0

    async def serve() -> None:
        loop = asyncio.get_running_loop()

        def tick() -> None:
            nonlocal seen, largest
            now = count()
            largest, seen = max(largest, now - seen), now
            loop.call_soon(tick)

        tick()
        config = uvicorn.Config(echo, http=Counted, ws="none", lifespan="off", log_config=None)
        config.load()
        server = await loop.create_server(lambda: Counted(config, ServerState(), {}), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        await talk(reader, writer)
        writer.close()
        server.close()

    asyncio.run(serve())
    return largest


def test_a_body_of_tiny_pieces(is_sound: bool) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"PUT /it HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"1\r\nx\r\n" * CHUNKS + b"0\r\n\r\n")
        assert (await reader.readuntil(b"/it %d\n" % CHUNKS)).startswith(b"HTTP/1.1 200")

    largest = most(talk, lambda: Counted.pieces)
    assert largest < 4000 if is_sound else largest > 20_000, largest


def test_many_requests_at_once(is_sound: bool) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"".join(CALL % number for number in range(REQUESTS)))
        for number in range(REQUESTS):
            assert (await reader.readuntil(b" 0\n")).endswith(b"\r\n/%d 0\n" % number)

    largest = most(talk, lambda: Counted.heads)
    assert largest < 50 if is_sound else largest > 500, largest


@pytest.mark.parametrize(
    "head", [b"GET /it HTTP/1.1\r\n" + b"a:\r\n" * FIELDS, b"GET /it?" + b"&" * FIELDS + b" HTTP/1.1\r\n"]
)
def test_a_head_of_many_fields(is_sound: bool, head: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head + b"Host: x\r\n\r\n")
        assert (await reader.readuntil(b"/it 0\n")).startswith(b"HTTP/1.1 200")

    largest = most(talk, lambda: Counted.fields)
    assert largest < FIELDS * 0.7 if is_sound else largest > FIELDS * 0.9, largest
