"""Outgoing connections for any client: TCP, UDP and DNS, as if the sandbox had a network.

Theory of operation
===================

A sandbox has no interface but loopback, and the kernel routes nothing anywhere else. A program that may have the
internet lives under a seccomp filter (guest/connect_filter.py) by which the kernel notifies us before each `connect`,
and before a datagram goes to an address. We read the address from the program's memory and judge it. If it may be
reached,

 1. we connect to it ourselves, so that what can't be reached is told as what it is;
 2. we make that very address one of the sandbox's own loopback, and listen there, at that very port, with a socket of
    the sandbox's network;
 3. we let the kernel continue the call. It connects the program to us, within the sandbox, and we pass on the bytes.

So the program has a real connection, made by the kernel, from its own socket with all its settings, and sees the
addresses that it would see elsewhere. Nothing of the machine's network ever gets into the sandbox.

*What is judged is what is reached.* The address is read once. Where a connection leads is decided by the socket that it
arrives at, and that one stands for a destination that was judged. If a program changes the address in the meantime, the
kernel finds another socket that stands for one, or the program's own, or nothing. The same if it gets by the filter.

*Nothing here waits* but in tasks of the run, which end with it. What a program can have us do in a second is bounded.

*Sockets* of a sandbox's network can only be made in there. We get them from its socket broker, when a run first
connects to something. To bind them below port 1024 and to give loopback an address is up to whoever owns the sandbox's
namespaces, or root: us.

*In gVisor* the filter is on gVisor itself, so we are notified of its kernel's calls, those of runs without internet
too. From a sandbox's first run with internet on we decide all of them; for a run without, that nothing can be reached
but the sandbox itself.

*Costs.* A run that connects to nothing pays nothing. The filter is put on the waiting process after the run before.

*What it takes.* Linux 5.9, pidfd_getfd and process_vm_readv on the sandbox's processes, and CAP_NET_ADMIN over its
network: any ordinary user has all that over sandboxes of his own, and any root with CAP_NET_ADMIN and CAP_SYS_PTRACE.
`why_unsupported` tries it.
"""

from __future__ import annotations

import errno
import os
from asyncio import get_running_loop
from collections.abc import Callable, Sequence
from typing import Protocol

from era.core.allowlist import Address
from era.core.ports import Sandbox, SocketBroker
from era.network import loopback, seccomp_notify
from era.network.dns import ADDRESS
from era.network.loopback import Target
from era.network.seccomp_notify import Notification

_MAX_BURST, _PAUSE_SECONDS = 200, 0.02
"""After so many notifications of one sandbox, the next ones wait for so long."""

_NULL = 8
"""An address at which no process has memory."""

_PTRACE = "as root it needs CAP_SYS_PTRACE, and kernel.yama.ptrace_scope must be below 3"


def why_unsupported(sandbox: Sandbox) -> str | None:
    """Why connections of a sandbox can't be supervised here, as a clause; None where they can.

    Tries what each connection will need. Nothing of it is left."""
    listener = next(iter(sandbox.guest_listeners.values()), None)
    if sandbox.broker is None or listener is None:
        return "this kind of sandbox has no way out"
    if not sandbox.broker.can_supervise:
        return "this kernel can't show us connections before it makes them (that takes Linux 5.9 or newer)"
    try:
        loopback.add_address(listener, ADDRESS, 0)
        loopback.remove_address(listener, ADDRESS, 0)
    except OSError as error:
        return f"ERA may not give a sandbox's network an address ({_reason(error)}): as root it needs CAP_NET_ADMIN"
    try:
        seccomp_notify.duplicate_socket(sandbox.broker.pid, 0).close()
    except OSError as error:
        if error.errno != errno.ENOTSOCK:  # which is so, and known only once we have it
            return f"ERA may not take over a program's socket (pidfd_getfd: {_reason(error)}): {_PTRACE}"
    try:
        seccomp_notify.read_memory(sandbox.broker.pid, _NULL, 1)
    except OSError as error:
        if error.errno != errno.EFAULT:
            return f"ERA may not read a program's memory (process_vm_readv: {_reason(error)}): {_PTRACE}"
    return None


def _reason(error: OSError) -> str:
    return os.strerror(error.errno or 0).lower()


class ConnectHandler(Protocol):
    """Decides about connections for the run that is under way."""

    def handle(self, notify_fd: int, notification: Notification, targets: Sequence[Target]) -> None:
        """See to it that this notification is answered. `targets` is not empty."""
        ...

    def is_service(self, target: Target) -> bool:
        """Whether this address of the machine itself leads to this service."""
        ...


class ConnectSupervisor:
    """Receives the seccomp notifications of one sandbox's runs or of its processes, for whichever handler there is."""

    def __init__(self, broker: SocketBroker, on_close: Callable[[], None]) -> None:
        """`on_close` is called once the sandbox is gone."""
        self._handlers: list[ConnectHandler] = []
        """Of the run under way, unless that has no internet, and of processes beside it, where a sandbox can't tell
        whose notifications are whose. The last one decides."""

        self.broker = broker
        self._on_close = on_close
        self._loop = get_running_loop()
        self._notify_fd = -1
        self._burst = 0
        self._closed = False
        broker.on_notify_fd(self._replace_notify_fd)

    @property
    def handler(self) -> ConnectHandler | None:
        return self._handlers[-1] if self._handlers else None

    def add(self, handler: ConnectHandler, *, beside: bool = False) -> None:
        """From now on this one decides, until it is removed; if it is that of processes `beside` runs, only while there
        is no other."""
        self._handlers.insert(0 if beside else len(self._handlers), handler)

    def remove(self, handler: ConnectHandler) -> None:
        self._handlers.remove(handler)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._drop_notify_fd()
            self._on_close()

    def _replace_notify_fd(self, notify_fd: int) -> None:
        """Called by the broker: a new process is under a filter, or (-1) the sandbox is gone."""
        self._drop_notify_fd()  # whoever was under that filter is dead by now
        if notify_fd < 0:
            self.close()
        elif self._closed:
            os.close(notify_fd)
        else:
            self._notify_fd = notify_fd
            self._loop.add_reader(notify_fd, self._receive)

    def _drop_notify_fd(self) -> None:
        if self._notify_fd >= 0:
            self._loop.remove_reader(self._notify_fd)
            os.close(self._notify_fd)
            self._notify_fd = -1

    def _receive(self) -> None:
        """Handle the next notification: a call that stays inside the sandbox continues, any other is the handler's, and
        without a handler it fails with ENETUNREACH. After a burst this pauses, so that one program can't take all the
        time of the event loop."""
        notify_fd = self._notify_fd
        try:
            notification = seccomp_notify.receive(notify_fd)
        except OSError:
            self._drop_notify_fd()
            return
        if notification is None:
            return
        self._burst += 1
        if self._burst >= _MAX_BURST:
            self._loop.remove_reader(notify_fd)
            self._loop.call_later(_PAUSE_SECONDS, self._resume, notify_fd)
        try:
            targets = seccomp_notify.targets(notification)
        except OSError:
            targets = []
        self.decide(notify_fd, notification, targets)

    def decide(self, notify_fd: int, notification: Notification, targets: Sequence[Target]) -> None:
        """Answer a notification, or have the handler do so; one that a handler had to leave undecided comes again."""
        if notify_fd != self._notify_fd or not seccomp_notify.is_valid(notify_fd, notification):
            return
        handler = self.handler
        outward = [
            one for one in targets if not _is_inside(one[0]) or (handler is not None and handler.is_service(one))
        ]
        if not outward:  # it stays inside, or is nonsense: the kernel's own affair
            seccomp_notify.continue_syscall(notify_fd, notification)
        elif handler is None:
            seccomp_notify.inject_result(notify_fd, notification, errno.ENETUNREACH)
        else:
            handler.handle(notify_fd, notification, outward)

    def _resume(self, notify_fd: int) -> None:
        self._burst = 0
        if notify_fd == self._notify_fd:
            self._loop.add_reader(notify_fd, self._receive)


def _is_inside(address: Address) -> bool:
    """Whether this address means the sandbox itself, to whoever is in it."""
    return address.is_loopback or address.is_unspecified
