"""Outgoing connections from this machine, to addresses that were judged before."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import IPv4Address

from era.core.allowlist import Address

CONNECT_SECONDS = 10.0


def family(address: Address) -> socket.AddressFamily:
    return socket.AF_INET if isinstance(address, IPv4Address) else socket.AF_INET6


async def connect(address: Address, port: int) -> socket.socket:
    """A TCP connection to this address, non-blocking. Raises OSError, and TimeoutError (which is one) after
    CONNECT_SECONDS."""
    sock = socket.socket(family(address), socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            await asyncio.get_running_loop().sock_connect(sock, (str(address), port))
    except BaseException:
        sock.close()
        raise
    return sock
