"""The nameserver that sandboxes see: it forwards a run's queries to the machine's own nameservers.

Theory of operation. Programs find ADDRESS in /etc/resolv.conf. Their queries are forwarded as they are to those in the
machine's own /etc/resolv.conf, so every type of record can be had, and so are the responses. The addresses in them
are noted on the way: a connection to one of them is known by the name, on the record and to an allowlist. A name that
no entry of the allowlist can fit is answered with "no such name", and nothing is forwarded: else one could say anything
to anybody in the names that one asks for.

Messages are those of RFC 1035. Only what is needed is read of them, and anything may stand there.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from era.core.allowlist import Address, Allowlist, folded
from era.network.dialing import family

ADDRESS = IPv4Address("192.0.2.53")
"""Of a range that is for documents (RFC 5737), so it's nobody's."""

PORT = 53
_RESOLV_CONF = "/etc/resolv.conf"
_SECONDS = 4.0
"""For the response of one nameserver; then the next is asked."""

_MAX_QUERY = 4096
_MAX_LOOKUPS = 32
_MAX_NAMES = 4096
_HEADER = 12
_NXDOMAIN, _SERVFAIL = 3, 2
_LABEL = re.compile(rb"[\x21-\x7e]+")


class Names:
    """The nameserver of one run, and what it has answered."""

    def __init__(self, allow: Allowlist, on_refused: Callable[[str], None]) -> None:
        """`on_refused` is called with each name that isn't asked for."""
        self._allow, self._on_refused = allow, on_refused
        self._known: dict[Address, tuple[str, bool]] = {}
        """The last name that an address was the answer for, and whether the allowlist has one of its names."""

        self._answers: set[tuple[Address, str]] = set()
        self._lookups: set[asyncio.Task[None]] = set()

    def of(self, address: Address) -> str:
        """The name that this address was the answer for last, else the address itself."""
        return self._known[address][0] if address in self._known else str(address)

    def allows(self, address: Address) -> bool:
        """Whether a name on the allowlist has this address."""
        return self._known.get(address, ("", False))[1]

    def for_(self, address: Address) -> set[str]:
        """All names that this address was an answer for."""
        return {name for known, name in self._answers if known == address}

    def serve_datagrams(self, inside: socket.socket) -> Callable[[], None]:
        """Answer queries that come to this socket. Returns the function that ends this and closes the socket."""
        loop = asyncio.get_running_loop()
        inside.setblocking(False)

        async def respond(query: bytes, sender: Any) -> None:
            response = await self._resolve(query, stream=False)
            with suppress(OSError):
                inside.sendto(response, sender)

        def readable() -> None:
            with suppress(OSError):
                query, sender = inside.recvfrom(_MAX_QUERY)
                if len(self._lookups) < _MAX_LOOKUPS:
                    lookup = loop.create_task(respond(query, sender))
                    self._lookups.add(lookup)
                    lookup.add_done_callback(self._lookups.discard)

        def close() -> None:
            loop.remove_reader(inside)
            for lookup in self._lookups:
                lookup.cancel()
            inside.close()

        loop.add_reader(inside, readable)
        return close

    async def serve_stream(self, client: socket.socket) -> None:
        """Answer the queries on a TCP connection one after the other. Raises OSError at its end, and TimeoutError. The
        caller closes `client`."""
        loop = asyncio.get_running_loop()
        while True:
            async with asyncio.timeout(_SECONDS * 4):
                size = int.from_bytes(await _read_exactly(client, 2))
                response = await self._resolve(await _read_exactly(client, size), stream=True)
                await loop.sock_sendall(client, len(response).to_bytes(2) + response)

    async def _resolve(self, query: bytes, *, stream: bool) -> bytes:
        """The response to a query. `stream`: it came over TCP, and is forwarded over TCP."""
        try:
            name, end = _question(query)
        except (ValueError, IndexError):
            return _refusal(query, _HEADER, _SERVFAIL)
        named = self._allow.has_name(name)
        if not named and not self._allow.ranges:
            self._on_refused(name)
            return _refusal(query, end, _NXDOMAIN)
        for server in nameservers():
            try:
                async with asyncio.timeout(_SECONDS):
                    response = await (_forward_tcp if stream else _forward_udp)(server, query)
            except (OSError, TimeoutError):
                continue
            for address in _addresses(response):
                if len(self._known) < _MAX_NAMES or address in self._known:
                    self._known[address] = name, named or self.allows(address)
                if len(self._answers) < _MAX_NAMES:
                    self._answers.add((address, name))
            return response
        return _refusal(query, end, _SERVFAIL)


def nameservers() -> list[Address]:
    """The machine's own, at most three, as resolv.conf(5) has it."""
    found: list[Address] = []
    with suppress(OSError), open(_RESOLV_CONF) as lines:
        for line in lines:
            words = line.split()
            if words[:1] == ["nameserver"] and len(words) > 1:
                with suppress(ValueError):
                    found.append(ip_address(words[1].partition("%")[0]))
    return found[:3] or [IPv4Address("127.0.0.1")]


async def _forward_udp(server: Address, query: bytes) -> bytes:
    """Raises OSError. The id of the query is replaced on the way: a program could tell somebody outside which id to
    forge a response with."""
    loop = asyncio.get_running_loop()
    forwarded = secrets.token_bytes(2) + query[2:]
    with socket.socket(family(server), socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.connect((str(server), PORT))
        sock.send(forwarded)
        while True:
            response = await loop.sock_recv(sock, 1 << 16)
            if response[:2] == forwarded[:2] and len(response) >= _HEADER:
                return query[:2] + response[2:]


async def _forward_tcp(server: Address, query: bytes) -> bytes:
    """Raises OSError."""
    loop = asyncio.get_running_loop()
    with socket.socket(family(server), socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        await loop.sock_connect(sock, (str(server), PORT))
        await loop.sock_sendall(sock, len(query).to_bytes(2) + query)
        return await _read_exactly(sock, int.from_bytes(await _read_exactly(sock, 2)))


async def _read_exactly(sock: socket.socket, size: int) -> bytes:
    """Raises ConnectionError where the stream ends before."""
    loop = asyncio.get_running_loop()
    parts = b""
    while len(parts) < size:
        part = await loop.sock_recv(sock, size - len(parts))
        if not part:
            raise ConnectionError("it ended early")
        parts += part
    return parts


def _question(message: bytes) -> tuple[str, int]:
    """The name in a message with one question, and the offset behind that question. Raises ValueError, IndexError."""
    if len(message) < _HEADER + 5 or struct.unpack("!H", message[4:6])[0] != 1:
        raise ValueError("not one question")
    labels, at = [], _HEADER
    while size := message[at]:
        label = message[at + 1 : at + 1 + size]
        if size > 63 or not _LABEL.fullmatch(label):
            raise ValueError("no name")
        labels.append(label.decode("ascii"))
        at += 1 + size
    return folded(".".join(labels)), at + 5


def _addresses(message: bytes) -> list[Address]:
    """The addresses in the A and AAAA records of a response; none where it can't be read."""
    found: list[Address] = []
    with suppress(ValueError, IndexError, struct.error):
        _, at = _question(message)
        for _ in range(struct.unpack("!H", message[6:8])[0]):
            while size := message[at]:
                at += 1 + size if size < 64 else 2
                if size >= 64:
                    at -= 1  # a pointer ends a name, as the zero byte does that is skipped next
                    break
            at += 1
            kind, _, _, length = struct.unpack("!HHIH", message[at : at + 10])
            data = message[at + 10 : at + 10 + length]
            at += 10 + length
            if kind == 1 and length == 4:
                found.append(IPv4Address(data))
            elif kind == 28 and length == 16:
                address = IPv6Address(data)
                found.append(address.ipv4_mapped or address)
    return found


def _refusal(query: bytes, end: int, code: int) -> bytes:
    """A response with this code, the query's question (which ends at `end`) and no records."""
    question = query[_HEADER:end]
    flags = 0x8080 | code | (query[2] << 8 & 0x0100 if len(query) > 2 else 0)
    return query[:2].ljust(2, b"\0") + struct.pack("!HHHHH", flags, 1 if question else 0, 0, 0, 0) + question
