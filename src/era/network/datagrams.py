"""Datagrams between the programs of a run and one destination.

A socket in the sandbox has the destination's own address and port, so answers come from where a program sent to. Each
sender in the sandbox gets a socket of its own on this machine, so that answers find their way back. There are as many
of these as the run may have descriptors. Beyond that whatever of the run's own was idle longest is closed.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from era.network.descriptors import RunDescriptors
from era.network.destinations import Traffic
from era.network.loopback import Target

_BURST = 32
"""Datagrams that are passed on before the event loop goes on."""

_MAX_BYTES = 1 << 16


class DatagramRelay:
    """Passes datagrams on in both directions until `close`."""

    def __init__(
        self,
        inside: socket.socket,
        target: Target,
        traffic: Traffic,
        descriptors: RunDescriptors,
        ended: Callable[[], None],
    ) -> None:
        """`inside` is a bound socket of the sandbox's network, and becomes ours. More are taken from the run's
        `descriptors`, which may also close this relay to make room. `ended` is called when it has been closed."""
        self._ended = ended
        self.inside, self.target, self.traffic, self.descriptors = inside, target, traffic, descriptors
        self.senders: dict[Any, _Sender] = {}
        """By their addresses in the sandbox."""

        self.loop = asyncio.get_running_loop()
        inside.setblocking(False)
        self.loop.add_reader(inside, self._send_out)
        descriptors.used(self.close)

    def close(self) -> None:
        self.loop.remove_reader(self.inside)
        self.inside.close()
        for sender in list(self.senders.values()):
            sender.forget()
        self.descriptors.ended(self.close)
        self._ended()

    def _send_out(self) -> None:
        """Pass on datagrams of programs, up to _BURST at a time."""
        self.descriptors.used(self.close)  # so it's the last that has to make room for a sender of its own
        for _ in range(_BURST):
            try:
                data, address = self.inside.recvfrom(_MAX_BYTES)
            except OSError:
                return
            with suppress(OSError):  # datagrams may be lost
                sender = self.senders.get(address) or _Sender(self, address)
                sender.send(data)


class _Sender:
    """Who sends datagrams from one address in the sandbox, and the socket on this machine that stands for it."""

    def __init__(self, relay: DatagramRelay, address: Any) -> None:
        """Raises OSError, where there is no descriptor left for it, too."""
        self._relay, self._address = relay, address
        relay.descriptors.take()
        try:
            if relay.inside.fileno() < 0:
                raise OSError(errno.ENOBUFS, "the relay itself had to make room")
            self._outside = socket.socket(relay.inside.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            try:
                self._outside.connect((str(relay.target[0]), relay.target[1]))
            except OSError:
                self._outside.close()
                raise
        except OSError:
            relay.descriptors.give_back()
            raise
        relay.loop.add_reader(self._outside, self._send_back)
        relay.senders[address] = self

    def send(self, data: bytes) -> None:
        """Raises OSError."""
        self._used()
        try:
            self._outside.send(data)
        except OSError:
            self._watch_again()
            raise
        self._relay.traffic.sent += len(data)

    def _send_back(self) -> None:
        """Pass on answers, up to _BURST at a time."""
        for _ in range(_BURST):
            try:
                data = self._outside.recv(_MAX_BYTES)
            except BlockingIOError:  # nothing more for now
                return
            except OSError:  # nobody listened there when the last datagram came
                self._watch_again()
                return
            self._used()
            with suppress(OSError):
                self._relay.inside.sendto(data, self._address)
                self._relay.traffic.received += len(data)

    def _watch_again(self) -> None:
        """Have the event loop watch on: uvloop no longer does once the kernel has said that nobody listens there, which
        whoever sends or receives next is told, and nobody again."""
        self._relay.loop.remove_reader(self._outside)
        self._relay.loop.add_reader(self._outside, self._send_back)

    def _used(self) -> None:
        self._relay.descriptors.used(self.forget)
        self._relay.descriptors.used(self._relay.close)  # after its senders: they go first

    def forget(self) -> None:
        """Close the socket. Should it send again, it gets another one."""
        del self._relay.senders[self._address]
        self._relay.loop.remove_reader(self._outside)
        self._outside.close()
        self._relay.descriptors.ended(self.forget)
        self._relay.descriptors.give_back()
