"""Answers that nobody reads come to an end: the connection is cut, and what was held for it is let go."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
import uvloop
from starlette.types import Receive, Scope, Send

from era.api.protocol import protocol
from era.api.protocol.protocol import Protocol
from tests.api.connections import serving

PIECE, PIECES = 64 << 10, 400
WHOLE = PIECE * PIECES
"""More than kernels hold of a connection."""

BOTH_LOOPS = pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  nothing tells of it
        await asyncio.sleep(0.001)


class Service:
    """Serves one connection, whose client reads only what it is told to."""

    def __init__(self, connection: Protocol, client: socket.socket, held: set[object]) -> None:
        self.connection = connection
        self.client = client
        self.held = held
        """What answers under way hold."""

    async def read(self, size: int) -> int:
        """Read so many bytes, or all up to the end. How many they were."""
        count, loop = 0, asyncio.get_running_loop()
        while count < size and (piece := await loop.sock_recv(self.client, min(size - count, 1 << 20))):
            count += len(piece)
        return count

    @property
    def waits(self) -> bool:
        """Whether nothing more can be written."""
        return self.connection.flow.write_paused

    @property
    def is_open(self) -> bool:
        return self.connection in self.connection.connections


async def answer(scope: Scope, receive: Receive, send: Send, held: set[object]) -> None:
    """An answer in pieces, or in one piece where that is asked for."""
    kept = object()
    held.add(kept)
    try:
        head = [(b"content-length", b"%d" % WHOLE)]
        head += [(b"connection", b"close")] if scope["path"] == "/in-one" else []
        await send({"type": "http.response.start", "status": 200, "headers": head})
        if scope["path"] == "/in-one":
            await send({"type": "http.response.body", "body": bytes(WHOLE)})
            return
        for left in reversed(range(PIECES)):
            await send({"type": "http.response.body", "body": bytes(PIECE), "more_body": left > 0})
    finally:
        held.discard(kept)


@asynccontextmanager
async def served(path: bytes) -> AsyncIterator[Service]:
    held: set[object] = set()
    loop = asyncio.get_running_loop()
    async with serving(partial(answer, held=held)) as (made, address):
        with socket.socket() as client:
            client.setblocking(False)
            await loop.sock_connect(client, address)
            await loop.sock_sendall(client, b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path)
            await until(lambda: bool(made) and made[0].flow is not None)
            yield Service(made[0], client, held)


def run(loop: Callable[[], asyncio.AbstractEventLoop], test: Callable[[], Awaitable[None]]) -> None:
    async def timed() -> None:
        async with asyncio.timeout(60):
            await test()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(timed())


@BOTH_LOOPS
@pytest.mark.parametrize("path", [b"/", b"/in-one"])
@pytest.mark.parametrize("is_sound", [True, False], ids=["", "weakened"])
def test_an_answer_of_which_nothing_is_taken(
    loop: Callable[[], asyncio.AbstractEventLoop], path: bytes, is_sound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_sound:
        monkeypatch.setattr(protocol, "acknowledged", lambda _: None)

    async def test() -> None:
        async with served(path) as service:
            await until(lambda: service.waits)
            service.connection.look_whether_read()
            assert service.is_open
            assert bool(service.held) is (path == b"/")
            service.connection.look_whether_read()
            for _ in range(100):
                await asyncio.sleep(0.001)
            assert service.is_open is not is_sound
            assert is_sound <= (not service.held)
            assert service.connection.transport.get_write_buffer_size() == 0 or not is_sound

    run(loop, test)


def test_a_connection_on_which_nothing_waits_may_be_idle() -> None:
    async def test() -> None:
        async with served(b"/") as service:
            await until(lambda: service.waits)
            await service.read(WHOLE)
            await until(lambda: not service.held)
            for _ in range(5):
                service.connection.look_whether_read()
            assert service.is_open

    run(uvloop.new_event_loop, test)
