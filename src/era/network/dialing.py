"""Outgoing connections from this machine, to addresses that were judged before; and the addresses of names."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from ipaddress import IPv4Address, ip_address

from era.core.allowlist import Address

CONNECT_SECONDS = 10.0

type Resolve = Callable[[str, int], Awaitable[Sequence[Address]]]


async def resolve(host: str, port: int) -> Sequence[Address]:
    """The addresses of a host, by this machine's resolver. Raises OSError, and UnicodeError for what is no name.

    Each lookup has a thread of its own, since it can't be cut short: the event loop looks names up with two threads,
    and one nameserver that doesn't answer would keep everybody waiting. It is a daemon, so that the service can end.
    Who calls bounds how many there are.
    """
    addresses: Future[Sequence[Address]] = Future()
    addresses.set_running_or_notify_cancel()  # Who waits for it may be cancelled, it can't.

    def look() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            addresses.set_result([ip_address(str(place[0]).partition("%")[0]) for *_, place in found])
        except Exception as error:
            addresses.set_exception(error)

    try:
        threading.Thread(target=look, name="era-resolve", daemon=True).start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, "no thread could be started") from error
    return await asyncio.wrap_future(addresses)


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
