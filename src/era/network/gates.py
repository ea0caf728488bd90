"""Ways out for any client: TCP, UDP and DNS, as if the sandbox had a network.

Theory of operation
===================

A sandbox has no interface but loopback, and the kernel routes nothing anywhere else. A program that may have the
internet lives under a filter (guest/gate.py) by which the kernel asks us before each `connect`, and before a datagram
goes to an address. We read the address from the program's memory and judge it. If it may be reached,

 1. we connect to it ourselves, so that what can't be reached is told as what it is;
 2. we make that very address one of the sandbox's own loopback, and listen there, at that very port, with a socket of
    the sandbox's network;
 3. we let the kernel go on. It connects the program to us, within the sandbox, and we pass on what is said.

So the program has a real connection, made by the kernel, from its own socket with all its settings, and sees the
addresses that it would see elsewhere. Nothing of the machine's network ever gets into the sandbox.

*What is judged is what is reached.* The address is read once. Where a connection leads is decided by the socket that it
arrives at, and that one stands for a destination that was judged. If a program changes the address in the meantime, the
kernel finds another socket that stands for one, or the program's own, or nothing. The same if it gets by the filter.

*Nothing here waits* but in tasks of the run, which end with it. What a program can have us do in a second is bounded.

*Sockets* of a sandbox's network only its supervisor can make. We ask it for some when a run wants out for the first
time. To bind them below port 1024 and to give loopback an address is up to whoever owns the sandbox's namespaces, or
root: us.

*Costs.* A run that wants nothing pays nothing. The filter is put on the waiting process after the run before.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from era.core.egress import Address
from era.network import kernel
from era.network.kernel import Question, Target
from era.network.names import ADDRESS

_SOCKETS_SECONDS = 10.0
_QUESTIONS, _PAUSE = 200, 0.02
"""After so many questions of one sandbox, the next ones wait for so many seconds."""

_KINDS = {
    (socket.AF_INET, socket.SOCK_STREAM): b"t",
    (socket.AF_INET, socket.SOCK_DGRAM): b"u",
    (socket.AF_INET6, socket.SOCK_STREAM): b"T",
    (socket.AF_INET6, socket.SOCK_DGRAM): b"U",
}


class Run(Protocol):
    """Who decides, for the run that is under way."""

    def take(self, listener: int, asked: Question, wanted: Sequence[Target]) -> None:
        """Answer this question, in time."""
        ...

    def is_own(self, target: Target) -> bool:
        """Whether this address of the machine itself leads to this service."""
        ...


class Gate:
    """The gate of one sandbox: takes questions for whichever run is under way there."""

    def __init__(self, sock: socket.socket, door: socket.socket, gone: Callable[[], None]) -> None:
        """`sock` leads to the supervisor. Raises OSError where there can be no gate."""
        self.run: Run | None = None
        self._gone = gone
        self._loop = asyncio.get_running_loop()
        self._stock: dict[bytes, deque[socket.socket]] = {kind: deque() for kind in _KINDS.values()}
        self._wanted: dict[bytes, asyncio.Future[int]] = {}
        self._listener = -1
        self._questions = 0
        self._try(sock, door)
        self._sock = sock.dup()
        self._sock.setblocking(False)
        self._loop.add_reader(self._sock, self._told)

    @staticmethod
    def _try(sock: socket.socket, door: socket.socket) -> None:
        """Do what is needed with each connection: this user or this kernel may not do it. Raises OSError."""
        kernel.add_address(door, ADDRESS, 0)
        kernel.remove_address(door, ADDRESS, 0)
        pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        with suppress(ValueError), kernel.borrowed(pid, 3):
            pass

    def close(self) -> None:
        if self._sock.fileno() < 0:
            return
        self._unlisten()
        self._loop.remove_reader(self._sock)
        self._sock.close()
        self.tidy()
        for waiting in self._wanted.values():
            waiting.cancel()
        self._gone()

    async def new_socket(self, family: int, kind: int) -> socket.socket:
        """One of the sandbox's network. Raises OSError."""
        letter = _KINDS[socket.AddressFamily(family), socket.SocketKind(kind)]
        while not self._stock[letter]:
            if letter not in self._wanted:
                self._wanted[letter] = self._loop.create_future()
                self._sock.send(letter)
            wanted = self._wanted[letter]
            await asyncio.wait({wanted}, timeout=_SOCKETS_SECONDS)
            if not wanted.done() or wanted.cancelled():
                raise OSError(errno.ENOBUFS, "the sandbox gives no sockets")
            if not wanted.result():
                raise OSError(errno.EAFNOSUPPORT, "the sandbox has no such sockets")
            # Others may have been faster, and taken them all.
        return self._stock[letter].popleft()

    def give_back(self, sock: socket.socket) -> None:
        """One that wasn't used."""
        self._stock[_KINDS[sock.family, sock.type]].appendleft(sock)

    def tidy(self) -> None:
        """Close what isn't used: sandboxes that only live need no more than they had."""
        for stock in self._stock.values():
            for sock in stock:
                sock.close()
            stock.clear()

    def _told(self) -> None:
        try:
            kind, descriptors, _, _ = socket.recv_fds(self._sock, 16, 32, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            kind, descriptors = b"", []
        if not kind:
            self.close()
        elif kind == b"L":  # whoever was under the listener before is dead by now
            self._unlisten()
            self._listener = descriptors[0]
            self._loop.add_reader(self._listener, self._asked)
        else:
            self._stock[kind].extend(socket.socket(fileno=one) for one in descriptors)
            if (waiting := self._wanted.pop(kind, None)) is not None and not waiting.done():
                waiting.set_result(len(descriptors))

    def _unlisten(self) -> None:
        if self._listener >= 0:
            self._loop.remove_reader(self._listener)
            os.close(self._listener)
            self._listener = -1

    def _asked(self) -> None:
        listener = self._listener
        try:
            asked = kernel.question(listener)
        except OSError:
            self._unlisten()
            return
        if asked is None:
            return
        self._questions += 1
        if self._questions >= _QUESTIONS:
            self._loop.remove_reader(listener)
            self._loop.call_later(_PAUSE, self._resume, listener)
        try:
            wanted = kernel.targets(asked)
        except OSError:
            wanted = []
        if not kernel.is_valid(listener, asked):
            return
        outward = [one for one in wanted if not _is_inside(one[0]) or (self.run is not None and self.run.is_own(one))]
        if not outward:  # it stays inside, or is nonsense: the kernel's own affair
            kernel.go_on(listener, asked)
        elif self.run is None:
            kernel.answer(listener, asked, errno.ENETUNREACH)
        else:
            self.run.take(listener, asked, outward)

    def _resume(self, listener: int) -> None:
        self._questions = 0
        if listener == self._listener:
            self._loop.add_reader(listener, self._asked)


def _is_inside(address: Address) -> bool:
    """Whether this means the sandbox itself, to whoever is in it."""
    return address.is_loopback or address.is_unspecified
