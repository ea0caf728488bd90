"""The nameserver that sandboxes see: the machine's own, asked on a run's behalf.

Theory of operation. Programs find ADDRESS in /etc/resolv.conf. What they ask there is passed on as it is to the servers
in the machine's own /etc/resolv.conf, so every kind of record can be had, and so is the answer. Its addresses are noted
on the way: a connection to one of them is known by the name, on the record and to a list of what is allowed. A name no
entry of that list can fit is answered with "no such name", and nobody hears of it: else one could say anything to
anybody in the names that one asks for.
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

ADDRESS = IPv4Address("192.0.2.53")
"""Of a range that is for documents, so it's nobody's."""

PORT = 53
_RESOLV = "/etc/resolv.conf"
_SECONDS = 4.0
_LARGEST_QUESTION = 4096
_MOST_LOOKUPS = 32
_MOST_NAMES = 4096
_NO_SUCH_NAME, _FAILED = 3, 2
_LABEL = re.compile(rb"[\x21-\x7e]+")


class Names:
    """For one run. `refused` hears of each name that isn't asked for."""

    def __init__(self, allow: Allowlist, refused: Callable[[str], None]) -> None:
        self._allow, self._refused = allow, refused
        self._known: dict[Address, tuple[str, bool]] = {}
        self._answers: set[tuple[Address, str]] = set()
        self._lookups: set[asyncio.Task[None]] = set()

    def of(self, address: Address) -> str:
        """The name that this address was the answer for, else the address itself."""
        return self._known[address][0] if address in self._known else str(address)

    def allows(self, address: Address) -> bool:
        """Whether a name on the allowlist has this address."""
        return self._known.get(address, ("", False))[1]

    def for_(self, address: Address) -> set[str]:
        """All names that this address was an answer for."""
        return {name for known, name in self._answers if known == address}

    def serve_datagrams(self, inside: socket.socket) -> Callable[[], None]:
        """Answer what comes to this socket, until what is returned is called."""
        loop = asyncio.get_running_loop()
        inside.setblocking(False)

        async def answer(question: bytes, who: Any) -> None:
            told = await self._answer(question, stream=False)
            with suppress(OSError):
                inside.sendto(told, who)

        def readable() -> None:
            with suppress(OSError):
                question, who = inside.recvfrom(_LARGEST_QUESTION)
                if len(self._lookups) < _MOST_LOOKUPS:
                    lookup = loop.create_task(answer(question, who))
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
        """Answer one question after the other. The caller closes `client`."""
        loop = asyncio.get_running_loop()
        while True:
            async with asyncio.timeout(_SECONDS * 4):
                size = int.from_bytes(await _exactly(client, 2))
                told = await self._answer(await _exactly(client, size), stream=True)
                await loop.sock_sendall(client, len(told).to_bytes(2) + told)

    async def _answer(self, question: bytes, *, stream: bool) -> bytes:
        try:
            name, end = _asked(question)
        except (ValueError, IndexError):
            return _refusal(question, 12, _FAILED)
        named = self._allow.has_name(name)
        if not named and not self._allow.ranges:
            self._refused(name)
            return _refusal(question, end, _NO_SUCH_NAME)
        for server in nameservers():
            try:
                async with asyncio.timeout(_SECONDS):
                    told = await (_over_tcp if stream else _over_udp)(server, question)
            except (OSError, TimeoutError):
                continue
            for address in _addresses(told):
                if len(self._known) < _MOST_NAMES or address in self._known:
                    self._known[address] = name, named or self.allows(address)
                if len(self._answers) < _MOST_NAMES:
                    self._answers.add((address, name))
            return told
        return _refusal(question, end, _FAILED)


def nameservers() -> list[Address]:
    """The machine's own, at most three, as its own resolver takes them."""
    found: list[Address] = []
    with suppress(OSError), open(_RESOLV) as lines:
        for line in lines:
            words = line.split()
            if words[:1] == ["nameserver"] and len(words) > 1:
                with suppress(ValueError):
                    found.append(ip_address(words[1].partition("%")[0]))
    return found[:3] or [IPv4Address("127.0.0.1")]


async def _over_udp(server: Address, question: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    asked = secrets.token_bytes(2) + question[2:]  # a program could tell somebody outside which number to answer with
    with socket.socket(_family(server), socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.connect((str(server), PORT))
        sock.send(asked)
        while True:
            told = await loop.sock_recv(sock, 1 << 16)
            if told[:2] == asked[:2] and len(told) >= 12:
                return question[:2] + told[2:]


async def _over_tcp(server: Address, question: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    with socket.socket(_family(server), socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        await loop.sock_connect(sock, (str(server), PORT))
        await loop.sock_sendall(sock, len(question).to_bytes(2) + question)
        return await _exactly(sock, int.from_bytes(await _exactly(sock, 2)))


async def _exactly(sock: socket.socket, size: int) -> bytes:
    """Raises ConnectionError where it ends before."""
    loop = asyncio.get_running_loop()
    parts = b""
    while len(parts) < size:
        part = await loop.sock_recv(sock, size - len(parts))
        if not part:
            raise ConnectionError("it ended early")
        parts += part
    return parts


def _family(address: Address) -> socket.AddressFamily:
    return socket.AF_INET if isinstance(address, IPv4Address) else socket.AF_INET6


def _asked(message: bytes) -> tuple[str, int]:
    """The name that a message with one question asks for, and where that ends. Raises ValueError, IndexError."""
    if len(message) < 17 or struct.unpack("!H", message[4:6])[0] != 1:
        raise ValueError("not one question")
    labels, at = [], 12
    while size := message[at]:
        label = message[at + 1 : at + 1 + size]
        if size > 63 or not _LABEL.fullmatch(label):
            raise ValueError("no name")
        labels.append(label.decode("ascii"))
        at += 1 + size
    return folded(".".join(labels)), at + 5


def _addresses(message: bytes) -> list[Address]:
    """Those among the answers of a message."""
    found: list[Address] = []
    with suppress(ValueError, IndexError, struct.error):
        _, at = _asked(message)
        for _ in range(struct.unpack("!H", message[6:8])[0]):
            while size := message[at]:
                at += 1 + size if size < 64 else 2
                if size >= 64:
                    at -= 1  # as if the byte that ends a name came next
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


def _refusal(question: bytes, end: int, code: int) -> bytes:
    """An answer without any records."""
    asked = question[12:end]
    flags = 0x8080 | code | (question[2] << 8 & 0x0100 if len(question) > 2 else 0)
    return question[:2].ljust(2, b"\0") + struct.pack("!HHHHH", flags, 1 if asked else 0, 0, 0, 0) + asked
