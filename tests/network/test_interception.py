"""Connections that aren't intercepted, and what a TLS ClientHello is read for."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from era.core.allowlist import allowlist
from era.network import interception
from tests.network.lab import ADDRESS, EVIL, FINE, GOOD, HOST, OTHER, OURS, VALUE, Lab, request


async def test_who_is_not_meant_passes_untouched(lab: Lab) -> None:
    """Another name, none at all, one that egress doesn't allow: TLS is between the program and the server then."""
    asked = request("/", f"X: {lab.token.decode()}")
    for name, allow in ((OTHER, []), (None, []), (HOST, [OTHER]), ("sub.test", []), ("x.sub.test.evil.test", [])):
        lab.allow = allow
        _, writer = ends = await lab.connect(name=name)
        chain = writer.get_extra_info("ssl_object").get_verified_chain()
        assert chain[-1] == ssl.PEM_cert_to_DER_cert(GOOD.certificate.decode()), name
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


@asynccontextmanager
async def both_ends(lab: Lab) -> AsyncIterator[tuple[socket.socket, socket.socket]]:
    """A program and a server whose connection is carried, both as sockets."""
    (near, program), (far, server) = socket.socketpair(), socket.socketpair()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    arrived = asyncio.get_running_loop().create_future()
    arrived.set_result(near)
    with near, program, far, server:
        for one in (near, program, far, server):
            one.setblocking(False)
        intercepted = interception.Interception(lab.secrets, OURS, allowlist([]))
        carried = asyncio.create_task(intercepted.carry(arrived, far, ADDRESS, (HOST,), lambda *_: lab.traffic))
        for _ in range(5):
            await asyncio.sleep(0)
        async with asyncio.timeout(60):
            yield program, server
        carried.cancel()
        await asyncio.wait([carried])


@pytest.mark.parametrize("later", range(6))
async def test_nothing_is_lost_where_both_speak_at_once(lab: Lab, later: int) -> None:
    """The program so many iterations of the event loop later than the server, as with SSH."""
    loop = asyncio.get_running_loop()
    async with both_ends(lab) as (program, server):
        server.send(b"SSH-2.0-server\r\n")
        for _ in range(later):
            await asyncio.sleep(0)
        program.send(b"SSH-2.0-program\r\n")
        assert await loop.sock_recv(server, 99) == b"SSH-2.0-program\r\n"
        assert await loop.sock_recv(program, 99) == b"SSH-2.0-server\r\n"


async def test_a_server_may_say_much_before_it_hears_the_first_words(lab: Lab) -> None:
    loop, said = asyncio.get_running_loop(), b"no HTTP\r\n" * 10_000
    async with both_ends(lab) as (program, server):
        assert program.send(said) == len(said)
        heard = asyncio.create_task(received(program, 1 << 20))
        await loop.sock_sendall(server, bytes(1 << 20))
        assert await received(server, len(said)) == said
        assert await heard == bytes(1 << 20)
    assert (lab.traffic.sent, lab.traffic.received) == (len(said), 1 << 20)


async def received(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += await asyncio.get_running_loop().sock_recv(sock, size)
    return data


def hello_for(name: str) -> bytes:
    """A ClientHello with no more in it than this server_name."""

    def sized(content: bytes, width: int = 2) -> bytes:
        return len(content).to_bytes(width) + content

    extension = b"\0\0" + sized(sized(b"\0" + sized(name.encode())))
    return b"\x16\3\1" + sized(b"\1" + sized(bytes(34) + b"\0" + sized(b"\x13\1") + b"\1\0" + sized(extension), 3))


def test_no_name_is_longer_than_a_hosts() -> None:
    """However much room a hello has: it would be on record, and in certificates that are kept."""
    lab = Lab()
    intercepted = interception.Interception(lab.secrets, OURS, allowlist([]))
    for size, host in ((253, "a" * 244 + ".sub.test"), (254, None)):
        hello = hello_for("a" * (size - 9) + ".sub.test")
        assert intercepted._classify(hello, ADDRESS, ()) == interception.Opening(hello, host, tls=True)


async def test_only_certificates_of_hosts_that_have_proved_to_be_these_are_kept(lab: Lab) -> None:
    for authority, name in ((GOOD, "good.sub.test"), (EVIL, "evil.sub.test")):
        await lab.ask(request(), name=name, authority=authority)
    assert "good.sub.test" in OURS._contexts
    assert "evil.sub.test" not in OURS._contexts


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
