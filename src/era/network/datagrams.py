"""Datagrams between the programs of a run and one destination.

A socket in the sandbox has the destination's own address and port, so answers come from where a program sent to. Each
sender in the sandbox gets a socket of its own on this machine, so that answers find their way back.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import Any

from era.network.destinations import Traffic
from era.network.sandbox_sockets import Target

_MAX_SENDERS = 64
"""In the sandbox that one destination knows at a time; those that sent least lately are forgotten."""

_BURST = 32
"""Datagrams that are passed on before the event loop goes on."""

_MAX_BYTES = 1 << 16


class DatagramRelay:
    """Passes datagrams on in both directions until `close`."""

    def __init__(self, inside: socket.socket, target: Target, traffic: Traffic) -> None:
        """`inside` is a bound socket of the sandbox's network, and becomes ours."""
        self._inside, self._target, self._traffic = inside, target, traffic
        self._outside: dict[Any, socket.socket] = {}
        """By the sender's address in the sandbox."""

        self._loop = asyncio.get_running_loop()
        inside.setblocking(False)
        self._loop.add_reader(inside, self._send_out)

    def close(self) -> None:
        self._loop.remove_reader(self._inside)
        self._inside.close()
        for sender in list(self._outside):
            self._forget(sender)

    def _send_out(self) -> None:
        """Pass on datagrams of programs, up to _BURST at a time."""
        for _ in range(_BURST):
            try:
                data, sender = self._inside.recvfrom(_MAX_BYTES)
            except OSError:
                return
            with suppress(OSError):  # datagrams may be lost
                self._outside_socket(sender).send(data)
                self._traffic.sent += len(data)

    def _outside_socket(self, sender: Any) -> socket.socket:
        """The socket on this machine for a sender in the sandbox. Raises OSError."""
        outside = self._outside.pop(sender, None)
        if outside is None:
            if len(self._outside) >= _MAX_SENDERS:
                self._forget(next(iter(self._outside)))
            address, port = self._target
            outside = socket.socket(self._inside.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            try:
                outside.connect((str(address), port))
            except OSError:
                outside.close()
                raise
            self._loop.add_reader(outside, self._send_back, outside, sender)
        self._outside[sender] = outside  # which puts it last, as the one that sent most lately
        return outside

    def _send_back(self, outside: socket.socket, sender: Any) -> None:
        """Pass on answers to one sender in the sandbox, up to _BURST at a time."""
        for _ in range(_BURST):
            try:
                data = outside.recv(_MAX_BYTES)
            except OSError:  # nothing more for now, or nobody listens there
                return
            with suppress(OSError):
                self._inside.sendto(data, sender)
                self._traffic.received += len(data)

    def _forget(self, sender: Any) -> None:
        outside = self._outside.pop(sender)
        self._loop.remove_reader(outside)
        outside.close()
