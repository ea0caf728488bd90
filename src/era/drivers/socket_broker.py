"""The host's end of a socket broker: sockets of a sandbox's own network, and connections to programs in there.

guest/socket_broker.py is the other end, and has the wire format.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from era.core.concurrency.outages import note_outage
from era.drivers.guest import OWN_PORTS

_SOCKETS_LOOKS = (10.0, 0.2)
"""Seconds for which sockets from the broker are waited for, look by look: an event loop that stood still hears that a
look is over before it hears of the answer that came meanwhile."""

_CONNECT_LOOKS = (2.0, 0.2)
"""The same for sockets with which to connect to a program. The broker answers at once while one runs; between two runs
there is nothing to connect to."""

_CONNECT_SECONDS = 5.0
"""A loopback connection takes that long only where a listener's backlog is full."""

_BATCH = 8
"""Sockets of a kind that are asked for at a time."""

_KINDS = {
    (socket.AF_INET, socket.SOCK_STREAM): b"t",
    (socket.AF_INET, socket.SOCK_DGRAM): b"u",
    (socket.AF_INET6, socket.SOCK_STREAM): b"T",
    (socket.AF_INET6, socket.SOCK_DGRAM): b"U",
}
_LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


class SocketBroker:
    """See ports.SocketBroker."""

    def __init__(self, sock: socket.socket, *, can_supervise: bool) -> None:
        """`sock` is owned by this object from here on."""
        self.can_supervise = can_supervise
        self.pid: int = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._stock: defaultdict[bytes, deque[socket.socket]] = defaultdict(deque)
        """Sockets that nobody has wanted yet, by their kind."""

        self._requests: dict[bytes, asyncio.Future[int]] = {}
        """By kind: how many sockets came, once they have; -1 where this process has no descriptor for any."""

        self._notify_fd = -1
        """The last one, kept for the callback."""

        self._on_notify_fd: Callable[[int], None] | None = None
        sock.setblocking(False)
        self._loop.add_reader(sock, self._receive)

    @property
    def alive(self) -> bool:
        return self._sock.fileno() >= 0

    def close(self) -> None:
        if self._sock.fileno() < 0:
            return
        self._loop.remove_reader(self._sock)
        self._sock.close()
        self.tidy()
        for request in self._requests.values():
            request.cancel()
        self._keep_notify_fd(-1)
        if self._on_notify_fd is not None:
            self._on_notify_fd(-1)

    async def new_socket(self, family: int, kind: int, looks: Sequence[float] = _SOCKETS_LOOKS) -> socket.socket:
        letter = _KINDS[socket.AddressFamily(family), socket.SocketKind(kind)]
        while not self._stock[letter]:
            if letter not in self._requests:
                self._sock.send(letter + bytes([_BATCH]))
                self._requests[letter] = self._loop.create_future()
            request = self._requests[letter]
            for seconds in looks:
                if not request.done():
                    await asyncio.wait({request}, timeout=seconds)
            if not request.done() or request.cancelled():
                raise OSError(errno.ENOBUFS, "the sandbox gives no sockets")
            if request.result() < 0:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            if not request.result():
                raise OSError(errno.EAFNOSUPPORT, "the sandbox has no such sockets")
            # Other callers may have taken all of them meanwhile.
        return self._stock[letter].popleft()

    def give_back(self, sock: socket.socket) -> None:
        self._stock[_KINDS[sock.family, sock.type]].appendleft(sock)

    def tidy(self) -> None:
        """Close the sockets in stock. A sandbox in which nothing runs needs none."""
        for stock in self._stock.values():
            for sock in stock:
                sock.close()
            stock.clear()

    def on_notify_fd(self, callback: Callable[[int], None]) -> None:
        self._on_notify_fd = callback
        with suppress(OSError):  # the sandbox is gone, and `_receive` will find that out
            self._sock.send(b"L")
        if self._notify_fd >= 0:
            notify_fd, self._notify_fd = self._notify_fd, -1
            callback(notify_fd)

    async def connect(self, port: int) -> socket.socket | None:
        """See ports.Sandbox."""
        if port in OWN_PORTS:
            return None
        for family, address in _LOOPBACK.items():
            try:
                sock = await self.new_socket(family, socket.SOCK_STREAM, _CONNECT_LOOKS)
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

    def _receive(self) -> None:
        """Take one message of the guest's. One that wasn't asked for, or its end, closes this broker; and so does a
        notification descriptor that this process has no room for, as there is no second one."""
        try:
            kind, descriptors, flags, _ = socket.recv_fds(self._sock, 16, _BATCH, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            kind, descriptors, flags = b"", [], 0
        if is_cut := bool(flags & socket.MSG_CTRUNC):
            note_outage("descriptors_not_received", OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
        if kind == b"L" and descriptors:
            if self._on_notify_fd is None:
                self._keep_notify_fd(descriptors[0])
            else:
                self._on_notify_fd(descriptors[0])
        elif (request := self._requests.pop(kind, None)) is not None:
            self._stock[kind].extend(socket.socket(fileno=fd) for fd in descriptors)
            if not request.done():
                request.set_result(len(descriptors) or -is_cut)
        else:
            for fd in descriptors:
                os.close(fd)
            self.close()

    def _keep_notify_fd(self, notify_fd: int) -> None:
        if self._notify_fd >= 0:
            os.close(self._notify_fd)
        self._notify_fd = notify_fd
