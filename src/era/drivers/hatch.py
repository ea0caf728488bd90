"""The host's end of a hatch: connections to programs inside a sandbox. The other end is guest/hatch.py."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress

from era.drivers.guest import OWN_PORTS

_ANSWER_SECONDS = 2.0
"""An answer comes at once while a program runs. Between two programs nobody answers, and nobody listens either."""

_CONNECT_SECONDS = 5.0
"""A loopback connection takes that long only where a listener's queue is full."""

_ADDRESSES = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


class Hatch:
    """Asks one question at a time. A question that nobody waits for any more is answered in the next run; its sockets
    do as well as any, since none is connected."""

    def __init__(self, hatch: socket.socket) -> None:
        hatch.setblocking(False)
        self._hatch = hatch
        self._lock = asyncio.Lock()
        self._readable = asyncio.Event()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._hatch)
        self._hatch.close()
        self._readable.set()

    async def connect(self, port: int) -> socket.socket | None:
        """See ports.Sandbox."""
        if port in OWN_PORTS:
            return None
        async with self._lock:
            found = await self._sockets()
        connected = None
        try:
            for one in found:
                if connected is None and await _is_connected(one, port):
                    connected = one
        finally:
            for one in found:
                if one is not connected:
                    one.close()
        return connected

    async def _sockets(self) -> list[socket.socket]:
        """Sockets of the sandbox's own, connected to nothing: none where nobody answers."""
        loop = asyncio.get_running_loop()
        self._readable.clear()
        try:
            self._hatch.send(b"?")
            loop.add_reader(self._hatch, self._readable.set)
        except OSError:
            return []
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await self._readable.wait()
            _, descriptors, _, _ = socket.recv_fds(self._hatch, 1, 2, socket.MSG_CMSG_CLOEXEC)
        except (OSError, TimeoutError):
            return []
        finally:
            if self._hatch.fileno() >= 0:
                loop.remove_reader(self._hatch)
        return [socket.socket(fileno=descriptor) for descriptor in descriptors]


async def _is_connected(sock: socket.socket, port: int) -> bool:
    sock.setblocking(False)
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(_CONNECT_SECONDS):
            await asyncio.get_running_loop().sock_connect(sock, (_ADDRESSES[sock.family], port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return True
    return False
