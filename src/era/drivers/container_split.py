"""The host's end of the division of a container of gVisor's in two, one part for runs and one for processes.

guest/container_split.py is the other end, and has the theory of operation and the wire format.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket


class ContainerSplit:
    """Starts the process supervisor of one sandbox, of which there is one at a time."""

    def __init__(self, sock: socket.socket) -> None:
        """`sock` is owned by this object from here on."""
        sock.setblocking(False)
        self._sock = sock

    def start(self, control: int) -> DividedLife:
        """Start it, with `control` as its control socket. Raises OSError."""
        socket.send_fds(self._sock, [b"S"], [control])
        return DividedLife(self._sock)

    def close(self) -> None:
        self._sock.close()


class DividedLife:
    """See process_supervisor.Life."""

    pid = 0

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def kill(self) -> None:
        with contextlib.suppress(OSError):  # the sandbox is gone
            self._sock.send(b"K")

    async def ended(self) -> None:
        with contextlib.suppress(OSError):
            while await asyncio.get_running_loop().sock_recv(self._sock, 1) not in (b"E", b""):
                pass
