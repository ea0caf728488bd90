"""The host's end of a relay: doors and connections of a sandbox whose sockets can't be handed out. What is said between
the two ends stands in guest/relay.py.

Theory of operation
===================

Each connection is a pair of sockets, one of which is handed into the sandbox; the kernel does the rest. So a connection
that stands still holds up no other, and whatever is said in it is the business of those who use it. What comes over
the channel itself are messages of four bytes, and they are believed in nothing: one that makes no sense, or more of
them than there can be, ends the relay, which is this sandbox's only.

*Descriptors.* A pair is made only when somebody takes a connection, so those that wait cost none. And few are on their
way in at a time, since the kernel counts those for our user as a whole: the channel's buffer is small, and what doesn't
fit waits here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import deque
from dataclasses import dataclass, field
from typing import Any

MAX_WAITING = 128
"""Connections at all doors that may wait to be taken; the other end has as many at most."""

MAX_ASKED = 128
"""Connections into the sandbox that may be in the making."""

_MESSAGE = 4
_ON_THE_WAY = 16 << 10
"""Bytes of the kernel's that messages on their way in may take: about twenty of them."""

_MAX_UNSENT = 1024
_CONNECT_SECONDS = 10.0


class RelayClosed(OSError):
    """The sandbox is gone, or has broken the rules."""


class RelayedDoor:
    """See ports.Door. One that is listened on is readable as long as a connection waits."""

    def __init__(self, relay: Relay, port: int) -> None:
        self.port = port
        self.serial = 0
        self.waiting = 0
        self._relay = relay
        self._bell = -1

    def fileno(self) -> int:
        return self._bell

    def dup(self) -> RelayedDoor:
        return RelayedDoor(self._relay, self.port)

    def setblocking(self, flag: bool, /) -> None:
        """It never blocks."""

    def getsockname(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    def listen(self, backlog: int, /) -> None:
        self._relay.open_door(self)
        if self._bell < 0:
            self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC | os.EFD_SEMAPHORE)

    def arrived(self) -> None:
        """Called by the relay: one more waits."""
        self.waiting += 1
        os.eventfd_write(self._bell, 1)

    def accept(self) -> tuple[socket.socket, Any]:
        os.eventfd_read(self._bell)
        self.waiting -= 1
        return self._relay.hand_in(b"D", self.serial, self.port), None

    def shutdown(self, how: int, /) -> None:
        self._relay.shut_door(self)
        while self.waiting:
            self.waiting -= 1
            os.eventfd_read(self._bell)

    def close(self) -> None:
        self._relay.shut_door(self)
        if self._bell >= 0:
            os.close(self._bell)
            self._bell = -1


@dataclass(slots=True)
class _Asked:
    """A connection that the sandbox was asked to make."""

    socket: socket.socket
    made: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Relay:
    """Doors of one sandbox and connections into it, over `channel`, which is ours from here on."""

    def __init__(self, channel: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._channel = channel
        channel.setblocking(False)
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ON_THE_WAY)
        self._open: dict[int, RelayedDoor] = {}
        self._serials: dict[int, int] = {}
        self._asked: dict[int, _Asked] = {}
        self._next = 0
        self._unsent: deque[tuple[bytes, socket.socket | None]] = deque()
        self._part = b""
        self._closed = False
        self._running = False
        self._loop.add_reader(channel, self._read)

    def door(self, port: int) -> RelayedDoor:
        return RelayedDoor(self, port)

    async def connect(self, port: int) -> socket.socket | None:
        """A connection to this port of the sandbox's loopback; None where nobody takes it, or no program runs."""
        if self._closed or not self._running or len(self._asked) >= MAX_ASKED:
            return None
        while self._next in self._asked:
            self._next = (self._next + 1) % 256
        serial, self._next = self._next, (self._next + 1) % 256
        try:
            asked = self._asked[serial] = _Asked(self.hand_in(b"C", serial, port))
        except OSError:
            return None
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                made = await asyncio.shield(asked.made)
        except BaseException as error:
            # Its serial is taken until the answer is there. Its other end sees at once that nobody wants it any more.
            asked.socket.close()
            if isinstance(error, TimeoutError):
                return None
            raise
        if not made:
            asked.socket.close()
            return None
        return asked.socket

    def run_begins(self) -> None:
        self._running = True

    def run_ends(self) -> None:
        """Nobody is there any more to be connected to, nor to answer."""
        self._running = False
        self._give_up()

    def close(self) -> None:
        """End it. Connections that were taken are their takers'."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._channel)
        self._loop.remove_writer(self._channel)
        self._channel.close()
        for _, handed in self._unsent:
            if handed is not None:
                handed.close()
        self._unsent.clear()
        self._give_up()

    def _give_up(self) -> None:
        for asked in self._asked.values():
            if not asked.made.done():
                asked.made.set_result(False)

    # -- what doors call ----------------------------------------------------------------------------------------------

    def open_door(self, door: RelayedDoor) -> None:
        """Raises OSError where that can't be."""
        door.serial = self._serials[door.port] = (self._serials.get(door.port, 0) + 1) % 256
        self._send(b"L", door.serial, door.port)
        self._open[door.port] = door

    def shut_door(self, door: RelayedDoor) -> None:
        if self._open.get(door.port) is door:
            del self._open[door.port]
            with contextlib.suppress(RelayClosed):
                self._send(b"S", door.serial, door.port)

    def hand_in(self, kind: bytes, serial: int, port: int) -> socket.socket:
        """Make a connection of which the sandbox has one end; the other one. Raises OSError."""
        ours, theirs = socket.socketpair()
        try:
            self._send(kind, serial, port, theirs)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        return ours

    # -- messages -----------------------------------------------------------------------------------------------------

    def _send(self, kind: bytes, serial: int, port: int, handed: socket.socket | None = None) -> None:
        """Send, as soon as that is possible, and then close what was handed in. Raises RelayClosed."""
        if not self._closed:
            self._unsent.append((kind + bytes((serial,)) + port.to_bytes(2, "big"), handed))
            self._flush()
            if len(self._unsent) > _MAX_UNSENT:
                self.close()
        if self._closed:
            raise RelayClosed("The sandbox's relay has ended.")

    def _flush(self) -> None:
        while self._unsent:
            message, handed = self._unsent[0]
            try:
                socket.send_fds(self._channel, [message], [] if handed is None else [handed.fileno()])
            except BlockingIOError:
                self._loop.add_writer(self._channel, self._flush)
                return
            except OSError:
                self.close()
                return
            self._unsent.popleft()
            if handed is not None:
                handed.close()
        self._loop.remove_writer(self._channel)

    def _read(self) -> None:
        try:
            data = self._part + self._channel.recv(_MESSAGE << 10)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if len(data) == len(self._part):
            self.close()
            return
        whole = len(data) - len(data) % _MESSAGE
        self._part = data[whole:]
        for at in range(0, whole, _MESSAGE):
            kind, serial, port = data[at : at + 1], data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
            if not self._told(kind, serial, port):
                self.close()
                return

    def _told(self, kind: bytes, serial: int, port: int) -> bool:
        """Whether this message makes sense."""
        if kind == b"A":
            door = self._open.get(port)
            if door is None or door.serial != serial:
                return port in self._serials  # it was shut meanwhile
            door.arrived()
            return sum(one.waiting for one in self._open.values()) <= MAX_WAITING
        if kind in (b"K", b"F") and serial in self._asked:
            asked = self._asked.pop(serial)
            if not asked.made.done():
                asked.made.set_result(kind == b"K")
            return True
        return False
