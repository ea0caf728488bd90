"""Connections to an application that is served within the test, which can look at them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.types import ASGIApp
from uvicorn.server import ServerState

from era.api.protocol.protocol import Protocol


@asynccontextmanager
async def serving(
    app: ASGIApp, kind: type[Protocol] = Protocol, keep_alive: float = 5
) -> AsyncIterator[tuple[list[Protocol], tuple[str, int]]]:
    """Serve; the connections so far, and the address. An idle one is closed after `keep_alive` seconds."""
    config = uvicorn.Config(app, http=kind, ws="none", lifespan="off", log_config=None, interface="asgi3")
    config.timeout_keep_alive = keep_alive  # type: ignore[assignment]  # it may be any number
    config.load()
    made: list[Protocol] = []

    def make() -> Protocol:
        made.append(kind(config, ServerState(), {}))
        return made[-1]

    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
    try:
        yield made, server.sockets[0].getsockname()
    finally:
        server.close()
