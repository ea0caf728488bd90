"""A connection whose other end isn't heard from any more: a cable that is cut hangs up on nobody.

Theory of operation. The kernel sends again what isn't acknowledged, for a quarter of an hour. It could be told to give
up earlier (TCP_USER_TIMEOUT), but then it would also give up on an other end that is there and doesn't read for a
while, such as a program that is sent a file, or a host that is paused. So it is asked when it last heard anything;
where nothing is under way keepalive has it ask (tcp(7)).
"""

from __future__ import annotations

import asyncio
import socket
import struct

SECONDS = 5.0
"""Of silence after which the other end counts as cut off."""

_LOOK_SECONDS = 1.0
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)
_TCP_INFO = struct.Struct("3x B 20x I 28x I 60x Q")
"""`tcpi_probes`, `tcpi_unacked`, `tcpi_last_ack_recv`, in milliseconds, and `tcpi_bytes_acked` of struct tcp_info
(linux/tcp.h)."""


def ask_when_idle(writer: asyncio.StreamWriter) -> None:
    """Have the kernel end the connection where nothing is under way on it and the other end doesn't answer."""
    sock = writer.get_extra_info("socket")
    if sock is not None:  # or it has been reset already
        for option in _KEEPALIVE:
            sock.setsockopt(*option)


async def cut_off(writer: asyncio.StreamWriter) -> None:
    """Wait until the other end of this connection has acknowledged nothing of what was sent for too long."""
    silent = 0.0
    while silent < SECONDS:
        await asyncio.sleep(_LOOK_SECONDS)
        if (told := _told(writer)) is None:
            return  # It was reset, or is closed.
        probes, unacknowledged, heard_ms_ago, _ = told
        # Whoever has no room for more is asked now and then whether he has, and answers.
        is_owed = unacknowledged > 0 or probes > 1
        # What was sent a moment ago isn't acknowledged either, so one look says nothing.
        silent = silent + _LOOK_SECONDS if is_owed and heard_ms_ago >= _LOOK_SECONDS * 1000 else 0.0


def acknowledged(transport: asyncio.BaseTransport) -> int | None:
    """How many bytes the other end has acknowledged in all; None where the connection is closed."""
    told = _told(transport)
    return None if told is None else told[3]


def _told(connection: asyncio.StreamWriter | asyncio.BaseTransport) -> tuple[int, int, int, int] | None:
    """What the kernel says of a connection (_TCP_INFO), None where it is closed."""
    sock = connection.get_extra_info("socket")
    if sock is None:
        return None
    try:
        probes, unacknowledged, heard_ms_ago, bytes_acked = _TCP_INFO.unpack(
            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        )
    except OSError:
        return None
    return probes, unacknowledged, heard_ms_ago, bytes_acked
