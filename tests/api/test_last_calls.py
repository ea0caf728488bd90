"""Calls that other hosts of a cluster pass on to one that stops: the last ones are answered, too."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from era.api.protocol import REUSED_SECONDS, Protocol

CALL = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    scope["extensions"]["era.connection"].of_host = True  # as the guard finds it
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def received(reader: asyncio.StreamReader) -> bytes:
    return await reader.readuntil(b"\r\n\r\n") + await reader.readexactly(2)


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[list[Protocol], tuple[str, int]]]:
    """Serves; the connections so far, and where."""
    made: list[Protocol] = []

    def make() -> Protocol:
        made.append(Protocol(config, ServerState(), {}))
        return made[-1]

    config = uvicorn.Config(answer, http=Protocol, ws="none", lifespan="off", log_config=None)
    config.load()
    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
    async with server, asyncio.timeout(60):
        yield made, server.sockets[0].getsockname()


@pytest.mark.parametrize("used", [True, False])
async def test_a_call_that_is_on_its_way_when_a_host_stops_is_answered(used: bool) -> None:
    loop = asyncio.get_running_loop()
    async with serving() as (made, address):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(CALL)
        assert b"connection: close" not in await received(reader)
        stopped = loop.time()
        made[0].shutdown()
        if used:
            writer.write(CALL)
            # The next call goes elsewhere.
            assert b"connection: close" in await received(reader)
        assert await reader.read() == b""
        # As long as it may be used again it is there.
        assert used or loop.time() - stopped > REUSED_SECONDS
        writer.close()
        await writer.wait_closed()


async def test_a_call_that_came_while_a_host_that_stops_stood_still_is_answered() -> None:
    """It is there, but not read yet, when it is looked whether the connection is unused."""
    async with serving() as (made, address):
        caller = socket.create_connection(address)
        reader, writer = await asyncio.open_connection(sock=caller.dup())
        writer.write(CALL)
        await received(reader)
        made[0].shutdown()
        with caller:
            caller.send(CALL)
        made[0]._idle_since = asyncio.get_running_loop().time() - 60
        made[0]._close_once_unused()
        assert b"connection: close" in await received(reader)
        writer.close()
