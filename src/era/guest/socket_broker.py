"""The socket broker: the host gets sockets of the sandbox's own network from it.

A socket belongs for good to the network it was made in, whoever has it. So PID 1 makes them and connects none: where
they lead is the host's affair, and what goes through them never touches PID 1. Some the host connects, to programs in
here (drivers/socket_broker.py); with others it listens, for connections of programs to the internet
(network/connect_supervisor.py). Two kinds of descriptors it gets unasked: the *guest listeners*, bound before there is
any program; and the *notification descriptors* of programs under the connect filter (connect_filter.py).

Wire format: messages over a SOCK_SEQPACKET socket.

  host to guest:  t, u, T, U and a number (1 byte): make so many sockets of this kind, see KINDS
                  L  hand over the notification descriptor. Needed around gVisor only (gvisor.py)
  guest to host:  t, u, T, U  with descriptors of this kind; fewer where there can't be more
                  L  with a notification descriptor
"""

from __future__ import annotations

import _socket  # not socket, which takes as long to import as all the rest
import os
import sys

_INET, _INET6, _STREAM, _DATAGRAM = 2, 10, 1, 2
KINDS = {b"t": (_INET, _STREAM), b"u": (_INET, _DATAGRAM), b"T": (_INET6, _STREAM), b"U": (_INET6, _DATAGRAM)}

_MSG_NOSIGNAL = 0x4000


class SocketBroker:
    """The guest's end, by its descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def answer(self) -> bytes:
        """Answer one request. Returns its kind, empty where the host is gone. `L` is left to the caller."""
        request = os.read(self.fd, 2)
        kind = request[:1]
        if kind in KINDS:
            made: list[_socket.socket] = []
            try:
                while len(made) < request[1]:
                    made.append(_socket.socket(*KINDS[kind]))
            except OSError:
                pass  # this kernel hasn't got that family, or there is no room for more
            self.send(kind, [sock.fileno() for sock in made])
            for sock in made:
                sock.close()
        return kind

    def send(self, kind: bytes, descriptors: list[int]) -> None:
        sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, self.fd)
        try:
            _send(sock, kind, descriptors)
        finally:
            sock.detach()  # or the descriptor would be closed with this object


def hand_over(control: int, ports: list[int], *, can_supervise: bool) -> SocketBroker:
    """Bind guest listeners at these loopback ports, and give them to the host over the control socket, in this order:
    from then on nobody in here has them. After them goes the host's end of a broker; the guest's end is returned.
    `can_supervise` says whether the kernel has seccomp user notification."""
    to_host = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, os.dup(control))
    guest_end, host_end = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    listeners = []
    try:
        for port in ports:
            listener = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
            listeners.append(listener)
            # Or what is left in the kernel of connections to an earlier run's would be in the way of the next one's.
            listener.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
        handed_over = [sock.fileno() for sock in (*listeners, host_end)]
        _send(to_host, (b"G" if can_supervise else b"N") + bytes(4), handed_over)
        return SocketBroker(guest_end.detach())
    finally:
        for sock in (to_host, host_end, *listeners):
            sock.close()


def _send(sock: _socket.socket, message: bytes, descriptors: list[int]) -> None:
    packed = b"".join(fd.to_bytes(4, sys.byteorder) for fd in descriptors)
    rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed)] if descriptors else []
    sock.sendmsg([message], rights, _MSG_NOSIGNAL)  # with which the connect filter lets it pass without a notification
