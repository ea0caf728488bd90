"""A program and a server, both of a test, with an interception between them."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address

from era.core.allowlist import allowlist
from era.core.secrets import Secret
from era.network import interception
from era.network.authority import Authority
from era.network.destinations import Traffic

HOST, OTHER = "api.example.test", "other.test"
VALUE = 'canary"\\ &+=%/é'
ADDRESS = ip_address("203.0.113.10")
GOOD, EVIL, OURS = Authority(), Authority(), Authority()
"""The authority that the machine trusts, one that nobody does, and the service's."""

IDENTITY = b"Accept-Encoding: identity\r\n\r\n"
"""The end of every request's head: answers must be readable."""

FINE = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfine"

type Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]
type Answer = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def trusting(*authorities: Authority) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for one in authorities:
        context.load_verify_locations(cadata=one.certificate.decode())
    return context


async def fine(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(FINE)


@dataclass
class Lab:
    """A server that hears, and a program that connects to it through an interception."""

    secrets: list[Secret] = field(
        default_factory=lambda: [
            Secret("TOKEN", VALUE, allowlist([HOST, "*.sub.test"]), plain_http=True),
            Secret("KEY", "k2", allowlist([HOST]), plain_http=True),
        ]
    )
    allow: list[str] = field(default_factory=list)
    heard: bytes = b""
    told: bytes = b""
    """What the program was, where a test keeps that."""

    noted: list[tuple[str | None, str | None]] = field(default_factory=list)
    traffic: Traffic = field(default_factory=Traffic)
    answer: Answer = fine
    greeting: bytes = b""
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    servers: list[asyncio.Server] = field(default_factory=list)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    intercepted: list[interception.Interception] = field(default_factory=list)
    """One for each connection."""

    @property
    def token(self) -> bytes:
        return self.secrets[0].placeholder.encode()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hear one request after the other, those with a Content-Length whole, and answer each."""
        writer.write(self.greeting)
        with suppress(asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heard += head
                for line in head.lower().split(b"\r\n"):
                    if line.startswith(b"content-length:") and b"expect:" not in head.lower():
                        self.heard += await reader.readexactly(int(line.partition(b":")[2]))
                await self.answer(head, reader, writer)
                if b"connection: close" in head.lower():
                    break
        writer.close()

    async def connect(
        self, *, name: str | None = HOST, authority: Authority | None = GOOD, names: tuple[str, ...] = (HOST,)
    ) -> Ends:
        """Connect as a program does that says `name` in its hello, to a server whose certificate is by `authority`;
        without one there is no TLS. `names` are those that the resolver has answered with its address."""
        context = authority and authority.context(name or HOST)
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0, ssl=context, limit=1 << 20)
        self.servers.append(server)
        far = socket.create_connection(server.sockets[0].getsockname())
        near, program = socket.socketpair()
        for one in (far, near, program):
            one.setblocking(False)
        intercepted = interception.Interception(self.secrets, OURS, allowlist(self.allow))
        self.intercepted.append(intercepted)

        def note(host: str | None, reason: str | None) -> Traffic:
            self.noted.append((host, reason))
            return self.traffic

        async def carry() -> None:
            arrived: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()
            arrived.set_result(near)
            try:
                await intercepted.carry(arrived, far, ADDRESS, names, note)
            finally:
                near.close()
                far.close()

        self.tasks.append(asyncio.create_task(carry()))
        if authority is None:
            ends = await asyncio.open_connection(sock=program)
        else:
            trusted = trusting(OURS, GOOD)
            trusted.check_hostname = name is not None
            ends = await asyncio.open_connection(sock=program, ssl=trusted, server_hostname=name or "")
        self.writers.append(ends[1])
        return ends

    async def ask(self, request: bytes, **how: object) -> bytes:
        """All that a program hears that says this, and no more than that."""
        reader, writer = await self.connect(**how)  # type: ignore[arg-type]
        writer.write(request)
        async with asyncio.timeout(60):
            return await reader.read()

    async def close(self) -> None:
        for writer in self.writers:
            writer.transport.abort()
        for server in self.servers:
            server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await asyncio.sleep(0)


def request(target: str = "/", *headers: str, body: bytes = b"", method: str = "GET", host: str = HOST) -> bytes:
    """A request after which the program wants the connection to be closed."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", "Connection: close", *headers]
    lines += [f"Content-Length: {len(body)}"] if body else []
    return "\r\n".join([*lines, "", ""]).encode() + body
