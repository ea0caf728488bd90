"""Connections to the world, once it's decided that they may be made."""

from __future__ import annotations

import asyncio
import os
import socket
from ipaddress import IPv4Address

from era.core.allowlist import Address
from era.network.policy import Rule

CONNECT_SECONDS = 10.0

NO_RULE = Rule("not_in_allowlist", "the session's egress.allow doesn't have it")


async def connected(address: Address, port: int) -> socket.socket:
    """A connection to this very address. Raises OSError, of which TimeoutError is one."""
    family = socket.AF_INET if isinstance(address, IPv4Address) else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            await asyncio.get_running_loop().sock_connect(sock, (str(address), port))
    except BaseException:
        sock.close()
        raise
    return sock


def told(error: Exception) -> str:
    """What is wrong, in the system's words."""
    if isinstance(error, socket.gaierror):
        return str(error.strerror).lower()
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()  # the event loop's own words name the address once more
    return "that is no host name"
