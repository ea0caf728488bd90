"""The nameserver that sandboxes see: it forwards a run's queries to the machine's own nameservers.

Theory of operation. Programs find ADDRESS in /etc/resolv.conf. The machine's own nameservers believe whoever is on this
machine, so no message of a program's reaches them: of a query the one question is read, and asked anew, with the
flags and the EDNS record that we write ourselves. So there are no updates, no zone transfers, and nothing in sections
where it doesn't belong. Every type of record can be asked for that a name may have.

Responses are passed on as they are. The addresses in them are noted on the way: a connection to one of them is known by
the name, on the record and to an allowlist. A name that no entry of the allowlist can fit is answered with "no such
name", and nothing is asked: else one could say anything to anybody in the names that one asks for.

A run and the processes beside it share one loopback, where only one can have the nameserver's address. So whoever came
first answers the other's queries, too, by its own allowlist, and each notes what it may reach of the answers.

So many queries of a run are asked at a time, and so many a second; the others wait where they are, in its sockets. An
owner may have many runs, so there is a bound for those of all together, too, and of each owner's: what waits for it has
its turn between owners, and of one owner's between sandboxes.

Messages are those of RFC 1035, with EDNS as in RFC 6891. Only what is needed is read of them, and anything may stand
there.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from era.core.allowlist import Address, Allowlist, folded
from era.core.concurrency.fair_limiter import FairLimiter
from era.network.descriptors import RunDescriptors
from era.network.dialing import family

ADDRESS = IPv4Address("192.0.2.53")
"""Of a range that is for documents (RFC 5737), so it's nobody's."""

PORT = 53
_RESOLV_CONF = "/etc/resolv.conf"
_SECONDS = 4.0
"""For the response of one nameserver; then the next is asked."""

_MAX_QUERY = 4096
_MAX_LOOKUPS = 32
"""Of one run at a time."""

_PER_SECOND = 100
"""Lookups of one run, after as many at once."""

_ALL_LOOKUPS, _OWNER_LOOKUPS = 512, 256
"""Of all runs, and of one owner's, that may begin within _TURN_SECONDS. One machine is answered only so often."""

_TURN_SECONDS = 0.5
"""For which a lookup has its turn, be it answered sooner or never: else names that nobody answers would take the turns
of all others for as long as nameservers are waited for."""

_MAX_ADDRESSES = 256
"""Addresses of one answer that count. Nobody has more, but for keeping the event loop busy with them."""

_MAX_NAMES = 4096
_HEADER = 12
_FORMERR, _SERVFAIL, _NXDOMAIN, _NOTIMP, _REFUSED = 1, 2, 3, 4, 5
_LABEL = re.compile(rb"[\x21-\x2d\x2f-\x7e]+")
"""Printable, without the dot that names are joined by: who may ask for a.b isn't to get a label `a.b` through."""
_MAX_NAME = 255

_INTERNET = 1
"""The class of all names that one connects to. Others are a nameserver's own, such as its version."""

_OPT = 41
_NO_DATA = (0, _OPT, *range(128, 256))
"""Types that are no records of a name's: zone transfers (AXFR, IXFR), ANY, and the like (RFC 6895)."""

_UDP_BYTES = (512, 1232)
"""Of a response that a program may ask for at least and at most: more than that is sent in fragments."""


class Lookups:
    """The turns of all lookups."""

    def __init__(self) -> None:
        self._slots = FairLimiter(_ALL_LOOKUPS, of_owner=_OWNER_LOOKUPS)

    async def turn(self, owner: str, sandbox_id: str) -> None:
        """Wait until a lookup may begin."""
        release = await self._slots.take(owner, sandbox_id)
        asyncio.get_running_loop().call_later(_TURN_SECONDS, release)


type Turn = Callable[[], Awaitable[None]]
"""`Lookups.turn` of one sandbox."""


class Names:
    """The nameserver of one run, and what it has answered."""

    def __init__(
        self,
        allow: Allowlist,
        on_refused: Callable[[str], None],
        descriptors: RunDescriptors,
        turn: Turn,
        beside: list[Names] | None = None,
    ) -> None:
        """`on_refused` is called with each name that isn't asked for. `descriptors` are the run's, of which each lookup
        takes one when it has its `turn`. `beside` are those of the same sandbox, of which it is one until `leave`."""
        self._allow, self._on_refused, self._descriptors, self._turn = allow, on_refused, descriptors, turn
        self._beside = [] if beside is None else beside
        self._beside.append(self)
        self._slots, self._pace = asyncio.Semaphore(_MAX_LOOKUPS), _Pace()
        self._known: dict[Address, tuple[str, bool]] = {}
        """The last name that an address was the answer for, and whether the allowlist has one of its names."""

        self._answers: set[tuple[Address, str]] = set()
        self.lookups: set[asyncio.Task[None]] = set()
        """Of datagrams, those that are under way."""

    def leave(self) -> None:
        """Note nothing any more."""
        self._beside.remove(self)

    def of(self, address: Address) -> str:
        """The name that this address was the answer for last, else the address itself."""
        return self._known[address][0] if address in self._known else str(address)

    def allows(self, address: Address) -> bool:
        """Whether a name on the allowlist has this address."""
        return self._known.get(address, ("", False))[1]

    def for_(self, address: Address) -> set[str]:
        """All names that this address was an answer for."""
        return {name for known, name in self._answers if known == address}

    def serve_datagrams(self, inside: socket.socket, ended: Callable[[], None]) -> Callable[[], None]:
        """Answer queries that come to this socket. Returns the function that ends this, closes the socket, and calls
        `ended`."""
        loop = asyncio.get_running_loop()
        inside.setblocking(False)

        async def respond(query: bytes, sender: Any) -> None:
            response = await self._resolve(query, stream=False)
            with suppress(OSError):
                inside.sendto(response, sender)

        def readable() -> None:
            with suppress(OSError):
                query, sender = inside.recvfrom(_MAX_QUERY)
                lookup = loop.create_task(respond(query, sender))
                self.lookups.add(lookup)
                lookup.add_done_callback(lookup_ended)
                if len(self.lookups) >= _MAX_LOOKUPS:
                    loop.remove_reader(inside)

        def lookup_ended(lookup: asyncio.Task[None]) -> None:
            self.lookups.discard(lookup)
            if inside.fileno() >= 0:
                loop.add_reader(inside, readable)

        def close() -> None:
            loop.remove_reader(inside)
            for lookup in self.lookups:
                lookup.cancel()
            inside.close()
            ended()

        loop.add_reader(inside, readable)
        return close

    async def serve_stream(self, client: socket.socket) -> None:
        """Answer the queries on a TCP connection one after the other. Raises OSError at its end, and TimeoutError. The
        caller closes `client`."""
        loop = asyncio.get_running_loop()
        while True:
            async with asyncio.timeout(_SECONDS * 4):
                size = int.from_bytes(await _read_exactly(client, 2))
                if size > _MAX_QUERY:
                    raise ConnectionError("this is no query")
                response = await self._resolve(await _read_exactly(client, size), stream=True)
                await loop.sock_sendall(client, len(response).to_bytes(2) + response)

    async def _resolve(self, query: bytes, *, stream: bool) -> bytes:
        """The response to a query. `stream`: it came over TCP, and the nameserver is asked over TCP."""
        try:
            name, end = _question(query)
        except (ValueError, IndexError):
            return _refusal(query, _HEADER, _FORMERR)
        if problem := _problem(query, end):
            return _refusal(query, end, problem)
        if not self._may_ask(name):
            self._on_refused(name)
            return _refusal(query, end, _NXDOMAIN)
        response = await self._ask(query, end, stream=stream)
        if response is None:
            return _refusal(query, end, _SERVFAIL)
        addresses = _addresses(response)
        for names in self._beside:
            names._note(name, addresses)
        return query[:2] + response[2:]

    def _may_ask(self, name: str) -> bool:
        return self._allow.has_name(name) or bool(self._allow.ranges)

    def _note(self, name: str, addresses: Iterable[Address]) -> None:
        """Note an answer."""
        is_allowed = self._allow.has_name(name)
        if not is_allowed and not self._allow.ranges:
            return
        for address in addresses:
            if len(self._known) < _MAX_NAMES or address in self._known:
                self._known[address] = name, is_allowed or self.allows(address)
            if len(self._answers) < _MAX_NAMES:
                self._answers.add((address, name))

    async def _ask(self, query: bytes, end: int, *, stream: bool) -> bytes | None:
        """The response of the first nameserver that gives one, once it is this query's turn. None where there is no
        response, or the run has no descriptor left to ask with."""
        async with self._slots:
            await self._pace.step()
            await self._turn()
            try:
                self._descriptors.take()
            except OSError:
                return None
            try:
                for server in nameservers():
                    with suppress(OSError, TimeoutError):
                        async with asyncio.timeout(_SECONDS):
                            return await (_ask_tcp if stream else _ask_udp)(server, _rebuilt(query, end))
                return None
            finally:
                self._descriptors.give_back()


class _Pace:
    """Lets _PER_SECOND pass each second, and as many at once after a second's rest."""

    def __init__(self) -> None:
        self._next = 0.0

    async def step(self) -> None:
        """Wait for one's time to pass."""
        now = asyncio.get_running_loop().time()
        self._next = max(self._next, now - 1) + 1 / _PER_SECOND
        if self._next > now:
            await asyncio.sleep(self._next - now)


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


async def _ask_udp(server: Address, query: bytes) -> bytes:
    """Raises OSError."""
    loop = asyncio.get_running_loop()
    with socket.socket(family(server), socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.connect((str(server), PORT))
        sock.send(query)
        while True:
            response = await loop.sock_recv(sock, 1 << 16)
            if response[:2] == query[:2] and len(response) >= _HEADER:
                return response


async def _ask_tcp(server: Address, query: bytes) -> bytes:
    """Raises OSError."""
    loop = asyncio.get_running_loop()
    with socket.socket(family(server), socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        await loop.sock_connect(sock, (str(server), PORT))
        await loop.sock_sendall(sock, len(query).to_bytes(2) + query)
        response = await _read_exactly(sock, int.from_bytes(await _read_exactly(sock, 2)))
        if response[:2] != query[:2] or len(response) < _HEADER:
            raise ConnectionError("this is no response to it")
        return response


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
        if at + 1 - _HEADER > _MAX_NAME:  # before all of a long message is looked at
            raise ValueError("no name")
    if at + 5 > len(message):
        raise ValueError("no question")
    return folded(".".join(labels)), at + 5


def _problem(query: bytes, end: int) -> int | None:
    """The code of the refusal of a query whose question ends at `end`; None for one that may be asked."""
    kind, of_class = struct.unpack("!HH", query[end - 4 : end])
    if query[2] & 0x80:
        return _FORMERR  # it is a response
    if query[2] & 0x78:
        return _NOTIMP  # another operation than QUERY
    return _REFUSED if of_class != _INTERNET or kind in _NO_DATA else None


def _rebuilt(query: bytes, end: int) -> bytes:
    """A query of ours with the question of this one, which ends at `end`. Its id is another: a program could tell
    somebody outside which id to forge a response with. The question is as the program has written it, since some check
    that it comes back so."""
    edns = _edns(query, end)
    flags = 0x0100  # recursion: else one could see what others have asked for
    return secrets.token_bytes(2) + struct.pack("!HHHHH", flags, 1, 0, 0, len(edns) > 0) + query[_HEADER:end] + edns


def _edns(query: bytes, end: int) -> bytes:
    """Our EDNS record for a query whose first record behind the question is one; nothing for any other. It has the
    query's size of responses, within bounds, and asks for signatures if that did."""
    record = query[end : end + 11]
    counts = query[6:_HEADER]
    if counts != b"\0\0\0\0\0\1" or len(record) < 11 or record[:3] != b"\0" + _OPT.to_bytes(2):
        return b""
    size = min(max(int.from_bytes(record[3:5]), _UDP_BYTES[0]), _UDP_BYTES[1])
    return struct.pack("!BHHIH", 0, _OPT, size, (record[7] & 0x80) << 8, 0)


def _addresses(message: bytes) -> list[Address]:
    """The addresses in the A and AAAA records of a response; none where it can't be read."""
    found: list[Address] = []
    with suppress(ValueError, IndexError, struct.error):
        _, at = _question(message)
        for _ in range(struct.unpack("!H", message[6:8])[0]):
            if len(found) == _MAX_ADDRESSES:
                break
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
    flags = 0x8080 | code | (query[2] << 8 & 0x7900 if len(query) > 2 else 0)  # its operation, and recursion
    return query[:2].ljust(2, b"\0") + struct.pack("!HHHHH", flags, 1 if question else 0, 0, 0, 0) + question
