"""Calls that other hosts of a cluster pass on to one that stops: the last ones are answered, too."""

from __future__ import annotations

import asyncio
import socket

import pytest
from starlette.types import Receive, Scope, Send

from era.api.protocol.protocol import REUSED_SECONDS
from tests.api.connections import serving

CALL = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    scope["extensions"]["era.connection"].of_host = True  # as the guard finds it
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def received(reader: asyncio.StreamReader) -> bytes:
    return await reader.readuntil(b"\r\n\r\n") + await reader.readexactly(2)


@pytest.mark.parametrize("used", [True, False])
async def test_a_call_that_is_on_its_way_when_a_host_stops_is_answered(used: bool) -> None:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(60), serving(answer) as (made, address):
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
    async with asyncio.timeout(60), serving(answer) as (made, address):
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
