"""Answers of programs in thousands of chunks: what is sent on to the client."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import h11

from era.api.protocol.exchange import Exchange
from era.errors import EraError
from tests.unit.core import until


class AnswerOnly(Exchange):
    """An exchange of which only the answer matters."""

    def request(self) -> h11.Request:
        raise NotImplementedError  # nothing here asks for it

    def answer_headers(self, response: h11.Response | h11.InformationalResponse) -> list[tuple[bytes, bytes]]:
        return list(response.headers)

    def failure(self, what: str | None) -> EraError:
        return EraError(what or "")


async def test_chunks_of_a_byte_are_sent_on_together() -> None:
    reader, sent = asyncio.StreamReader(), list[bytes]()

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    count = 10_000
    passed = AnswerOnly({"extensions": {"era.connection": None}}, cast(Any, None), send, reader, cast(Any, None), None)
    passed._h11.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    reader.feed_data(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * count)
    download = asyncio.create_task(passed._download())
    await until(lambda: sum(map(len, sent)) == count)  # although the answer hasn't ended
    assert len(sent) < 20
    reader.feed_data(b"0\r\n\r\n")
    await download
    assert b"".join(sent) == b"x" * count
