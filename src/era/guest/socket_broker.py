"""The broker: a socket over which the host gets sockets of the sandbox's own network.

A socket belongs for good to the network it was made in, whoever has it. So PID 1 makes them and connects none: where
they lead is the host's affair, and what is said there never touches PID 1. Some the host connects, to programs in here
(drivers/socket_broker.py); on others it listens, for connections of programs that want out
(network/connect_supervisor.py). Two kinds of these it gets unasked: the *guest listeners*, bound before there is any
program; and the *listeners*, where the kernel asks about programs behind the gate (connect_filter.py).

  host to guest:  t, u, T, U and a number (1 byte)  so many sockets of this kind, see KINDS
                  L  whatever the kernel asks, it is to ask the host from now on; around gVisor it isn't yet (gvisor.py)
  guest to host:  t, u, T, U  with descriptors of this kind; fewer where there can't be more
                  L  with a descriptor: a listener
"""

from __future__ import annotations

import _socket  # not socket, which takes as long to import as all the rest
import os
import sys

_INET, _INET6, _STREAM, _DATAGRAM = 2, 10, 1, 2
KINDS = {b"t": (_INET, _STREAM), b"u": (_INET, _DATAGRAM), b"T": (_INET6, _STREAM), b"U": (_INET6, _DATAGRAM)}

_MSG_NOSIGNAL = 0x4000


class SocketBroker:
    """Our end, by its descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def answer(self) -> bytes:
        """Answer one request. What it was about; nothing where the host is gone."""
        request = os.read(self.fd, 2)
        kind = request[:1]
        if kind in KINDS:
            made: list[_socket.socket] = []
            try:
                while len(made) < request[1]:
                    made.append(_socket.socket(*KINDS[kind]))
            except OSError:
                pass  # this kernel hasn't got that family, or there is no room for more
            self.send(kind, [one.fileno() for one in made])
            for one in made:
                one.close()
        return kind

    def send(self, kind: bytes, descriptors: list[int]) -> None:
        host = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, self.fd)
        try:
            _send(host, kind, descriptors)
        finally:
            host.detach()  # or it would be closed with this object


def hand_over(control: int, ports: list[int], *, gate: bool) -> SocketBroker:
    """Bind listeners at these loopback ports, and give them to the host over the control socket, in this order: from
    then on nobody in here has them. After them comes the host's end of a broker, of which the answer is ours. `gate`
    says whether there can be a gate."""
    with_descriptors = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, os.dup(control))
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    listeners = []
    try:
        for port in ports:
            listener = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
            listeners.append(listener)
            # Or what is left in the kernel of connections to an earlier run's would be in the way of the next one's.
            listener.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
        _send(with_descriptors, (b"G" if gate else b"N") + bytes(4), [one.fileno() for one in (*listeners, theirs)])
        return SocketBroker(ours.detach())
    finally:
        for one in (with_descriptors, theirs, *listeners):
            one.close()


def _send(there: _socket.socket, message: bytes, descriptors: list[int]) -> None:
    packed = b"".join(one.to_bytes(4, sys.byteorder) for one in descriptors)
    rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed)] if descriptors else []
    there.sendmsg([message], rights, _MSG_NOSIGNAL)  # with which the gate's filter lets it pass unasked
