"""MCP clients: the official one, over HTTP in both forms of the protocol and over standard input and output."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx2
from mcp.client import Client, session
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client

from tests.client.command import environment
from tests.conftest import ERA, Server

# After 10 s the client takes a server for one of the protocol before: the first call loads the server's library, which
# takes longer where other programs have the processors.
session.DISCOVER_TIMEOUT_SECONDS = 120

WAYS = ("http", "http with a handshake", "stdio")


def used[Result](
    server: Server, way: str, work: Callable[[Client], Awaitable[Result]], *, key: str | None = None
) -> Result:
    """What `work` makes of a client that is connected in this way."""

    async def connected() -> Result:
        async with AsyncExitStack() as stack:
            transport: Any
            if way.startswith("stdio"):
                variables = {"ERA_API_KEY": key} if key else {}
                command = StdioServerParameters(command=str(ERA), args=["mcp"], env=environment(server, **variables))
                transport = stdio_client(command)
            else:
                headers = {"Authorization": f"Bearer {key}"} if key else {}
                http = await stack.enter_async_context(httpx2.AsyncClient(headers=headers, timeout=60))
                transport = streamable_http_client(f"{server.url}/mcp", http_client=http)
            mode = "legacy" if "handshake" in way else "auto"
            client = await stack.enter_async_context(Client(transport, mode=mode))
            return await work(client)

    return asyncio.run(connected())


def text_of(result: Any) -> str:
    """The text of a tool's answer."""
    return "\n".join(part.text for part in result.content if part.type == "text")
