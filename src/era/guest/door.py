"""The door: a socket in the sandbox's network on which the host may listen."""

from __future__ import annotations

import os
import sys


def hand_over(control: int, port: int) -> None:
    """Bind a loopback port and give it to the host over the control socket. From then on nobody in here has it."""
    import _socket  # not socket, which takes as long to import as all the rest

    with_descriptors = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, os.dup(control))
    door = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
    try:
        # Or what is left in the kernel of connections to an earlier run's proxy would be in the way of the next one's.
        door.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        door.bind(("127.0.0.1", port))
        descriptor = door.fileno().to_bytes(4, sys.byteorder)
        with_descriptors.sendmsg([b"N" + bytes(4)], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, descriptor)])
    finally:
        door.close()
        with_descriptors.close()
