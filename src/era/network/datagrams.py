"""Datagrams between programs and one destination.

A socket in the sandbox has the destination's own address and port, so answers come from where a program sent to. Each
socket of a program that sends here gets one of its own out there.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import Any

from era.network.http1 import Traffic
from era.network.seccomp_notify import Target

_MOST = 64
"""Sockets of programs that one destination knows at a time; the oldest are forgotten."""

_AT_ONCE = 32
_LARGEST = 1 << 16


class Datagrams:
    """`inside` is bound and becomes ours."""

    def __init__(self, inside: socket.socket, target: Target, traffic: Traffic) -> None:
        self._inside, self._target, self._traffic = inside, target, traffic
        self._outside: dict[Any, socket.socket] = {}
        self._loop = asyncio.get_running_loop()
        inside.setblocking(False)
        self._loop.add_reader(inside, self._out)

    def close(self) -> None:
        self._loop.remove_reader(self._inside)
        self._inside.close()
        for who in list(self._outside):
            self._forget(who)

    def _out(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                data, who = self._inside.recvfrom(_LARGEST)
            except OSError:
                return
            with suppress(OSError):  # datagrams may be lost
                self._of(who).send(data)
                self._traffic.sent += len(data)

    def _of(self, who: Any) -> socket.socket:
        """The socket out there for this one inside. Raises OSError."""
        outside = self._outside.pop(who, None)
        if outside is None:
            if len(self._outside) >= _MOST:
                self._forget(next(iter(self._outside)))
            address, port = self._target
            outside = socket.socket(self._inside.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            try:
                outside.connect((str(address), port))
            except OSError:
                outside.close()
                raise
            self._loop.add_reader(outside, self._back, outside, who)
        self._outside[who] = outside
        return outside

    def _back(self, outside: socket.socket, who: Any) -> None:
        for _ in range(_AT_ONCE):
            try:
                data = outside.recv(_LARGEST)
            except OSError:  # nothing more for now, or nobody listens there
                return
            with suppress(OSError):
                self._inside.sendto(data, who)
                self._traffic.received += len(data)

    def _forget(self, who: Any) -> None:
        outside = self._outside.pop(who)
        self._loop.remove_reader(outside)
        outside.close()
