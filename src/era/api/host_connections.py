"""Connections to the other hosts of a cluster, each for one request at a time and kept for the next.

Theory of operation. A host that stops hangs up on connections of which it can't know yet that they are another host's.
Over TLS, one that refuses this one's certificate does so after this one's end of the handshake, and hangs up. Neither
must be taken for the loss of a request. So a new connection first carries a question, and only one that was answered
carries anything else.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import h11
from starlette.types import Scope

from era.api.dead_peers import ask_when_idle
from era.api.hop import HEADER, Hops, target_of
from era.api.protocol import REUSED_SECONDS
from era.api.tunnel import PIECE, connect
from era.core.homes import Host
from era.core.models import JsonObject
from era.core.streams import write
from era.core.telemetry import new_request_id
from era.host_tls import HostTls, why_refused

HELLO_PATH = "/cluster/hello"
"""Of the question that comes first on each new connection."""

CONNECT_SECONDS = 3.0
_MOST_IDLE = 64
"""Connections to one host that are kept for the next calls."""

_MAX_BYTES = 4 << 20
_EXPIRED = 10
"""X509_V_ERR_CERT_HAS_EXPIRED of OpenSSL (x509_vfy.h)."""


class NotTrusted(OSError):
    """The other host and this one don't take each other for hosts of one cluster. Nothing was sent to it."""


class Expired(NotTrusted):
    """The other host's certificate was good until its time ended."""


class HungUp(ConnectionError):
    """The other host hung up when it had seen this one's certificate: it refuses that, or it ends."""


@dataclass(eq=False, slots=True)
class Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    http: h11.Connection
    used_at: float = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the other host has not hung up, as far as this one knows."""
        return not self.writer.is_closing() and not self.reader.at_eof()

    @property
    def is_reusable(self) -> bool:
        """Whether it may carry another request: both directions have ended, and well."""
        return self.http.our_state is h11.DONE and self.http.their_state is h11.DONE


class HostConnections:
    """Connections to other hosts, each for one request at a time."""

    def __init__(self, hops: Hops, tls: HostTls | None) -> None:
        """With `tls` no other host is called than over that, with this host's certificate."""
        self._hops = hops
        self._idle: dict[str, list[Connection]] = {}
        self.tls = tls
        """None where this host talks plain."""

        self._client = None if tls is None else tls.client

    async def to(self, host: Host) -> Connection:
        """A connection to this host. Raises NotTrusted, OSError."""
        if not host.url:
            raise ConnectionError("that host doesn't listen yet")
        idle = self._idle.get(host.url, [])
        while idle:
            connection = idle.pop()
            if connection.is_open and time.monotonic() - connection.used_at < REUSED_SECONDS:
                connection.http.start_next_cycle()
                return connection
            connection.writer.transport.abort()
        parts = urlsplit(host.url)
        if parts.scheme != "https":
            if self.tls is not None:
                raise NotTrusted(f"it talks plain at {host.url}, and this host over TLS only")
            connection = await self._connect(parts.hostname, parts.port or 80, None)
        else:
            connection = await self._connect_tls(parts.hostname, parts.port or 443)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                status, _ = await self._exchange(connection, host, HELLO_PATH)
            if status not in (200, 404):  # a host of the version before is not asked for more than an answer
                raise ConnectionError(f"it answered {status}")
            if not connection.is_reusable:
                raise ConnectionError("it hangs up after its first answer, as a host does that ends")
        except BaseException as error:
            connection.writer.transport.abort()
            if isinstance(error, ValueError | h11.RemoteProtocolError):
                raise ConnectionError("what answers there is no host of a cluster") from error
            raise
        connection.http.start_next_cycle()
        return connection

    async def _connect_tls(self, name: str | None, port: int) -> Connection:
        if self._client is None:
            self._client = await asyncio.to_thread(ssl.create_default_context)
        try:
            return await self._connect(name, port, self._client)
        except ssl.SSLCertVerificationError as error:
            kind = Expired if error.verify_code == _EXPIRED else NotTrusted
            raise kind(f"its certificate isn't good here: {why_refused(error)}") from None
        except ssl.SSLError as error:
            raise NotTrusted(f"it doesn't talk TLS as this host does: {why_refused(error)}") from None

    def give_back(self, host: Host, connection: Connection) -> None:
        """Keep the connection for the next request, or close it."""
        idle = self._idle.setdefault(host.url, [])
        if connection.is_reusable and len(idle) < _MOST_IDLE:
            connection.used_at = time.monotonic()
            idle.append(connection)
        else:
            connection.writer.transport.abort()

    def close_idle(self, seconds: float = 0.0) -> None:
        """Close those that nothing was sent by for so long: other hosts which stop needn't wait for that, and what they
        have closed keeps its descriptor here until then."""
        before, idle = time.monotonic() - seconds, self._idle
        self._idle = {}
        for url, connections in idle.items():
            for connection in connections:
                if connection.used_at > before:
                    self._idle.setdefault(url, []).append(connection)
                else:
                    connection.writer.transport.abort()

    async def ask(self, host: Host, path: str, query: str = "") -> JsonObject:
        """What a host answers to a question that only hosts may ask. Raises NotTrusted, OSError, ValueError, and
        h11.RemoteProtocolError."""
        connection = await self.to(host)
        try:
            status, answer = await self._exchange(connection, host, path, query)
            if status != 200:
                raise ConnectionError(f"it answered {status}")
            return answer
        finally:
            self.give_back(host, connection)

    async def _connect(self, name: str | None, port: int, tls: ssl.SSLContext | None) -> Connection:
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await connect(host=name, port=port, ssl=tls)
        ask_when_idle(writer)
        return Connection(reader, writer, h11.Connection(h11.CLIENT, max_incomplete_event_size=PIECE))

    async def _exchange(self, connection: Connection, host: Host, path: str, query: str = "") -> tuple[int, JsonObject]:
        """One question, and the status and content of its answer. Raises as `ask` does."""
        scope = _scope(path, query)
        header = self._hops.header(scope, host.id)
        named = [("host", "cluster"), (HEADER.decode(), header.decode())]
        http = connection.http
        write(connection.writer, http.send(h11.Request(method="GET", target=target_of(scope), headers=named)) or b"")
        write(connection.writer, http.send(h11.EndOfMessage()) or b"")
        status, content = 0, bytearray()
        while not isinstance(event := http.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                piece = await connection.reader.read(1 << 16)
                if not piece and not status:
                    if connection.writer.get_extra_info("ssl_object") is not None:
                        raise HungUp("it hung up when it had seen this host's certificate")
                    raise ConnectionError("it hung up before it had answered")
                http.receive_data(piece)
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data) and len(content) < _MAX_BYTES:
                content += event.data
            else:
                raise ConnectionError("it hung up, or its answer is too long")
        answer: JsonObject = json.loads(content)
        if not isinstance(answer, dict):
            raise ValueError("it answered something else than an object")
        if status == 403:
            raise NotTrusted(f"it says: {answer.get('error')}")
        return status, answer


def _scope(path: str, query: str) -> Scope:
    """That of the request, as far as its header is about it."""
    return {
        "type": "http",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(b"host", b"cluster")],
        "state": {"request_id": new_request_id()},
    }
