"""Heads and trailers are paid for before they are parsed, and bodies are not."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import h11
import pytest

from era.api import exchange
from era.core.loop_slices import Budget
from era.core.paid_http import PaidEvents
from era.errors import EraError
from tests.unit.core import until

FIELDS = b"a: b\r\n" * 500
ASK = b"POST / HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n5\r\n0\r\n\r\n\r\n3e8\r\n" + b"a" * 1000 + b"\r\n0\r\n"
CASES = {
    "head": (h11.SERVER, ASK + FIELDS + b"Content-Length: 9\r\n\r\n0\r\n\r\n0\r\n\r"),
    "trailers": (h11.SERVER, ASK + CHUNKED + FIELDS + b"\r\n"),
    "answer's head": (h11.CLIENT, b"HTTP/1.1 200 OK\r\n" + FIELDS + b"\r\n" + b"a" * 1000),
    "answer's head after another": (h11.CLIENT, b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n" + FIELDS + b"\r\n"),
    "answer's trailers": (h11.CLIENT, b"HTTP/1.1 200 OK\r\n" + CHUNKED + FIELDS + b"\r\n"),
}


class Counted(Budget):
    paid: float = 0

    async def spend(self, microseconds: float) -> None:
        self.paid += microseconds


@pytest.mark.parametrize("size", [1, 3, 700, 1 << 20])
@pytest.mark.parametrize("case", CASES)
async def test_fields_are_paid_for_before(case: str, size: int) -> None:
    role, data = CASES[case]
    http, budget = h11.Connection(role), Counted(None)
    if role is h11.CLIENT:
        http.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    events, paid_before = PaidEvents(http, budget, 1.0), []
    for at in range(0, len(data), size):
        http.receive_data(data[at : at + size])
        while (event := await events.next()) not in (h11.NEED_DATA, h11.PAUSED):
            if len(getattr(event, "headers", ())) >= 500:
                paid_before.append(budget.paid)
    assert len(paid_before) == 1
    assert len(FIELDS) < paid_before[0] < len(FIELDS) + 100
    assert budget.paid < paid_before[0] + 10, "a body costs nothing, but for a first piece that looks like an end"


class PassedOn(exchange.Exchange):
    """One of which only the answer matters."""

    def request(self) -> h11.Request:
        raise NotImplementedError  # nothing here asks for it

    def answer_headers(self, response: h11.Response | h11.InformationalResponse) -> list[tuple[bytes, bytes]]:
        return list(response.headers)

    def failure(self, what: str | None) -> EraError:
        return EraError(what or "")


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("answer's")])
async def test_answers_of_sessions_and_hosts_are_paid_for(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "Budget", Counted)
    reader, told = asyncio.StreamReader(), []

    async def send(message: Any) -> None:
        told.append(message["type"])

    reader.feed_data(CASES[case][1])
    reader.feed_eof()
    scope = {"extensions": {"era.connection": None}}
    passed = PassedOn(scope, cast(Any, None), send, reader, cast(Any, None), None)
    passed._h11.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    await passed._download()
    assert told[0] == "http.response.start"
    assert cast(Counted, passed._budget).paid > len(FIELDS) * exchange._HEAD_BYTE_US


async def test_chunks_of_a_byte_are_sent_on_together() -> None:
    """Each slice of the event loop parses 25 of them; to send these alone cost more than that."""
    reader, sent = asyncio.StreamReader(), list[bytes]()

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    count = 10_000
    passed = PassedOn({"extensions": {"era.connection": None}}, cast(Any, None), send, reader, cast(Any, None), None)
    passed._h11.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    reader.feed_data(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * count)
    download = asyncio.create_task(passed._download())
    await until(lambda: sum(map(len, sent)) == count)  # also though the answer hasn't ended
    assert len(sent) < 20
    reader.feed_data(b"0\r\n\r\n")
    await download
    assert b"".join(sent) == b"x" * count
