"""The hatch: a socket over which the host asks for sockets of the sandbox's own, to connect with to programs inside.

A socket belongs for good to the network it was made in, whoever has it. So the supervisor makes them and connects none:
where to is the host's affair, and what a program does with a connection never touches PID 1.
"""

from __future__ import annotations

import _socket  # not socket, which takes as long to import as all the rest
import os
import sys


def cut(control: int) -> int:
    """Hand the host its end of a hatch over the control socket. The answer is our end, a descriptor."""
    with_descriptors = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, os.dup(control))
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    try:
        _give(with_descriptors, b"H" + bytes(4), theirs.fileno())
    finally:
        theirs.close()
        with_descriptors.close()
    return ours.detach()


def answer(hatch: int) -> bool:
    """Answer one question of the host's: a socket for each kind of address. False where nobody asks any more."""
    if not os.read(hatch, 1):
        return False
    there = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, os.dup(hatch))
    made = []
    try:
        for family in (_socket.AF_INET, _socket.AF_INET6):
            try:
                made.append(_socket.socket(family, _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK))
            except OSError:
                break  # a kernel without IPv6, or a program that has taken all there is
        _give(there, b"S", *(one.fileno() for one in made))
    finally:
        for one in (*made, there):
            one.close()
    return True


def _give(there: _socket.socket, message: bytes, *descriptors: int) -> None:
    packed = b"".join(descriptor.to_bytes(4, sys.byteorder) for descriptor in descriptors)
    there.sendmsg([message], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed)] if descriptors else [])
