"""Interception of connections to the hosts of a run's secrets: TLS is ended here, and placeholders are swapped.

Theory of operation
===================

*Which connections.* The first bytes of a program decide, unless the server speaks before it. A connection whose TLS
ClientHello names a host of a secret's (RFC 6066, server_name) is intercepted. So is one whose HTTP request names in
`Host` a host that a secret may be sent to over plain HTTP, if the run's own nameserver has answered that name with the
very address the connection leads to. All others pass as bytes, as in any other run. The egress allowlist must have the
name, or the address, besides: a secret opens nothing.

*Who is at the other end.* With TLS, its certificate proves it: it must be good for that very name, by the authorities
that this machine trusts. Only then is anything sent. So it doesn't matter which address a program connects to, nor how
it got it. The program gets a certificate by our own authority (authority.py), which runs with secrets trust. Without
TLS there is only the address, as for any client.

*Read and written anew.* h11 parses the requests and we write them anew, so nothing is passed on that two readers could
read differently. A request gets the secrets of the connection's host only if its own `Host` is that one: the server may
serve others, too. Which secrets those are is asked for each request: a connection of a live session's outlives the cell
or the process that opened it, and whatever comes after has secrets of its own, or none. After a 101 (a WebSocket) bytes
pass as they are.

*Responses* are parsed, too, and the values in them are replaced by the placeholders again (redaction.py). For that they
mustn't be compressed, so they are asked for without, and decompressed where a server does it all the same. A body whose
length is known and small is held until it's complete, so that its new length can stand before it; a larger one is sent
in chunks, line by line. A WebSocket, of which whole frames are passed on, is cut off where it says a value. TRACE,
whose response is the request, is refused.

*Bodies* are searched if they have a Content-Length, and it's small; a few at a time for each run. All others stream.

*Nothing of it is logged.* A library's message about a request that it won't write could quote that.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial

import anyio
import h11
import structlog
from anyio.abc import ByteStream
from anyio.streams.tls import TLSStream

from era.core.allowlist import MAX_HOST, Address, Allowlist, folded
from era.core.concurrency.meter import turn
from era.core.concurrency.streams import limit_buffer, write, write_eof
from era.core.secrets import Secret
from era.network import splice
from era.network.authority import Authority
from era.network.descriptors import RunDescriptors
from era.network.destinations import Traffic
from era.network.exchange import GONE, Exchange, named_host
from era.network.http1 import CHUNK, MAX_HEAD, Ends, Refused, parse_request_head
from era.network.redaction import Redaction, merged
from era.network.splice import IDLE_SECONDS
from era.network.swapping import Swap

log = structlog.get_logger()

_HANDSHAKE_SECONDS = 10.0
_HELLO_SECONDS = 2.0
"""For the rest of a hello or head that a program has begun to send. After that the connection passes as bytes."""

_PAUSE_SECONDS = 0.01
_HELD_BYTES = 32 << 10
"""What of each end is held at least before no more is read; at most three times that and one read of the event loop. A
run has hundreds of connections."""

_LINGER_SECONDS, _LINGER_BYTES = 1.0, 1 << 20
_MAX_BODIES = 8
"""Of one run that are held in memory at a time."""

_REQUEST_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+ [!-~]+ HTTP/1\.[01]")
_REQUEST_LINE_BEGUN = re.compile(rb"[!-~]+( [ -~]*\r?)?")

type Note = Callable[[str | None], Traffic]
"""Puts a connection on record, with the reason for which it failed, and returns where to count its bytes."""


@dataclass(frozen=True, slots=True)
class Opening:
    """How a program begins a connection: `first` are the bytes that were read; `host` is the secret's host that it is
    for, None where the connection isn't intercepted."""

    first: bytes
    host: str | None = None
    tls: bool = False


class Interception:
    """Carries the connections of one run that has secrets, or of the processes of a live session."""

    def __init__(
        self,
        secrets: Sequence[Secret],
        authority: Authority,
        allow: Allowlist,
        descriptors: RunDescriptors | None = None,
    ) -> None:
        """`descriptors` are for pipes, see splice.py."""
        self._secrets, self._authority, self._allow = list(secrets), authority, allow
        self._descriptors = descriptors
        self._bodies = asyncio.Semaphore(_MAX_BODIES)
        self._redactions: dict[str, Redaction] = {}
        """Of single secrets, by placeholder. What is looked for may be a MiB of each, so all connections share
        it."""

        self._merged: dict[tuple[str, ...], Redaction] = {}
        """Of the secrets with these placeholders, for as long as none comes or goes."""

        self._preparing = asyncio.Lock()
        self._version = 0

    def add(self, secrets: Sequence[Secret]) -> None:
        """Swap the placeholders of these too from now on, also on connections that are intercepted already."""
        self._secrets += secrets
        self._changed()

    def remove(self, secrets: Sequence[Secret]) -> None:
        """Swap these no longer."""
        self._secrets = [secret for secret in self._secrets if secret not in secrets]
        self._changed()
        for secret in secrets:
            self._redactions.pop(secret.placeholder, None)

    async def carry(
        self,
        client: Awaitable[socket.socket],
        server: socket.socket,
        address: Address,
        names: Collection[str],
        note: Callable[[str | None, str | None], Traffic],
    ) -> None:
        """Pass on bytes between a program and `server`, intercepted or as they are.

        `address` is the server's, and `names` those that it was an answer for. `note` puts the connection on record:
        under the name it gets, None for the one that the address goes by, and with the reason for which it failed."""
        opening = Opening(b"")
        try:
            program = await client
            opening = await self._opening(program, server, address, names)
        finally:
            if opening.host is None:
                traffic = note(None, None)
        if opening.host is None:
            await splice.join(program, server, traffic, self._descriptors, opening.first)
            return
        near = await asyncio.open_connection(sock=program, limit=_HELD_BYTES)
        far = await asyncio.open_connection(sock=server, limit=_HELD_BYTES)
        await self._serve(opening, opening.host, near, far, partial(note, opening.host))

    async def _opening(
        self, program: socket.socket, server: socket.socket, address: Address, names: Collection[str]
    ) -> Opening:
        """Read from the program until it's clear whether the connection is intercepted, or the server speaks first.
        Nobody else reads from `server` meanwhile, and nothing is read from it here."""
        loop = asyncio.get_running_loop()
        first, deadline = b"", loop.time() + IDLE_SECONDS
        while (opening := self._classify(first, address, names)) is None:
            if first:
                await asyncio.sleep(_PAUSE_SECONDS)  # or a program that sends single bytes would keep us busy
            await _readable((program, server), deadline)
            try:
                more = program.recv(CHUNK)
            except OSError:  # the server spoke first, or the program has said no more in this time
                more = b""
            if not more:
                return Opening(first)
            deadline = deadline if first else loop.time() + _HELLO_SECONDS
            first += more
            await turn()
        return opening

    def _classify(self, first: bytes, address: Address, names: Collection[str]) -> Opening | None:
        """What these first bytes begin; None if that takes more of them."""
        if not first:
            return None
        tls = first[:1] == b"\x16"
        if not tls and not any(self.secrets_for(name, tls=False) for name in names):
            return Opening(first)
        named = _server_name(first) if tls else _host_header(first)
        if named is None:
            return None if len(first) <= MAX_HEAD else Opening(first)
        host = folded(named) if len(named) <= MAX_HOST else ""  # it is put on record, and into a certificate
        intercepted = self.secrets_for(host, tls=tls) and (
            self._allow.has_name(host) or self._allow.has_address(address)
        )
        return Opening(first, host if intercepted and (tls or host in names) else None, tls)

    async def _serve(self, opening: Opening, host: str, client: Ends, server: Ends, note: Note) -> None:
        """Serve an intercepted connection until it has ended."""
        near: ByteStream = _Stream(client, opening.first)
        far: ByteStream = _Stream(server)
        refusal = None
        try:
            if opening.tls:
                await turn()
            try:
                far = await _tls_to_server(far, host) if opening.tls else far
            except BaseException as error:
                traffic = note("tls")
                if not isinstance(error, Refused):
                    raise
                refusal = error
            else:
                traffic = note(None)
            if opening.tls:  # nobody has proved to be a host that is refused, so programs make up as many as they like
                near = await _tls_to_program(near, self._authority.context(host, kept=refusal is None))
            exchange = Exchange(near, far, host, _HostSecrets(self, host, tls=opening.tls), traffic, self._bodies)
            if await exchange.run(refusal):
                await _close_in_order(near)
            else:
                splice.reset(client[1].get_extra_info("socket"))
        except GONE:
            pass
        except Exception as error:
            log.error("interception_failed", kind=type(error).__name__)  # whose message could quote a value
        finally:
            client[1].transport.abort()
            server[1].transport.abort()

    @property
    def version(self) -> int:
        """Of the secrets: another one after each change."""
        return self._version

    def secrets_for(self, host: str, *, tls: bool) -> list[Secret]:
        """Those of now that may be sent to this host, over TLS or without."""
        return [secret for secret in self._secrets if secret.hosts.has_name(host) and (tls or secret.plain_http)]

    def _changed(self) -> None:
        self._version += 1
        self._merged.clear()

    async def redaction(self, secrets: Sequence[Secret]) -> Redaction:
        """What replaces the values of these secrets in responses."""
        which = tuple(secret.placeholder for secret in secrets)
        if (known := self._merged.get(which)) is not None:
            return known
        parts, version = [], self._version
        async with self._preparing:  # one thread a run
            for secret in secrets:
                one = self._redactions.get(secret.placeholder)
                if one is None:
                    one = await asyncio.to_thread(Redaction, [secret])
                    if secret in self._secrets:
                        self._redactions[secret.placeholder] = one
                parts.append(one)
            whole = parts[0] if len(parts) == 1 else await asyncio.to_thread(merged, parts)
        if version == self._version:
            self._merged[which] = whole
        return whole


class _HostSecrets:
    """See HostSecrets in exchange.py."""

    def __init__(self, of: Interception, host: str, *, tls: bool) -> None:
        self._of, self._host, self._tls = of, host, tls
        self._seen: int | None = None
        """The version of all secrets that these are of."""

        self._secrets: list[Secret] = []
        self._version = 0

    @property
    def version(self) -> int:
        self._look()
        return self._version

    def swap(self) -> Swap:
        self._look()
        return Swap(self._secrets)

    async def redaction(self) -> Redaction:
        self._look()
        return await self._of.redaction(self._secrets)

    def _look(self) -> None:
        """See which secrets there are now. Those of other hosts make no difference."""
        if self._seen != self._of.version:
            self._seen, before = self._of.version, self._secrets
            self._secrets = self._of.secrets_for(self._host, tls=self._tls)
            self._version += self._secrets != before


class _Stream(ByteStream):
    """An anyio stream over asyncio's. anyio's TLSStream can also be the server of a connection that is open already."""

    def __init__(self, ends: Ends, first: bytes = b"") -> None:
        """`first` are bytes that were read from it already."""
        self._reader, self._writer = ends
        self._first = first
        limit_buffer(self._writer.transport, 0)  # `send` returns when the kernel has taken everything

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        if self._first:
            data, self._first = self._first[:max_bytes], self._first[max_bytes:]
        else:
            data = await self._reader.read(max_bytes)
        if not data:
            raise anyio.EndOfStream
        return data

    async def send(self, item: bytes) -> None:
        write(self._writer, item)
        await self._writer.drain()

    async def send_eof(self) -> None:
        with suppress(OSError):
            write_eof(self._writer)

    async def aclose(self) -> None:
        await self.send_eof()


async def _readable(socks: Collection[socket.socket], until: float) -> None:
    """Wait until one of these has something to read, or for so long. Nothing is read here: a read that is cancelled may
    have taken bytes, which are lost then."""
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    for sock in socks:
        loop.add_reader(sock, readable.set)
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await readable.wait()
    finally:
        for sock in socks:
            loop.remove_reader(sock)


def _server_name(hello: bytes) -> str | None:
    """The server_name of a TLS ClientHello, "" if there is none or this is no hello; None if it is incomplete."""
    message, at = b"", 0
    while len(message) < 4 or len(message) < 4 + int.from_bytes(message[1:4]):  # it may come in several records
        end = at + 5 + int.from_bytes(hello[at + 3 : at + 5])
        if hello[at : at + 1] not in (b"", b"\x16") or message[:1] not in (b"", b"\x01"):
            return ""
        if len(hello) < at + 5 or len(hello) < end:
            return None
        message, at = message + hello[at + 5 : end], end
    try:
        at = 4 + 2 + 32  # behind the version and the random bytes
        for width in (1, 2, 1):  # session id, cipher suites, compression methods
            _, at = _vector(message, at, width)
        extensions, at = _vector(message, at, 2)[0], 0
        while at < len(extensions):
            kind = extensions[at : at + 2]
            content, at = _vector(extensions, at + 2, 2)
            if kind == b"\0\0":
                names, _ = _vector(content, 0, 2)
                return _vector(names, 1, 2)[0].decode("ascii") if names[:1] == b"\0" else ""
    except ValueError:
        pass
    return ""


def _vector(data: bytes, at: int, width: int) -> tuple[bytes, int]:
    """The content of a TLS vector at this offset, whose length takes `width` bytes, and the offset behind it. Raises
    ValueError."""
    start = at + width
    end = start + int.from_bytes(data[at:start])
    if end > len(data):
        raise ValueError("it ends early")
    return data[start:end], end


def _host_header(head: bytes) -> str | None:
    """The host that an HTTP request names in `Host`, "" if it names none or this is no HTTP request; None if its head
    is incomplete."""
    line, ended, _ = head.partition(b"\n")
    # Another protocol is recognised by its first line: h11 would wait for an empty line, which may never come.
    if not (_REQUEST_LINE.fullmatch(line.removesuffix(b"\r")) if ended else _REQUEST_LINE_BEGUN.fullmatch(line)):
        return ""
    try:
        request = parse_request_head(head)
    except h11.RemoteProtocolError:
        return ""
    return None if request is None else named_host(dict(request.headers))


@cache
def client_context() -> ssl.SSLContext:
    """TLS as this machine's clients do it, by the certificates that it trusts. For HTTP/1.1."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


async def _tls_to_program(stream: ByteStream, context: ssl.SSLContext) -> ByteStream:
    async with asyncio.timeout(_HANDSHAKE_SECONDS):
        return await TLSStream.wrap(stream, server_side=True, ssl_context=context)


async def _tls_to_server(stream: ByteStream, host: str) -> ByteStream:
    """TLS with a server that proves to be this host. Raises Refused."""
    context = await asyncio.to_thread(client_context)
    try:
        async with asyncio.timeout(_HANDSHAKE_SECONDS):
            return await TLSStream.wrap(stream, hostname=host, ssl_context=context)
    except (*GONE, ValueError) as error:
        reason = getattr(error, "verify_message", None) or "the handshake failed"
        raise Refused(502, "tls", f"no TLS with {host}: {reason}") from None


async def _close_in_order(stream: ByteStream) -> None:
    """Close a connection once the other end has stopped sending: before that, closing would reset it, and could take
    back what was sent to it."""
    with suppress(*GONE):
        async with asyncio.timeout(_LINGER_SECONDS):
            if isinstance(stream, TLSStream):
                await stream.aclose()
                return
            await stream.send_eof()
            room = _LINGER_BYTES
            while room > 0:
                room -= len(await stream.receive())
