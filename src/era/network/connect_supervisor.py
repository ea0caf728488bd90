"""RunConnections out for any client: TCP, UDP and DNS, as if the sandbox had a network.

Theory of operation
===================

A sandbox has no interface but loopback, and the kernel routes nothing anywhere else. A program that may have the
internet lives under a filter (guest/connect_filter.py) by which the kernel asks us before each `connect`, and before a
datagram goes to an address. We read the address from the program's memory and judge it. If it may be reached,

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

*Sockets* of a sandbox's network can only be made in there. We get them at its broker, when a run wants out for the
first time. To bind them below port 1024 and to give loopback an address is up to whoever owns the sandbox's namespaces,
or root: us.

*In gVisor* the filter is on gVisor itself, and so its kernel's calls are what is asked about, those of runs without
internet too. From a sandbox's first run with internet on we answer all of that; for a run without, that nothing can be
reached but the sandbox itself.

*Costs.* A run that wants nothing pays nothing. The filter is put on the waiting process after the run before.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Sequence
from typing import Protocol

from era.core.allowlist import Address
from era.core.ports import GuestListener, SocketBroker
from era.network import seccomp_notify
from era.network.dns import ADDRESS
from era.network.seccomp_notify import Question, Target

_QUESTIONS, _PAUSE = 200, 0.02
"""After so many questions of one sandbox, the next ones wait for so many seconds."""


class Run(Protocol):
    """Who decides, for the run that is under way."""

    def take(self, listener: int, asked: Question, wanted: Sequence[Target]) -> None:
        """Answer this question, in time."""
        ...

    def is_own(self, target: Target) -> bool:
        """Whether this address of the machine itself leads to this service."""
        ...


class ConnectSupervisor:
    """The gate of one sandbox: takes questions for whichever run is under way there."""

    def __init__(self, broker: SocketBroker, guest_listener: GuestListener, gone: Callable[[], None]) -> None:
        """Raises OSError where there can be no gate."""
        self.run: Run | None = None
        self.broker = broker
        self._gone = gone
        self._loop = asyncio.get_running_loop()
        self._listener = -1
        self._questions = 0
        self._closed = False
        self._try(broker.pid, guest_listener)
        broker.questions_to(self._ask_at)

    @staticmethod
    def _try(pid: int, guest_listener: GuestListener) -> None:
        """Do what is needed with each connection: this user or this kernel may not do it. Raises OSError."""
        seccomp_notify.add_address(guest_listener, ADDRESS, 0)
        seccomp_notify.remove_address(guest_listener, ADDRESS, 0)
        try:
            seccomp_notify.borrowed(pid, 0).close()
        except OSError as problem:
            if problem.errno != errno.ENOTSOCK:  # that's what it is, once we have it
                raise

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._unlisten()
            self._gone()

    def _ask_at(self, listener: int) -> None:
        self._unlisten()  # whoever was under it is dead by now
        if listener < 0:
            self.close()
        elif self._closed:
            os.close(listener)
        else:
            self._listener = listener
            self._loop.add_reader(listener, self._asked)

    def _unlisten(self) -> None:
        if self._listener >= 0:
            self._loop.remove_reader(self._listener)
            os.close(self._listener)
            self._listener = -1

    def _asked(self) -> None:
        listener = self._listener
        try:
            asked = seccomp_notify.question(listener)
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
            wanted = seccomp_notify.targets(asked)
        except OSError:
            wanted = []
        if not seccomp_notify.is_valid(listener, asked):
            return
        outward = [one for one in wanted if not _is_inside(one[0]) or (self.run is not None and self.run.is_own(one))]
        if not outward:  # it stays inside, or is nonsense: the kernel's own affair
            seccomp_notify.go_on(listener, asked)
        elif self.run is None:
            seccomp_notify.answer(listener, asked, errno.ENETUNREACH)
        else:
            self.run.take(listener, asked, outward)

    def _resume(self, listener: int) -> None:
        self._questions = 0
        if listener == self._listener:
            self._loop.add_reader(listener, self._asked)


def _is_inside(address: Address) -> bool:
    """Whether this means the sandbox itself, to whoever is in it."""
    return address.is_loopback or address.is_unspecified
