"""The doors and the gate: what the host gets of a sandbox, so that it can give programs in there a way out."""

from __future__ import annotations

import os
import sys

import gate


def hand_over(control: int, ports: list[int]) -> gate.Gate | None:
    """Bind loopback ports and give them to the host over the control socket, in this order: from then on nobody in here
    has them. Give it one end of the gate's socket too, where this kernel can have a gate."""
    import _socket  # not socket, which takes as long to import as all the rest

    with_descriptors = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, os.dup(control))
    ends = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET) if gate.is_known() else ()
    doors = []
    try:
        for port in ports:
            door = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
            doors.append(door)
            # Or what is left in the kernel of connections to an earlier run's would be in the way of the next one's.
            door.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
            door.bind(("127.0.0.1", port))
        descriptors = b"".join(one.fileno().to_bytes(4, sys.byteorder) for one in (*doors, *ends[:1]))
        with_descriptors.sendmsg([b"N" + bytes(4)], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, descriptors)])
        return gate.Gate(ends[1].detach()) if ends else None
    finally:
        with_descriptors.close()
        for one in (*doors, *ends):
            one.close()
