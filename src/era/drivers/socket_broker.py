"""The host's end of a broker: sockets of a sandbox's own network, and connections to programs in there. The other end
is guest/socket_broker.py."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress

from era.drivers.guest import OWN_PORTS

_SOCKETS_SECONDS = 10.0
_ANSWER_SECONDS = 2.0
"""For connecting to a program. An answer comes at once while one runs; between two, nobody listens either."""

_CONNECT_SECONDS = 5.0
"""A loopback connection takes that long only where a listener's queue is full."""

_FIRST, _MOST = 2, 16
"""Sockets of a kind that are asked for: each time twice as many as before."""

_KINDS = {
    (socket.AF_INET, socket.SOCK_STREAM): b"t",
    (socket.AF_INET, socket.SOCK_DGRAM): b"u",
    (socket.AF_INET6, socket.SOCK_STREAM): b"T",
    (socket.AF_INET6, socket.SOCK_DGRAM): b"U",
}
_LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


class SocketBroker:
    """See ports.SocketBroker. `sock` is ours from here on."""

    def __init__(self, sock: socket.socket, *, asks: bool) -> None:
        self.asks = asks
        self.pid: int = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._stock: defaultdict[bytes, deque[socket.socket]] = defaultdict(deque)
        self._wanted: dict[bytes, asyncio.Future[int]] = {}
        self._next: dict[bytes, int] = {}
        self._listener = -1
        self._taker: Callable[[int], None] | None = None
        sock.setblocking(False)
        self._loop.add_reader(sock, self._told)

    def close(self) -> None:
        if self._sock.fileno() < 0:
            return
        self._loop.remove_reader(self._sock)
        self._sock.close()
        self.tidy()
        for waiting in self._wanted.values():
            waiting.cancel()
        self._keep(-1)
        if self._taker is not None:
            self._taker(-1)

    async def new_socket(self, family: int, kind: int) -> socket.socket:
        letter = _KINDS[socket.AddressFamily(family), socket.SocketKind(kind)]
        while not self._stock[letter]:
            if letter not in self._wanted:
                count = self._next.get(letter, _FIRST)
                self._sock.send(letter + bytes([count]))
                self._next[letter] = min(2 * count, _MOST)
                self._wanted[letter] = self._loop.create_future()
            wanted = self._wanted[letter]
            await asyncio.wait({wanted}, timeout=_SOCKETS_SECONDS)
            if not wanted.done() or wanted.cancelled():
                raise OSError(errno.ENOBUFS, "the sandbox gives no sockets")
            if not wanted.result():
                raise OSError(errno.EAFNOSUPPORT, "the sandbox has no such sockets")
            # Others may have been faster, and taken them all.
        return self._stock[letter].popleft()

    def give_back(self, sock: socket.socket) -> None:
        self._stock[_KINDS[sock.family, sock.type]].appendleft(sock)

    def tidy(self) -> None:
        """Close what isn't used: sandboxes that only live need no more than they had."""
        for stock in self._stock.values():
            for sock in stock:
                sock.close()
            stock.clear()
        self._next.clear()

    def questions_to(self, taker: Callable[[int], None]) -> None:
        self._taker = taker
        with suppress(OSError):  # it's gone, and that will be told
            self._sock.send(b"L")
        if self._listener >= 0:
            listener, self._listener = self._listener, -1
            taker(listener)

    async def connect(self, port: int) -> socket.socket | None:
        """See ports.Sandbox."""
        if port in OWN_PORTS:
            return None
        for family, address in _LOOPBACK.items():
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    sock = await self.new_socket(family, socket.SOCK_STREAM)
            except OSError:  # a kernel without IPv6, or a program that has taken all there is
                return None
            try:
                async with asyncio.timeout(_CONNECT_SECONDS):
                    sock.setblocking(False)
                    await self._loop.sock_connect(sock, (address, port))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError:
                sock.close()
            except BaseException:
                sock.close()
                raise
            else:
                return sock
        return None

    def _told(self) -> None:
        try:
            kind, descriptors, _, _ = socket.recv_fds(self._sock, 16, _MOST, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            kind, descriptors = b"", []
        if kind == b"L" and descriptors:
            if self._taker is None:
                self._keep(descriptors[0])
            else:
                self._taker(descriptors[0])
        elif (waiting := self._wanted.pop(kind, None)) is not None:
            self._stock[kind].extend(socket.socket(fileno=one) for one in descriptors)
            if not waiting.done():
                waiting.set_result(len(descriptors))
        else:
            for one in descriptors:
                os.close(one)
            self.close()

    def _keep(self, listener: int) -> None:
        """The last one, for a taker that may come."""
        if self._listener >= 0:
            os.close(self._listener)
        self._listener = listener
