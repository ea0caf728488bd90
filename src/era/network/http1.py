"""An HTTP(S) forward proxy: one connection of a program's to somewhere else.

Theory of operation
===================

*Two kinds of request.* `CONNECT host:port` opens a tunnel, which takes anything, TLS as a rule: what is in it is
between the two ends. `GET http://host/path` is passed on as `GET /path`. `GET https://host/path`, which some clients
send, gets its TLS from here, by the certificates that this machine trusts.

*One request each.* Both ends are told `Connection: close`. So behind the heads nothing needs to be understood: bodies
go through as they are, in both directions at once, until both have ended. Where one end reads slowly, the other isn't
read either.

*Bounds.* A head has a size and must be there in time; a connection on which nothing moves is closed. How many there may
be is the business of the egress (egress.py), which also ends them all when their run ends.

*A refusal* is a 403 whose reason stands in the status line too: many clients show no more of an answer to CONNECT.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING

from era.core.allowlist import MAX_HOST, folded
from era.network.policy import parsed

if TYPE_CHECKING:
    from era.network.interception import Interception

MAX_HEAD = 64 << 10
HEAD_SECONDS = 10.0
IDLE_SECONDS = 300.0
CHUNK = 1 << 18
_LINGER_SECONDS, _LINGER_BYTES = 1.0, 1 << 20

LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/1\.[01]")
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2})( [^\r\n\0]*)?")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\0]*)")
_AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.%a-z]+)\]|([^\s:/?#@\[\]\\]+)):([0-9]{1,5})")
_HOP_BY_HOP = {b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te"}
_HOP_BY_HOP |= {b"upgrade"}

type Fields = list[tuple[bytes, bytes]]
type Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Refused(Exception):
    """A request that isn't served: status, the rule or kind of failure, and a sentence."""

    def __init__(self, status: int, rule: str, why: str) -> None:
        super().__init__(why)
        self.status, self.rule, self.why = status, rule, why


@dataclass(slots=True)
class Traffic:
    """Bytes that a program has `sent` through a connection, and `received`; names of the `secrets` swapped in."""

    sent: int = 0
    received: int = 0
    secrets: set[str] = field(default_factory=set)


type Connect = Callable[[str, int], Awaitable[tuple[socket.socket, Traffic]]]
"""Makes a connection to a host and port, if that is allowed, and says where to count. Raises Refused."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a request asks for. `path` is None for a tunnel."""

    host: str
    port: int
    path: bytes | None = None
    tls: bool = False

    @property
    def authority(self) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host.encode() if self.port == (443 if self.tls else 80) else f"{host}:{self.port}".encode()


async def serve(client: socket.socket, connect: Connect, interception: Interception | None = None) -> None:
    """Serve one connection until it is over. The caller closes `client`. `interception` is for runs with secrets."""
    await answered(client, lambda ends: _serve(ends, connect, interception))


async def answered(client: socket.socket, serve: Callable[[Ends], Awaitable[None]]) -> None:
    """Have `serve` deal with a connection of a program's, whatever comes of that: a refusal is answered, and a head
    that is too large is one. The caller closes `client`."""
    ends = await asyncio.open_connection(sock=client, limit=MAX_HEAD)
    try:
        try:
            await serve(ends)
        except asyncio.LimitOverrunError:
            await refuse(ends, Refused(431, "head_too_large", f"the head is over {MAX_HEAD >> 10} KiB"))
        except Refused as refusal:
            await refuse(ends, refusal)
    except (OSError, asyncio.IncompleteReadError, TimeoutError):
        pass  # one of the two ends is gone, or might as well be
    finally:
        ends[1].transport.abort()


async def _serve(client: Ends, connect: Connect, interception: Interception | None) -> None:
    method, target, fields = await _request(client[0])
    sock, traffic = await connect(target.host, target.port)
    try:
        first = b""
        if target.path is None:
            client[1].write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            fields = [(name, value) for name, value in end_to_end(fields) if name.lower() != b"host"]
            first = _head(method + b" " + target.path + b" HTTP/1.1", [(b"Host", target.authority), *fields])
        opening = None
        if interception is not None:
            place = parsed(sock.getpeername()[0]), {folded(target.host)}
            read = partial(client[0].read, CHUNK)
            opening = interception.look(first, *place) if first else await interception.opening(read, sock, *place)
            first = opening.first if opening else first
        server = await _connected(sock, target)
    except BaseException:
        sock.close()
        raise
    try:
        if interception is not None and opening is not None and opening.host is not None:
            await interception.serve(opening, opening.host, client, server, lambda _: traffic)
            return
        traffic.sent += len(first)
        server[1].write(first)
        await _join(client, server, traffic, answer=target.path is not None)
    finally:
        server[1].transport.abort()


async def _request(reader: asyncio.StreamReader) -> tuple[bytes, Target, Fields]:
    """The head of a request. Raises Refused."""
    try:
        async with asyncio.timeout(HEAD_SECONDS):
            head = await reader.readuntil(b"\r\n\r\n")
    except TimeoutError:
        raise Refused(408, "too_slow", f"the request's head was not complete after {HEAD_SECONDS:g} seconds") from None
    except asyncio.LimitOverrunError:
        raise Refused(431, "head_too_large", f"the request's head is over {MAX_HEAD >> 10} KiB") from None
    first, *lines = head[:-4].split(b"\r\n")
    match = LINE.fullmatch(first)
    if match is None:
        raise Refused(400, "bad_request", "this is no HTTP request")
    return match[1], _target(match[1], match[2].decode("ascii")), fields_of(lines, 400)


def fields_of(lines: Iterable[bytes], status: int) -> Fields:
    found = []
    for line in lines:
        match = _FIELD.fullmatch(line)
        if match is None:
            raise Refused(status, "bad_header", "a header is malformed")
        found.append((match[1], match[2].rstrip(b" \t")))
    return found


def _target(method: bytes, text: str) -> Target:
    """Raises Refused for what names no host."""
    if method == b"CONNECT":
        return Target(*_authority(text))
    scheme, colon, rest = text.partition("://")
    scheme = scheme.lower()
    if not colon or scheme not in ("http", "https"):
        raise Refused(
            400, "bad_target", "a proxy is asked for http://HOST/PATH, https://HOST/PATH or CONNECT HOST:PORT"
        )
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    path = rest[len(authority) :].partition("#")[0] or "/"
    authority = authority.rpartition("@")[2]  # who asks is told in a header, if at all
    if not re.search(r":[0-9]+$", authority) or authority.endswith("]"):
        authority = authority.removesuffix(":") + (":443" if scheme == "https" else ":80")
    path = path if path.startswith("/") else f"/{path}"
    return Target(*_authority(authority), path.encode(), tls=scheme == "https")


def _authority(text: str) -> tuple[str, int]:
    match = _AUTHORITY.fullmatch(text)
    port = int(match[3]) if match else 0
    if match is None or not 0 < port < 1 << 16:
        raise Refused(400, "bad_target", "the target has no host and port that can be used")
    host = match[1] or match[2]
    if len(host.rstrip(".")) > MAX_HOST:
        raise Refused(400, "bad_target", "the host's name is too long")
    return host, port


async def _connected(sock: socket.socket, target: Target) -> Ends:
    """Streams over a connection, with TLS where the request leaves that to us. Raises Refused."""
    if not target.tls:
        return await asyncio.open_connection(sock=sock, limit=CHUNK)
    context = await asyncio.to_thread(trust)
    try:
        return await asyncio.open_connection(
            sock=sock, limit=CHUNK, ssl=context, server_hostname=target.host.rstrip("."), ssl_handshake_timeout=10
        )
    except (OSError, ValueError) as error:
        told = getattr(error, "verify_message", None) or "the handshake failed"
        raise Refused(502, "tls", f"no TLS with {target.host}: {told}") from None


@cache
def trust() -> ssl.SSLContext:
    """TLS as this machine's clients do it, by the certificates it trusts. For HTTP/1.1."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


async def _join(client: Ends, server: Ends, traffic: Traffic, *, answer: bool = False) -> None:
    """Pass on in both directions until both have ended. `answer`: what the server says is an answer to a request."""
    loop = asyncio.get_running_loop()

    def sent(count: int) -> None:
        traffic.sent += count
        clock.reschedule(loop.time() + IDLE_SECONDS)

    def received(count: int) -> None:
        traffic.received += count
        clock.reschedule(loop.time() + IDLE_SECONDS)

    async def out() -> None:
        with suppress(_SinkGone):  # what the server said before it went is still to be passed on
            await _pump(client[0], server[1], sent)

    async def back() -> None:
        if answer:
            await _pass_answer_head(server[0], client[1], received)
        await _pump(server[0], client[1], received)
        if answer:
            going_out.cancel()  # who has the answer has nothing more to say

    try:
        async with asyncio.timeout(IDLE_SECONDS) as clock, asyncio.TaskGroup() as both:
            going_out = both.create_task(out())
            both.create_task(back())
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


class _SinkGone(ConnectionError):
    """Nothing can be written any more."""


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, count: Callable[[int], None]) -> None:
    """Pass on until `source` ends. Raises _SinkGone, and OSError where `source` breaks off."""
    while data := await source.read(CHUNK):
        count(len(data))
        await _write(sink, data)
    sink.transport.set_write_buffer_limits(0)  # so that drain() waits for all of it
    await _write(sink, b"")
    if sink.can_write_eof():
        sink.write_eof()


async def _write(sink: asyncio.StreamWriter, data: bytes) -> None:
    try:
        sink.write(data)
        await sink.drain()
    except (OSError, RuntimeError) as error:
        raise _SinkGone from error


async def _pass_answer_head(
    server: asyncio.StreamReader, client: asyncio.StreamWriter, count: Callable[[int], None]
) -> None:
    """Pass on the head of an answer, and those of the interim answers before it. Raises Refused where there is none."""
    while True:
        try:
            head = await server.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            raise Refused(502, "bad_answer", "the head of the server's answer is too large") from None
        except (asyncio.IncompleteReadError, OSError):
            raise Refused(502, "bad_answer", "the server closed the connection without an answer") from None
        count(len(head))
        first, *lines = head[:-4].split(b"\r\n")
        match = _STATUS.fullmatch(first)
        if match is None:
            raise Refused(502, "bad_answer", "the server's answer is no HTTP/1.1")
        client.write(_head(first, end_to_end(fields_of(lines, 502)), interim=match[1].startswith(b"1")))
        if not match[1].startswith(b"1"):
            return


def end_to_end(fields: Fields) -> Fields:
    """The headers that are meant for the other end and not for us."""
    named = {
        word.strip().lower() for name, value in fields if name.lower() == b"connection" for word in value.split(b",")
    }
    dropped = _HOP_BY_HOP | (named - {b"transfer-encoding", b"content-length", b"host"})
    return [(name, value) for name, value in fields if name.lower() not in dropped]


def _head(first: bytes, fields: Fields, *, interim: bool = False) -> bytes:
    end = b"\r\n" if interim else b"Connection: close\r\n\r\n"
    return first + b"\r\n" + b"".join(name + b": " + value + b"\r\n" for name, value in fields) + end


def explained(refusal: Refused) -> tuple[str, bytes]:
    """What a status line and a body say of it."""
    body = json.dumps({"error": f"ERA's proxy: {refusal.why}.", "rule": refusal.rule}).encode() + b"\n"
    return re.sub(r"[^ -~]", "?", refusal.why)[:200], body


async def refuse(client: Ends, refusal: Refused) -> None:
    """Answer, and wait a little for the client to stop sending: closing before would take the answer back."""
    reader, writer = client
    phrase, body = explained(refusal)
    head = f"HTTP/1.1 {refusal.status} {phrase}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
    writer.write_eof()
    room = _LINGER_BYTES
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            while room > 0 and (data := await reader.read(CHUNK)):
                room -= len(data)
