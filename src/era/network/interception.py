"""Connections of a run that has secrets: those to the secrets' hosts are read, and placeholders in them swapped.

Theory of operation
===================

*Which connections.* Of each one it is looked at what the program says first, unless the server speaks before it. A TLS
hello that names a host of a secret's is ours. So is an HTTP request whose `Host` names one, if the run's own resolver
has answered that name with the very address the connection leads to. All others pass as bytes, as in any other run. The
egress allowlist must have the name, or the address, besides: a secret opens nothing.

*Who is at the other end.* With TLS, its certificate tells: it must be good for that very name, by what this machine
trusts. Only then is anything sent. So it doesn't matter which address a program connects to, nor how it got it. The
program gets a certificate by our own authority (authority.py), which runs with secrets trust. Without TLS there is only
the address, as for any client.

*Read and written anew.* h11 parses the requests and we write them anew, so nothing is passed on that two readers could
read differently. A request gets the secrets of the connection's host only if its own `Host` is that one: the server may
serve others, too. Answers are parsed for where they end, and are passed on with the headers they have. After an answer
101 (a WebSocket) bytes pass as they are.

*Bodies* are searched if they tell their length beforehand, and it's small; a few at a time for each run. All others
stream.

*Nothing of this is told.* What a library says of a request that it won't write could quote it, so nobody hears that.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import anyio
import h11
import structlog
from anyio.abc import ByteStream
from anyio.streams.tls import TLSStream

from era.core.allowlist import Address, Allowlist, folded
from era.core.secrets import Secret
from era.network import splice
from era.network.authority import Authority
from era.network.exchange import GONE, Exchange, named_host
from era.network.http1 import CHUNK, IDLE_SECONDS, LINE, MAX_HEAD, Ends, Refused, Traffic, trust
from era.network.swapping import Swap

log = structlog.get_logger()

_HANDSHAKE_SECONDS = 10.0
_HELLO_SECONDS = 2.0
"""For the rest of what a program has begun to say. Who takes longer is passed on as he is."""

_PAUSE = 0.01
_LINGER_SECONDS, _LINGER_BYTES = 1.0, 1 << 20
_BODIES = 8
"""Of one run that are held at a time."""


type Read = Callable[[], Awaitable[bytes]]
type Note = Callable[[str | None], Traffic]


@dataclass(frozen=True, slots=True)
class Opening:
    """What a program has said first: `first`, read already. `host` is whom it means, where that's a host of a secret's
    and the connection is ours."""

    first: bytes
    host: str | None = None
    tls: bool = False


class Interception:
    """For one run."""

    def __init__(self, secrets: Sequence[Secret], authority: Authority, allow: Allowlist) -> None:
        self._secrets, self._authority, self._allow = secrets, authority, allow
        self._bodies = asyncio.Semaphore(_BODIES)

    async def carry(
        self,
        client: Awaitable[socket.socket],
        server: socket.socket,
        address: Address,
        names: Collection[str],
        note: Callable[[str | None, str | None], Traffic],
    ) -> None:
        """Pass on what a program and `server` say, intercepted or as it is. `note` puts that on record: under another
        name than the address goes by, where there is one, and with what went wrong. See `opening` for the rest."""
        loop = asyncio.get_running_loop()
        opening = Opening(b"")
        try:
            program = await client
            opening = await self.opening(partial(loop.sock_recv, program, CHUNK), server, address, names)
        finally:
            if opening.host is None:
                traffic = note(None, None)
        if opening.host is None:
            traffic.sent += len(opening.first)
            with suppress(OSError):  # which joining them will find out, too
                await loop.sock_sendall(server, opening.first)
            await splice.join(program, server, traffic)
            return
        near = await asyncio.open_connection(sock=program, limit=CHUNK)
        far = await asyncio.open_connection(sock=server, limit=CHUNK)
        await self.serve(opening, opening.host, near, far, partial(note, opening.host))

    async def opening(self, read: Read, server: socket.socket, address: Address, names: Collection[str]) -> Opening:
        """Look at what a program says to `server`, which nobody reads meanwhile. `address` is the server's, and `names`
        those which that is an answer for."""
        loop = asyncio.get_running_loop()
        spoke: asyncio.Future[None] = loop.create_future()

        def speaks() -> None:
            loop.remove_reader(server)
            spoke.set_result(None)

        loop.add_reader(server, speaks)
        first, deadline = b"", loop.time() + IDLE_SECONDS
        try:
            while (found := self.look(first, address, names)) is None:
                if first:
                    await asyncio.sleep(_PAUSE)  # who dribbles must not have us look at each drop
                reading: asyncio.Future[bytes] = asyncio.ensure_future(read())
                try:
                    await asyncio.wait(
                        [reading, spoke],  # type: ignore[type-var]  # it takes both
                        timeout=deadline - loop.time(),
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                finally:
                    reading.cancel()
                    (more,) = await asyncio.gather(reading, return_exceptions=True)
                if not isinstance(more, bytes) or not more:  # the server spoke first, or the program says no more
                    return Opening(first)
                deadline = deadline if first else loop.time() + _HELLO_SECONDS
                first += more
            return found
        finally:
            loop.remove_reader(server)

    def look(self, first: bytes, address: Address, names: Collection[str]) -> Opening | None:
        """What these first bytes are; None if more of them would tell."""
        if len(first) > MAX_HEAD:
            return Opening(first)
        if not first:
            return None
        tls = first[:1] == b"\x16"
        if not tls and not any(map(self._towards, names)):
            return Opening(first)
        said = _server_name(first) if tls else _host_header(first)
        if said is None:
            return None
        host = folded(said)
        ours = self._towards(host) and (self._allow.has_name(host) or self._allow.has_address(address))
        return Opening(first, host if ours and (tls or host in names) else None, tls)

    async def serve(self, opening: Opening, host: str, client: Ends, server: Ends, note: Note) -> None:
        """Serve a connection that is ours until it is over. `server` is connected; `note` puts that on record."""
        near: ByteStream = _Stream(client, opening.first)
        far: ByteStream = _Stream(server)
        refusal = None
        try:
            try:
                far = await _secured(far, host) if opening.tls else far
            except BaseException as error:
                traffic = note("tls")
                if not isinstance(error, Refused):
                    raise
                refusal = error
            else:
                traffic = note(None)
            near = await self._as_server(near, host) if opening.tls else near
            exchange = Exchange(near, far, host, Swap(self._towards(host)), traffic, self._bodies)
            if await exchange.run(refusal):
                await _close(near)
            else:
                splice.reset(client[1].get_extra_info("socket"))
        except GONE:
            pass
        except Exception as error:
            log.error("interception_failed", kind=type(error).__name__)  # and no word of what it says
        finally:
            client[1].transport.abort()
            server[1].transport.abort()

    def _towards(self, host: str) -> list[Secret]:
        return [one for one in self._secrets if one.hosts.has_name(host)]

    async def _as_server(self, stream: ByteStream, host: str) -> ByteStream:
        async with asyncio.timeout(_HANDSHAKE_SECONDS):
            return await TLSStream.wrap(stream, server_side=True, ssl_context=self._authority.context(host))


class _Stream(ByteStream):
    """asyncio's streams as anyio's. `first` has been read already."""

    def __init__(self, ends: Ends, first: bytes = b"") -> None:
        self._reader, self._writer = ends
        self._first = first
        self._writer.transport.set_write_buffer_limits(0)  # what is sent has been taken by the kernel

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        if self._first:
            data, self._first = self._first[:max_bytes], self._first[max_bytes:]
        else:
            data = await self._reader.read(max_bytes)
        if not data:
            raise anyio.EndOfStream
        return data

    async def send(self, item: bytes) -> None:
        try:
            self._writer.write(item)
            await self._writer.drain()
        except RuntimeError as error:  # the event loop's word for a connection that is closed
            raise anyio.ClosedResourceError from error

    async def send_eof(self) -> None:
        with suppress(RuntimeError):
            self._writer.write_eof()

    async def aclose(self) -> None:
        await self.send_eof()


def _server_name(hello: bytes) -> str | None:
    """Whom a TLS hello is for, "" if that isn't told or it is none; None if it isn't complete."""
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
        for width in (1, 2, 1):  # the session, the ciphers and the compressions
            _, at = _counted(message, at, width)
        extensions, at = _counted(message, at, 2)[0], 0
        while at < len(extensions):
            kind = extensions[at : at + 2]
            content, at = _counted(extensions, at + 2, 2)
            if kind == b"\0\0":
                names, _ = _counted(content, 0, 2)
                return _counted(names, 1, 2)[0].decode("ascii") if names[:1] == b"\0" else ""
    except ValueError:
        pass
    return ""


def _counted(data: bytes, at: int, width: int) -> tuple[bytes, int]:
    """What stands there behind its length, and where it ends. Raises ValueError."""
    start = at + width
    end = start + int.from_bytes(data[at:start])
    if end > len(data):
        raise ValueError("it ends early")
    return data[start:end], end


def _host_header(head: bytes) -> str | None:
    """Whom an HTTP request is for, "" if that isn't told or it is none; None if it isn't complete."""
    line, ended, _ = head.partition(b"\n")
    if not (LINE.fullmatch(line.removesuffix(b"\r")) if ended else re.fullmatch(rb"[!-~]+( [ -~]*\r?)?", line)):
        return ""
    reading = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    reading.receive_data(head)
    try:
        event = reading.next_event()
    except h11.RemoteProtocolError:
        return ""
    if event is h11.NEED_DATA:
        return None
    return named_host(dict(event.headers)) if isinstance(event, h11.Request) else ""


async def _secured(stream: ByteStream, host: str) -> ByteStream:
    """TLS with a server that proves to be this host. Raises Refused."""
    context = await asyncio.to_thread(trust)
    try:
        async with asyncio.timeout(_HANDSHAKE_SECONDS):
            return await TLSStream.wrap(stream, hostname=host, ssl_context=context)
    except (*GONE, ValueError) as error:
        told = getattr(error, "verify_message", None) or "the handshake failed"
        raise Refused(502, "tls", f"no TLS with {host}: {told}") from None


async def _close(stream: ByteStream) -> None:
    """End a connection in order: closing before the other end has stopped sending would take back what it was told."""
    with suppress(*GONE):
        async with asyncio.timeout(_LINGER_SECONDS):
            if isinstance(stream, TLSStream):
                await stream.aclose()
                return
            await stream.send_eof()
            room = _LINGER_BYTES
            while room > 0:
                room -= len(await stream.receive())
