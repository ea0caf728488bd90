"""Connections to the other hosts of a cluster, each for one request at a time and kept for the next."""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import h11

from era.api.cut_off import ask_when_idle
from era.api.tunnel import PIECE, connect

CONNECT_SECONDS = 3.0
_IDLE_SECONDS = 2.0
"""A connection that wasn't used for so long isn't used again: the other host is about to close it."""

_MOST_IDLE = 64
"""Connections to one host that are kept for the next calls."""


@dataclass(eq=False, slots=True)
class Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    http: h11.Connection
    used_at: float = 0.0


class HostConnections:
    """Connections to other hosts, each for one request at a time."""

    def __init__(self) -> None:
        self._idle: dict[str, list[Connection]] = {}
        self._tls: ssl.SSLContext | None = None

    async def to(self, url: str) -> Connection:
        """A connection to the host at this URL. Raises OSError."""
        if not url:
            raise ConnectionError("that host doesn't listen yet")
        idle = self._idle.get(url, [])
        while idle:
            connection = idle.pop()
            if time.monotonic() - connection.used_at < _IDLE_SECONDS and not connection.reader.at_eof():
                connection.http.start_next_cycle()
                return connection
            connection.writer.transport.abort()
        parts = urlsplit(url)
        if parts.scheme == "https" and self._tls is None:
            self._tls = await asyncio.to_thread(ssl.create_default_context)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        tls = self._tls if parts.scheme == "https" else None
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await connect(host=parts.hostname, port=port, ssl=tls)
        ask_when_idle(writer)
        return Connection(reader, writer, h11.Connection(h11.CLIENT, max_incomplete_event_size=PIECE))

    def give_back(self, url: str, connection: Connection, is_reusable: bool) -> None:
        """Keep the connection for the next request, or close it."""
        idle = self._idle.setdefault(url, [])
        if is_reusable and len(idle) < _MOST_IDLE:
            connection.used_at = time.monotonic()
            idle.append(connection)
        else:
            connection.writer.transport.abort()
