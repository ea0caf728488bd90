"""How long a run with secrets can keep the event loop busy, and so lets all others wait."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from era.core.allowlist import allowlist
from era.core.concurrency import meter
from era.core.secrets import Secret
from era.network import interception, redaction
from tests.network.lab import GOOD, HOST, OURS, Answer, Lab, fine, request

HEADERS, LONG_HEADERS = b"a:\r\n" * 12_000, (b"a:" + b"x" * 40 + b"\r\n") * 1200
NEARLY = b"a" * 8000 + b"c"
"""What a value nearly begins with, at each of its bytes."""


MOST = 64
"""Secrets that a run may have."""


def secrets(count: int) -> list[Secret]:
    """Short ones and such as are as long as they may be."""
    values = [f"{'a' * 8180 if number % 2 else '<é>'}{number:03}b" for number in range(count)]
    return [Secret(f"S{number}", value, allowlist([HOST]), plain_http=True) for number, value in enumerate(values)]


@asynccontextmanager
async def iterations() -> AsyncIterator[list[float]]:
    """How long each iteration of the event loop takes within the block, in seconds on a processor."""
    taken, began = [0.0], time.thread_time()

    async def tick() -> None:
        nonlocal began
        while True:
            now = time.thread_time()
            taken.append(now - began)
            began = now
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    yield taken
    ticking.cancel()


async def large_body(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    content = NEARLY * 16
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content)


async def many_headers(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n" + LONG_HEADERS + b"Content-Length: 0\r\n\r\n")


async def headers_after_another(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    await many_headers(head, reader, writer)


async def many_trailers(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n" + LONG_HEADERS + b"\r\n")


async def agree(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")


async def messages(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n" + NEARLY * 8)


WITH_FEW = ("answer's head after another", "answer's trailers", "request's trailers")
"""Cases with few secrets: with many, looking for them takes most of the time."""

SINGLE = 4000
"""Bytes of a program that come in a TLS record each."""

UPGRADE = ("Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AQIDBAUGBwgJCgsMDQ4PEA==")
UPGRADING = request("/", *UPGRADE).replace(b"Connection: close", b"Connection: Upgrade")
MANY = request().replace(b"\r\n\r\n", b"\r\n" + HEADERS + b"\r\n")
CHUNKED = request("/", "Transfer-Encoding: chunked", method="POST")
CASES: dict[str, tuple[Answer, bytes, int]] = {
    "body": (large_body, request(), 4),
    "answer's head": (many_headers, request(), 3),
    "answer's head after another": (headers_after_another, request(), 24),
    "answer's trailers": (many_trailers, request(), 24),
    "message": (messages, UPGRADING, 4),
    "request's head": (fine, MANY, 12),
    "pipelined head": (fine, request().replace(b"Connection: close\r\n", b"") + MANY, 24),
    "request's trailers": (fine, CHUNKED + b"1\r\na\r\n0\r\n" + HEADERS + b"\r\n", 48),
    "records of a body": (fine, request("/", "Content-Type: text/plain", body=b"a" * SINGLE, method="POST"), 1),
    "records of messages": (agree, UPGRADING + b"a" * SINGLE, 1),
}
"""What the server answers, what programs ask, and on how many connections."""


async def longest(lab: Lab, asked: bytes, connections: int, singles: int = 0) -> float:
    """The longest iteration while programs ask this on so many connections, the last so many bytes of it one by one."""
    ends = [await lab.connect(authority=GOOD if singles else None) for _ in range(connections)]
    for _, writer in ends:
        writer.write(asked[: len(asked) - singles])
        for _ in range(singles):
            writer.write(b"a")
    gc.disable()  # it would fall into one of the iterations
    try:
        async with iterations() as taken, asyncio.timeout(60):
            for reader, _ in ends:
                assert await reader.readexactly(1) == b"H"
            await asyncio.sleep(0.1)
    finally:
        gc.enable()
    return max(taken)


LONGEST = {"pipelined head", "request's head", "answer's head"}
WITH_SECRETS = [case for case in CASES if case not in WITH_FEW]


@pytest.mark.parametrize(
    ("case", "count"),
    [
        *((case, 0) for case in WITH_FEW),
        *((case, 16) for case in WITH_SECRETS if case not in LONGEST),
        *(pytest.param(case, MOST, marks=pytest.mark.soak) for case in WITH_SECRETS),
    ],
)
async def test_others_have_their_turns(lab: Lab, case: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait far less than where nobody pays, with so many secrets, or with the two that the lab has."""
    if count:
        lab.secrets = secrets(count)
    lab.answer, asked, connections = CASES[case]
    singles = SINGLE if case.startswith("records") else 0
    meter.install()
    # The least of a few, as the machine may be busy.
    ours = min([await longest(lab, asked, connections, singles) for _ in range(3)])
    monkeypatch.setattr(meter, "SLICE", float("inf"))
    weak = await longest(lab, asked, connections, singles)
    assert ours < (0.05 if case in WITH_FEW else 0.5) * weak


async def test_what_is_looked_for_is_made_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many connections look for it: it may be tens of MiB."""
    lab.secrets = secrets(MOST)
    made, real = [], redaction.Redaction

    def counted(secrets: list[Secret]) -> redaction.Redaction:
        made.extend(secrets)
        return real(secrets)

    monkeypatch.setattr(interception, "Redaction", counted)
    shared = interception.Interception(lab.secrets, OURS, allowlist([]))
    first, second = await asyncio.gather(shared.redaction(lab.secrets), shared.redaction(lab.secrets[1:]))
    assert len(made) == len(lab.secrets)
    assert second.marks.items() < first.marks.items()
    keys = {id(mark) for mark in first.marks}
    assert all(id(mark) in keys for mark in second.marks)
    shared.remove(lab.secrets)
    assert not shared._redactions
