"""`era mcp`: the tools for models over standard input and output, for programs that start their tools themselves."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

from era.client.command import Command
from era.client.failure import Failure
from era.client.servers import Servers
from era.sdk.calls import address, authorization


def mcp(named: Any) -> None:
    try:
        import httpx
        from mcp.server.stdio import stdio_server

        from era import __version__
        from era.mcp.calls import Calls
        from era.mcp.protocol import mcp_server
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "era":
            raise
        raise Failure(f"This needs more ({error.name} is missing): pip install 'era-sessions[mcp]'") from None

    server, key = Servers().find(named.server)
    server, headers = address(server), authorization(key)
    # The machine's own authorities, as all other commands have them; httpx has a list of its own.
    verify: ssl.SSLContext | bool = False if server.startswith("http://") else ssl.create_default_context()

    async def serve() -> None:
        timeout = httpx.Timeout(None, connect=10.0)
        async with (
            httpx.AsyncClient(base_url=server, timeout=timeout, trust_env=False, verify=verify) as client,
            stdio_server() as (read, write),
        ):
            tools = mcp_server(__version__, lambda _: Calls(client, headers))
            await tools.run(read, write, tools.create_initialization_options())

    asyncio.run(serve())


COMMANDS = {
    "mcp": Command(
        "Serve tools to a model by the Model Context Protocol, on standard input and output.\n\nThey run code on a "
        "server, and work in its sessions. Programs that speak the protocol over HTTP need no\ncommand: the server has "
        "it at /mcp.",
        mcp,
        ["era mcp", "era mcp --server http://era.internal:8787"],
        has_json=False,
    )
}
