"""Doors: sockets in the sandbox's network on which the host may listen."""

from __future__ import annotations

import os
import sys


def hand_over(control: int, ports: list[int]) -> None:
    """Bind loopback ports and give them to the host over the control socket, in this order. From then on nobody in here
    has them."""
    import _socket  # not socket, which takes as long to import as all the rest

    with_descriptors = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, os.dup(control))
    doors = []
    try:
        for port in ports:
            door = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
            doors.append(door)
            # Or what is left in the kernel of connections to an earlier run's would be in the way of the next one's.
            door.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
            door.bind(("127.0.0.1", port))
        descriptors = b"".join(door.fileno().to_bytes(4, sys.byteorder) for door in doors)
        with_descriptors.sendmsg([b"N" + bytes(4)], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, descriptors)])
    finally:
        for door in doors:
            door.close()
        with_descriptors.close()
