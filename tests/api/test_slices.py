"""How much of a connection is parsed, or followed, before the event loop goes on to others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from era.api.protocol import protocol
from era.api.protocol.protocol import MAX_FIELDS, Protocol
from era.api.protocol.tunnel import PIECE, Tunnel, connect
from era.api.routes import terminals
from era.api.routes.terminals import WebSocket
from era.core.concurrency import frames, meter
from tests.api.connections import serving
from tests.unit.core import until
from tests.unit.test_frames import masked

SHORT = 5e-5
"""Seconds of a slice in which no more than a few frames are parsed, however fast this machine is."""

CHUNKS, REQUESTS, FIELDS = 200_000, 3000, 15_000
CALL = b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(params=["sound", "weak"])
def is_sound(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Weakened, a connection is parsed as far as bytes have come."""
    monkeypatch.setattr(meter, "SLICE", SHORT)
    if request.param == "weak":
        monkeypatch.setattr(Protocol, "_parse", parse_all)
    return str(request.param) == "sound"


def parse_all(self: Protocol, data: bytes, **_: bool) -> None:
    self._parse_piece(memoryview(data), memoryview(b""))


class Counted(Protocol):
    """Counts heads, and pieces of bodies."""

    heads = pieces = 0

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
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    count: Callable[[], int],
    app: ASGIApp = echo,
) -> int:
    """The most that `count` grows by in one iteration of the event loop, while a client talks."""
    seen, largest = count(), 0

    async def serve() -> None:
        meter.install()
        loop = asyncio.get_running_loop()

        def tick() -> None:
            nonlocal seen, largest
            now = count()
            largest, seen = max(largest, now - seen), now
            loop.call_soon(tick)

        tick()
        async with serving(app, Counted) as (_, address):
            reader, writer = await asyncio.open_connection(*address)
            await talk(reader, writer)
            writer.close()

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


def test_a_request_with_too_many_header_fields_gets_431(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(fields: int, status: bytes) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"GET /it HTTP/1.1\r\n" + b"a:\r\n" * (fields - 1) + b"Host: x\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 " + status)

        return talk

    most(of(MAX_FIELDS, b"200"), lambda: 0)
    most(of(MAX_FIELDS + 1, b"431"), lambda: 0)
    monkeypatch.setattr(protocol, "MAX_FIELDS", FIELDS)
    most(of(MAX_FIELDS + 1, b"200"), lambda: 0)


@pytest.mark.parametrize("turn_seconds", [0.05, 0.4])
async def test_connection_with_a_request_that_waited_for_its_turn_is_not_idle(
    monkeypatch: pytest.MonkeyPatch, turn_seconds: float
) -> None:
    async def turn(*, begins: bool = False) -> None:
        await asyncio.sleep(turn_seconds)

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.5 if scope["path"] == "/2" else 0)
        await echo(scope, receive, send)

    monkeypatch.setattr(protocol, "turn", turn)
    async with serving(slow, keep_alive=0.2) as (_, address):
        reader, writer = await asyncio.open_connection(*address)
        long = b"X: " + b"x" * 900 + b"\r\n\r\n"  # so that the last is parsed apart from the others
        writer.write(b"".join(CALL.removesuffix(b"\r\n") % number + long for number in range(3)))
        for number in range(3):
            assert (await reader.readuntil(b" 0\n")).endswith(b"\r\n/%d 0\n" % number)
        assert await reader.read() == b""  # only now
        writer.close()


@pytest.fixture(params=["sound", "weak"])
def is_paid_for(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Weakened, nobody pays."""
    monkeypatch.setattr(meter, "SLICE", float("inf") if request.param == "weak" else SHORT)
    return str(request.param) == "sound"


class Followed(frames.FrameFollower):
    """Counts frames that were followed."""

    count = 0

    def follow(self, data: bytes) -> int:
        count = super().follow(data)
        Followed.count += count
        return count


@pytest.fixture(autouse=True)
def followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Followed, "count", 0)
    monkeypatch.setattr(frames, "FrameFollower", Followed)


UPGRADE = b"GET /proxy/x/1/ HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
EMPTY, TINY = masked(frames.PONG, b""), masked(frames.BINARY, b"x")
LONG_TIME = 120.0


def is_full(reader: asyncio.StreamReader) -> bool:
    """It takes no more before something of it is read."""
    return len(reader._buffer) > 2 * PIECE  # type: ignore[attr-defined]  # nothing tells of it


@pytest.mark.parametrize("way", ["down", "up"])
def test_a_passed_on_websocket_of_tiny_frames(is_paid_for: bool, way: str) -> None:
    """It is followed a piece at a time, which may be many frames."""
    frame = EMPTY if way == "up" else frames.made(frames.PONG, b"")
    total = 4 * PIECE // len(frame)

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if way == "down":
            writer.write(frame * total)
        while await reader.read(PIECE):
            pass
        writer.close()

    async def pass_on(scope: Scope, _: Receive, __: Send) -> None:
        connection = scope["extensions"]["era.connection"]
        listening = await asyncio.start_server(server, "127.0.0.1", 0)
        host, port = listening.sockets[0].getsockname()
        from_caller = connection.open_tunnel([])
        reader, writer = await connect(host=host, port=port)
        await until(lambda: is_full(from_caller if way == "up" else reader))
        try:
            await Tunnel(connection, reader, writer, lambda: None).run(from_caller, b"")
        finally:
            writer.close()
            listening.close()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(UPGRADE + (frame * total if way == "up" else b""))
        await reader.readuntil(b"\r\n\r\n")
        while way == "down" and Followed.count < total:
            await reader.read(PIECE)
        await until(lambda: Followed.count == total)

    largest = most(talk, lambda: Followed.count, pass_on)
    a_piece = PIECE // len(frame) + 1
    assert largest <= a_piece if is_paid_for else largest > 1.5 * a_piece, largest


def test_messages_of_tiny_frames(is_paid_for: bool) -> None:
    total, taken = 5000, 0

    async def take(scope: Scope, _: Receive, __: Send) -> None:
        nonlocal taken
        connection = scope["extensions"]["era.connection"]
        reader = connection.open_tunnel([])
        await until(lambda: len(reader._buffer) == total * len(TINY))
        async for _message in WebSocket(connection, reader).messages():
            taken += 1

    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(UPGRADE + TINY * total)
        await until(lambda: taken == total)

    largest = most(talk, lambda: taken, take)
    assert largest <= 100 if is_paid_for else largest > total // 2, largest


def test_tiny_frames_after_the_end(is_paid_for: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that come before the client has said that it has understood."""
    monkeypatch.setattr(terminals, "_CLOSE_SECONDS", LONG_TIME)
    total = 20_000

    async def close(scope: Scope, _: Receive, __: Send) -> None:
        connection = scope["extensions"]["era.connection"]
        reader = connection.open_tunnel([])
        await until(lambda: len(reader._buffer) == total * len(EMPTY))
        await WebSocket(connection, reader).close()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(UPGRADE + EMPTY * (total - 1) + masked(frames.CLOSE, b""))
        await until(lambda: Followed.count == total)

    largest = most(talk, lambda: Followed.count, close)
    assert largest < 4000 if is_paid_for else largest > total // 2, largest
