"""What becomes of connections of runs with secrets, between a program and a server that both are this test."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import random
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from era.core.allowlist import allowlist
from era.core.secrets import Secret
from era.network import exchange, interception
from era.network.authority import Authority
from era.network.http1 import Traffic

HOST, OTHER = "api.example.test", "other.test"
VALUE = 'canary"\\ &+=%/é'
ADDRESS = ip_address("203.0.113.10")
GOOD, EVIL, OURS = Authority(), Authority(), Authority()
"""The authority that the machine trusts, one that nobody does, and the service's."""

FINE = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfine"

type Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]
type Answer = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def trusting(*authorities: Authority) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for one in authorities:
        context.load_verify_locations(cadata=one._certificate.public_bytes(Encoding.PEM).decode())
    return context


async def fine(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(FINE)


@dataclass
class Lab:
    """A server that hears, and a program that connects to it through an interception."""

    secrets: list[Secret] = field(
        default_factory=lambda: [
            Secret("TOKEN", VALUE, allowlist([HOST, "*.sub.test"])),
            Secret("KEY", "k2", allowlist([HOST])),
        ]
    )
    allow: list[str] = field(default_factory=list)
    heard: bytes = b""
    noted: list[tuple[str | None, str | None]] = field(default_factory=list)
    traffic: Traffic = field(default_factory=Traffic)
    answer: Answer = fine
    greeting: bytes = b""
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    servers: list[asyncio.Server] = field(default_factory=list)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

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
        async with asyncio.timeout(10):
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


@pytest.fixture
async def lab(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lab]:
    monkeypatch.setattr(interception, "trust", lambda: trusting(GOOD))
    bugs: list[object] = []
    monkeypatch.setattr(interception, "log", SimpleNamespace(error=lambda *_, **told: bugs.append(told)))
    made = Lab()
    yield made
    await made.close()
    assert bugs == []


def request(target: str = "/", *headers: str, body: bytes = b"", method: str = "GET", host: str = HOST) -> bytes:
    """A request after which the program wants the connection to be closed."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", "Connection: close", *headers]
    lines += [f"Content-Length: {len(body)}"] if body else []
    return "\r\n".join([*lines, "", ""]).encode() + body


# -- where values go --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("authority", [GOOD, None], ids=["https", "http"])
async def test_in_headers_and_targets(lab: Lab, authority: Authority | None) -> None:
    token = lab.token.decode()
    basic = base64.b64encode(f"me:{token}".encode()).decode()
    asked = request(f"/a%20{token}?q={token}&r=1", f"X-KEY: k {token} {token}", f"Authorization: Basic {basic}")
    assert (await lab.ask(asked, authority=authority)).endswith(b"\r\n\r\nfine")
    line, *lines = lab.heard.decode().split("\r\n")
    path, _, query = line.split()[1].partition("?")
    assert unquote(path) == f"/a {VALUE}"
    assert parse_qs(query) == {"q": [VALUE], "r": ["1"]}
    told = dict(one.split(": ", 1) for one in lines if one)
    assert told["X-KEY"] == f"k {VALUE} {VALUE}"
    assert base64.b64decode(told["Authorization"].removeprefix("Basic ")).decode() == f"me:{VALUE}"
    assert lab.traffic.secrets == {"TOKEN"}
    assert lab.noted == [(HOST, None)]
    assert lab.traffic.sent == len(asked)


@pytest.mark.parametrize("kind", ["application/json", "application/vnd.api+json; charset=utf-8", "text/plain", "form"])
async def test_in_bodies_as_they_write_it(lab: Lab, kind: str) -> None:
    token, key = (one.placeholder for one in lab.secrets)
    content_type, body, read = {
        "text/plain": ("text/plain", f"{token} {key}!", lambda text: text),
        "form": ("application/x-www-form-urlencoded", f"a={token}&b={key}", lambda text: parse_qs(text)),
    }.get(kind, (kind, json.dumps({"a": token, key: 1}), json.loads))
    await lab.ask(request("/", f"Content-Type: {content_type}", body=body.encode(), method="POST"))
    head, _, sent = lab.heard.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(sent)}".encode() in head
    assert read(sent.decode()) in (f"{VALUE} k2!", {"a": [VALUE], "b": ["k2"]}, {"a": VALUE, "k2": 1})
    assert lab.traffic.secrets == {"TOKEN", "KEY"}


async def test_not_in_anything_else(lab: Lab) -> None:
    """What isn't swapped goes out as the placeholder that it is."""
    token = lab.token
    bodies = {
        "Content-Type: application/octet-stream": token,
        "X: no type": token,
        "Content-Type: text/plain\r\nContent-Encoding: gzip": gzip.compress(token),
        "Content-Type: text/css": token + bytes(1 << 20),
    }
    for headers, body in bodies.items():
        await lab.ask(request("/", headers, body=body, method="POST"))
        assert lab.heard.endswith(body)
    split = token[:20] + b" " + token[20:], token.upper(), token[:-1], token.hex().encode(), b"era_secret_" + b"0" * 32
    await lab.ask(request("/", *(f"X-{n}: {one.decode()}" for n, one in enumerate(split))))
    chunked = b"POST / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\nContent-Type: text/plain\r\n" % HOST.encode()
    await lab.ask(chunked + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(token), token))
    # A secret of another host, and headers that say where a request goes or ends.
    other = Secret("OTHER", "canary", allowlist([OTHER]))
    lab.secrets.append(other)
    await lab.ask(request("/", f"X: {other.placeholder}", f"TE: {token.decode()}"))
    assert b"canary" not in lab.heard
    assert lab.traffic.secrets == set()
    assert all(one in lab.heard for one in (*split, other.placeholder.encode(), b"TE: " + token))


# -- HTTP as it is ----------------------------------------------------------------------------------------------


async def test_a_connection_is_kept_for_many_requests(lab: Lab) -> None:
    """Also where they are all sent before the first is answered."""
    head = f"GET /1 HTTP/1.1\r\nhOST: {HOST}:443\r\nx-tok: {lab.token.decode()}\r\n\r\n".encode()
    reader, writer = await lab.connect()
    for _ in range(3):
        writer.write(head)
        assert await reader.readexactly(len(FINE)) == FINE
    writer.write(head * 5)
    assert await reader.readexactly(len(FINE) * 5) == FINE * 5
    assert lab.heard == head.replace(lab.token, VALUE.encode()) * 8
    assert lab.noted == [(HOST, None)]


ODD = (
    b"HTTP/1.1 222 All  right\r\nX-oDD: \xe9 \xff\r\nSet-Cookie: a=1\r\nset-cookie: b=2; Path=/\r\n"
    b"X-Empty: \r\nLocation: //evil\\@%0d%0aX: y\r\nConnection: close\r\n"
)
ANSWERS = {
    "odd": (ODD + b"Content-Length: 2\r\n\r\nab", None),
    "chunked": (ODD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1;x=y\r\nc\r\n0\r\nT: 1\r\n\r\n", None),
    "hints": (b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + ODD + b"Content-Length: 1\r\n\r\na", None),
    "to the end": (
        ODD + b"\r\nall that comes",
        ODD + b"Transfer-Encoding: chunked\r\n\r\ne\r\nall that comes\r\n0\r\n\r\n",
    ),
    "none": (b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n", None),
    "unchanged": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\nConnection: close\r\n\r\n", None),
}


@pytest.mark.parametrize("which", ANSWERS)
async def test_answers_pass_as_they_are(lab: Lab, which: str) -> None:
    said, expected = ANSWERS[which]

    async def answer(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        raise ConnectionError

    lab.answer = answer
    heard = await lab.ask(request(), authority=None)
    assert plain(heard) == plain(expected or said)


def plain(answer: bytes) -> bytes:
    """But for what may differ: how headers' names are written, what chunks say besides, where `Connection` stands."""
    return answer.lower().replace(b";x=y", b"").replace(b"connection: close\r\n", b"")


async def test_an_answer_comes_as_it_is_written(lab: Lab) -> None:
    heard = asyncio.Event()

    async def answer(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
        await heard.wait()
        writer.write(b"data: 2\n\n")

    lab.answer = answer
    reader, writer = await lab.connect()
    writer.write(request())
    assert (await reader.readuntil(b"data: 1\n\n")).startswith(b"HTTP/1.1 200 OK\r\n")
    heard.set()
    assert b"data: 2\n\n" in await reader.read()


async def test_an_answer_to_head_has_no_body(lab: Lab) -> None:
    async def answer(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n")

    lab.answer = answer
    assert await lab.ask(request(method="HEAD")) == b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\n"


BROKEN = {
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "no HTTP": b"220 hello\r\n\r\n",
    "a control": b"HTTP/1.1 200 OK\r\nX: a\0b\r\n\r\n",
}


@pytest.mark.parametrize("which", BROKEN)
async def test_a_broken_answer_is_a_502(lab: Lab, which: str) -> None:
    async def answer(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(BROKEN[which])

    lab.answer = answer
    heard = await lab.ask(request())
    assert heard.startswith(b"HTTP/1.1 502 ")
    assert b'"rule": "bad_answer"' in heard


CUT = {
    "without a length": (b"HTTP/1.1 200 OK\r\n\r\nhalf", GOOD),
    "chunked": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", None),
}


@pytest.mark.parametrize("which", CUT)
async def test_an_answer_that_breaks_off_is_not_a_whole_one(lab: Lab, which: str) -> None:
    said, authority = CUT[which]

    async def answer(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        await writer.drain()
        writer.transport.abort()  # with TLS: without the word that this is the end
        raise ConnectionError

    lab.answer = answer
    assert (await lab.ask(request(), authority=authority)).endswith(b"\r\n\r\n4\r\nhalf\r\n")


async def test_a_server_that_hangs_up_has_not_answered(lab: Lab) -> None:
    async def answer(*_: object) -> None:
        raise ConnectionError

    lab.answer = answer
    with suppress(ConnectionError):
        assert await lab.ask(request()) == b""


@pytest.mark.parametrize("kind", ["text/plain", "application/octet-stream"])
async def test_who_waits_to_be_asked_for_a_body_is_asked(lab: Lab, kind: str) -> None:
    async def answer(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if b"Expect" in head:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            lab.heard += await reader.readexactly(len(lab.token))
        writer.write(FINE)

    lab.answer = answer
    reader, writer = await lab.connect()
    head = request("/", f"Content-Type: {kind}", "Expect: 100-continue", body=lab.token, method="POST")
    writer.write(head.removesuffix(lab.token))
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(lab.token)
    assert (await reader.read()).endswith(b"fine")
    assert lab.heard.endswith(VALUE.encode() if kind == "text/plain" else lab.token)


async def test_an_answer_before_the_whole_body_is_heard(lab: Lab) -> None:
    async def answer(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 413 Too Much\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno")
        await writer.drain()
        raise ConnectionError

    lab.answer = answer
    reader, writer = await lab.connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: %s\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n" % HOST.encode())
    assert (await reader.read()).endswith(b"\r\n\r\nno")


async def test_after_an_upgrade_bytes_pass_as_they_are(lab: Lab) -> None:
    async def answer(_: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nfirst")
        while data := await reader.read(1 << 16):
            lab.heard += data
            writer.write(data)

    lab.answer = answer
    reader, writer = await lab.connect()
    token = lab.token.decode()
    head = f"GET /s HTTP/1.1\r\nHost: {HOST}\r\nX: {token}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
    writer.write(head.encode())
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    assert await reader.readexactly(5) == b"first"
    for said in (b"\x00\xff", lab.token, bytes(1 << 18)):
        writer.write(said)
        assert await reader.readexactly(len(said)) == said
    assert lab.heard.startswith(head.replace(token, VALUE).encode())
    assert lab.token in lab.heard


# -- what isn't ours --------------------------------------------------------------------------------------------


async def test_who_is_not_meant_passes_untouched(lab: Lab) -> None:
    """Another name, none at all, one that egress doesn't allow: TLS is between the program and the server then."""
    asked = request("/", f"X: {lab.token.decode()}")
    for name, allow in ((OTHER, []), (None, []), (HOST, [OTHER]), ("sub.test", []), ("x.sub.test.evil.test", [])):
        lab.allow = allow
        _, writer = ends = await lab.connect(name=name)
        chain = writer.get_extra_info("ssl_object").get_verified_chain()
        assert chain[-1] == GOOD._certificate.public_bytes(Encoding.DER), name
        writer.write(asked)
        assert (await ends[0].readexactly(len(FINE))) == FINE
    assert lab.heard == asked * 5
    assert lab.noted == [(None, None)] * 5
    lab.allow = []
    await lab.ask(asked, name="a.sub.test")
    assert lab.noted[-1] == ("a.sub.test", None)


async def test_what_is_not_http_passes_untouched(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.greeting = b"220 I speak first\r\n"
    reader, writer = await lab.connect(authority=None)
    assert await reader.readline() == lab.greeting
    writer.write(lab.token + b"\r\n\r\n")
    assert await reader.readexactly(len(FINE)) == FINE
    assert lab.heard == lab.token + b"\r\n\r\n"
    lab.greeting = b""
    monkeypatch.setattr(interception, "_HELLO_SECONDS", 0.05)
    for said in (
        b"*2\r\n$3\r\nGET\r\n\r\n",
        b"GET TOKEN\r\n\r\n",
        b"\x16\x03\x01 no hello\r\n\r\n",
        bytes(9) + b"\r\n\r\n",
    ):
        lab.heard = b""
        reader, writer = await lab.connect(authority=None)
        writer.write(said)
        assert await reader.readexactly(len(FINE)) == FINE
        assert lab.heard == said


async def test_a_slow_hello_is_waited_for_and_then_passed_on(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request("/", f"X: {lab.token.decode()}")
    reader, writer = await lab.connect(authority=None)
    for at in range(0, len(asked), 40):
        writer.write(asked[at : at + 40])
        await asyncio.sleep(0.005)
    assert (await reader.read()).endswith(b"fine")
    assert VALUE.encode() in lab.heard
    monkeypatch.setattr(interception, "_HELLO_SECONDS", 0.05)
    reader, writer = await lab.connect(authority=None)
    writer.write(asked[:-2])
    await asyncio.sleep(0.2)
    writer.write(asked[-2:])
    assert await reader.readexactly(len(FINE)) == FINE
    assert lab.heard.endswith(asked)


def test_hellos_are_read_whatever_they_hold() -> None:
    """In one record or several; of half a one more is wanted, and nonsense is nobody's."""
    outgoing = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=HOST).do_handshake()
    hello = outgoing.read()
    kind, body = hello[:3], hello[5:]
    parted = b"".join(kind + len(one).to_bytes(2) + one for one in (body[:3], body[3:80], b"", body[80:]))
    for whole in (hello, parted):
        assert interception._server_name(whole) == HOST
        assert {interception._server_name(whole[:size]) for size in range(len(whole))} == {None}
    chance = random.Random(1)
    for _ in range(2000):
        spoilt = bytearray(chance.choice((hello, parted)))
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(spoilt))
            spoilt[at : at + chance.randint(0, 9)] = chance.randbytes(chance.randint(0, 3))
        assert isinstance(interception._server_name(bytes(spoilt)), str | None)


# -- attacks ----------------------------------------------------------------------------------------------------


async def fronting(lab: Lab) -> None:
    """A server that serves others, too, is asked for another one."""
    await lab.ask(request("/", f"X: {lab.token.decode()}", host=OTHER))


async def fronting_later(lab: Lab) -> None:
    reader, writer = await lab.connect()
    writer.write(f"GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
    await reader.readexactly(len(FINE))
    writer.write(request("/", f"X: {lab.token.decode()}", host=OTHER))
    await reader.read()


async def impostor(lab: Lab) -> None:
    """Somebody says that he is the host."""
    heard = await lab.ask(request("/", f"X: {lab.token.decode()}"), authority=EVIL)
    assert b" 502 " in heard.split(b"\r\n")[0] or lab.heard


async def namesake(lab: Lab) -> None:
    """Somebody else's good certificate."""
    other, real = GOOD.context(OTHER), GOOD.context
    try:
        GOOD.context = lambda host: other  # type: ignore[method-assign]
        await lab.ask(request("/", f"X: {lab.token.decode()}"))
    finally:
        GOOD.context = real  # type: ignore[method-assign]


async def claimed(lab: Lab) -> None:
    """Without TLS another server is asked for the host."""
    await lab.ask(request("/", f"X: {lab.token.decode()}"), authority=None, names=(OTHER,))


async def absolute(lab: Lab) -> None:
    """The target names another host than `Host`."""
    await lab.ask(request(f"http://{OTHER}/", f"X: {lab.token.decode()}"))


async def dropped(lab: Lab) -> None:
    """Whoever comes next is told to drop what says where the request ends."""
    await lab.ask(request("/", "Connection: close, Content-Length", body=b"GET /x", method="POST"))


async def smuggled(lab: Lab) -> None:
    """What one reader takes for a body is a request to another host, to another reader."""
    inner = f"GET /smuggled HTTP/1.1\r\nHost: {OTHER}\r\nX: {lab.token.decode()}\r\n\r\n".encode()
    head = request("/", f"Content-Length: {len(inner)}", method="POST").removesuffix(b"\r\n")
    await lab.ask(head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(inner), inner))


def heard_canary(lab: Lab) -> bool:
    return b"canary" in lab.heard


def heard_two_lengths(lab: Lab) -> bool:
    return b"Transfer-Encoding" in lab.heard and b"Content-Length" in lab.heard


def heard_what_to_drop(lab: Lab) -> bool:
    return b"Connection: close, Content-Length" in lab.heard


def heard_two_hosts(lab: Lab) -> bool:
    return OTHER.encode() in lab.heard.partition(b"\r\n")[0]


def careless_trust() -> ssl.SSLContext:
    context = trusting(GOOD)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class Credulous(interception.Interception):
    """Believes what a request's `Host` says."""

    def look(self, first, address, names):  # type: ignore[no-untyped-def]
        return super().look(first, address, (HOST,))


ATTACKS = {
    fronting: (heard_canary, exchange, "named_host", lambda _: HOST),
    fronting_later: (heard_canary, exchange, "named_host", lambda _: HOST),
    impostor: (heard_canary, interception, "trust", careless_trust),
    namesake: (heard_canary, interception, "trust", careless_trust),
    claimed: (heard_canary, interception, "Interception", Credulous),
    absolute: (heard_two_hosts, exchange, "_check", lambda *_: None),
    dropped: (heard_what_to_drop, exchange, "_check", lambda *_: None),
    smuggled: (heard_two_lengths, exchange, "_check", lambda *_: None),
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("weakened", [False, True], ids=["sound", "weakened"])
async def test_attacks(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, attack: Callable[[Lab], Awaitable[None]], weakened: bool
) -> None:
    succeeded, module, name, weak = ATTACKS[attack]
    if weakened:
        monkeypatch.setattr(module, name, weak)
    await attack(lab)
    assert succeeded(lab) is weakened
    assert weakened or "TOKEN" not in lab.traffic.secrets


async def test_too_much_is_refused(lab: Lab) -> None:
    """A program can't have us make gigabytes of a small request."""
    lab.secrets[0] = Secret("TOKEN", "canary" * 1000, allowlist([HOST]))
    token = lab.token.decode()
    for asked in (
        request(f"/{token * 400}"),
        request("/", f"X: {token * 400}"),
        request("/", "Content-Type: text/plain", body=lab.token * 20_000, method="POST"),
    ):
        assert (await lab.ask(asked)).startswith(b"HTTP/1.1 413 ")
    assert (await lab.ask(request("/" + "a" * (400 << 10)))).startswith(b"HTTP/1.1 400 ")
    assert lab.heard == b""


async def test_what_cannot_be_written_is_refused_in_our_words(lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    """Values with controls are refused at the edge. Should one get here, no error quotes it."""
    lab.secrets[0] = Secret("TOKEN", "canary\r\nX-Injected: 1", allowlist([HOST]))
    heard = await lab.ask(request("/", f"X: {lab.token.decode()}"))
    assert heard.startswith(b"HTTP/1.1 400 ")
    assert b"canary" not in heard
    assert lab.heard == b""
    assert lab.traffic.secrets == set()
    assert "canary" not in "".join(capfd.readouterr())
