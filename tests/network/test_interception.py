"""Connections that aren't intercepted, and what a TLS ClientHello is read for."""

from __future__ import annotations

import asyncio
import random
import ssl
from contextlib import suppress

import pytest

from era.network import interception
from tests.network.lab import FINE, GOOD, HOST, OTHER, VALUE, Lab, request


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
