"""Programs that hang up before they have been asked anything."""

from __future__ import annotations

import socket
import struct
from types import SimpleNamespace
from typing import Any, cast

import pytest
from starlette.types import Message

from era.api.protocol.tunnel import connect
from era.api.routes.proxy import _ToProgram
from era.errors import RelayFailed


async def test_a_reset_connection_is_the_programs_failure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        calling = socket.create_connection(listening.getsockname())
        accepted, _ = listening.accept()
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        accepted.close()
    calling.setblocking(False)
    reader, writer = await connect(sock=calling)
    assert await reader.read(1) == b""
    assert writer.is_closing()
    connection = SimpleNamespace(upgrading=False)
    scope: dict[str, Any] = {"method": "GET", "headers": [], "query_string": b"", "client": None}
    scope |= {"extensions": {"era.connection": connection}}
    place = SimpleNamespace(cookie_path="/proxy/x/3000/", own_origin=None)
    target = cast("Any", SimpleNamespace(path=b"/", scheme="http", prefix="", place=place, key=None))
    live = cast("Any", SimpleNamespace(run_id=None))

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        raise AssertionError(message)

    with pytest.raises(RelayFailed, match="hung up before it had answered"):
        await _ToProgram(scope, receive, send, live, target, reader, writer).run()
