"""HTTP/1.1 on intercepted connections passes as it is."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from era.core.concurrency import frames
from era.network import exchange, interception
from tests.network.lab import FINE, GOOD, HOST, IDENTITY, VALUE, Lab, request


async def test_a_connection_is_kept_for_many_requests(lab: Lab) -> None:
    """Also where they are all sent before the first is answered."""
    head = f"GET /1 HTTP/1.1\r\nhOST: {HOST}:443\r\nx-tok: {lab.token.decode()}\r\n\r\n".encode()
    reader, writer = await lab.connect()
    for _ in range(3):
        writer.write(head)
        assert await reader.readexactly(len(FINE)) == FINE
    writer.write(head * 5)
    assert await reader.readexactly(len(FINE) * 5) == FINE * 5
    assert lab.heard == (head[:-2].replace(lab.token, VALUE.encode()) + IDENTITY) * 8
    assert lab.noted == [(HOST, None)]


ODD = (
    b"HTTP/1.1 222 All  right\r\nX-oDD: \xe9 \xff\r\nSet-Cookie: a=1\r\nset-cookie: b=2; Path=/\r\n"
    b"X-Empty: \r\nLocation: //evil\\@%0d%0aX: y\r\nConnection: close\r\n"
)
ANSWERS = {
    "odd": (ODD + b"Content-Length: 2\r\n\r\nab", None),
    "chunked": (
        ODD + b"Transfer-Encoding: chunked\r\n\r\n3\r\na\nb\r\n1;x=y\r\nc\r\n0\r\nT: 1\r\n\r\n",
        ODD + b"Transfer-Encoding: chunked\r\n\r\n2\r\na\n\r\n2\r\nbc\r\n0\r\nT: 1\r\n\r\n",
    ),
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
    """But for what may differ: how headers' names are written, and where `Connection` stands."""
    return answer.lower().replace(b"connection: close\r\n", b"")


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
    "compressed twice": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Encoding: gzip\r\n\r\n\x1f\x8b",
    "compressed and not": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Encoding: identity\r\n\r\n\x1f\x8b",
}


@pytest.mark.parametrize("which", BROKEN)
async def test_a_broken_answer_is_a_502(lab: Lab, which: str) -> None:
    async def answer(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(BROKEN[which])

    lab.answer = answer
    heard = await lab.ask(request())
    assert heard.startswith(b"HTTP/1.1 502 ")
    assert b'"rule": "bad_answer"' in heard


@pytest.mark.parametrize("is_sound", [True, False])
async def test_answers_are_not_announced_without_end(lab: Lab, is_sound: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_sound:
        monkeypatch.setattr(exchange, "_MAX_INFORMATIONAL", 1 << 30)

    async def answer(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 102 Processing\r\n\r\n" * 1000 + FINE)

    lab.answer = answer
    heard = await lab.ask(request())
    assert (b"HTTP/1.1 502 " in heard) == is_sound
    assert heard.count(b"HTTP/1.1 102 ") == (16 if is_sound else 1000)


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


async def test_a_secret_is_on_record_though_the_server_breaks_off(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    real = interception._Stream.send

    async def heard_and_gone(stream: interception._Stream, item: bytes) -> None:
        await real(stream, item)
        if VALUE.encode() in item:
            raise ConnectionResetError

    monkeypatch.setattr(interception._Stream, "send", heard_and_gone)
    heard = await lab.ask(request("/", f"X: {lab.token.decode()}"), authority=None)
    assert heard.endswith(b"fine")
    assert VALUE.encode() in lab.heard
    assert lab.traffic.secrets == {"TOKEN"}


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


async def test_after_an_upgrade_frames_pass_as_they_are(lab: Lab) -> None:
    first = frames.made(frames.TEXT, b"first")

    async def answer(_: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n" + first)
        while data := await reader.read(1 << 16):
            lab.heard += data
            writer.write(data)

    lab.answer = answer
    reader, writer = await lab.connect()
    token = lab.token.decode()
    head = f"GET /s HTTP/1.1\r\nHost: {HOST}\r\nX: {token}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
    writer.write(head.encode())
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    assert await reader.readexactly(len(first)) == first
    for content in (b"", b"\x00\xff", lab.token, bytes(1 << 18)):
        said = frames.made(frames.BINARY, content)
        writer.write(said)
        assert await reader.readexactly(len(said)) == said
    assert lab.heard.startswith(head[:-2].replace(token, VALUE).encode() + IDENTITY)
    assert lab.token in lab.heard
