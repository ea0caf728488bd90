"""`era mcp`: the tools for models over standard input and output, for programs that start their tools themselves."""

from __future__ import annotations

import asyncio
import os

from era.client.failure import Failure
from era.client.options import DEFAULT_SERVER, Server


def mcp(*, server: Server = DEFAULT_SERVER) -> None:
    """Serve tools to a model by the Model Context Protocol, on standard input and output.

    They run code on a server, and work in its sessions. A server with a key wants it in ERA_API_KEY. Programs that
    speak the protocol over HTTP need no command: the server has it at /mcp.

    Examples:

        era mcp
        era mcp --server http://era.internal:8787

    Parameters
    ----------
    server
        The server's address.
    """
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

    key = os.environ.get("ERA_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    verify = not server.startswith("http://")

    async def serve() -> None:
        timeout = httpx.Timeout(None, connect=10.0)
        async with (
            httpx.AsyncClient(base_url=server, timeout=timeout, trust_env=False, verify=verify) as client,
            stdio_server() as (read, write),
        ):
            tools = mcp_server(__version__, lambda _: Calls(client, headers))
            await tools.run(read, write, tools.create_initialization_options())

    asyncio.run(serve())
