"""TCP keepalive: a call may wait for a day, and a server that has vanished without a word is to be noticed before."""

from __future__ import annotations

import socket

_IDLE_SECONDS, _BETWEEN_SECONDS, _TIMES = 30, 10, 6
"""When the other end is asked first, how often again, and how often without an answer until the connection is lost."""

_NAMES = {
    "TCP_KEEPIDLE": _IDLE_SECONDS,
    "TCP_KEEPALIVE": _IDLE_SECONDS,  # as macOS calls it
    "TCP_KEEPINTVL": _BETWEEN_SECONDS,
    "TCP_KEEPCNT": _TIMES,
}

OPTIONS = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *((socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in _NAMES.items() if hasattr(socket, name)),
]
"""Options of a socket, as setsockopt(2) takes them, as far as this system has them."""
