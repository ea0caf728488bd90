"""WebSockets that are passed on, and what ends them at this end."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import h11
import pytest
from starlette.types import Message

from era.api.protocol import tunnel
from era.api.protocol.exchange import Exchange
from era.core.concurrency import frames
from era.errors import EraError, Unauthorized

SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n"
CLOSE = b"\x88\x80mask"
"""A caller's Close frame, without a reason."""


class PassedOn(Exchange):
    """A WebSocket in which nothing moves, or one that something else ends."""

    barred: asyncio.Event

    def request(self) -> h11.Request:
        headers = [("Host", "x"), ("Connection", "Upgrade"), ("Upgrade", "websocket")]
        return h11.Request(method="GET", target="/", headers=headers)

    def answer_headers(self, response: h11.Response | h11.InformationalResponse) -> list[tuple[bytes, bytes]]:
        return []

    def failure(self, what: str | None) -> EraError:
        return EraError(what or "")

    def watches(self) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self._bar())]

    async def _bar(self) -> None:
        await self.barred.wait()
        raise Unauthorized("The key is good for it no longer.")


@pytest.mark.parametrize("end", ["idle", "barred"])
async def test_a_websocket_that_is_ended_here_waits_only_for_its_callers_close(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel, "_CLOSE_SECONDS", 3600)
    order: list[str] = []
    barred = asyncio.Event()
    from_caller, from_server = asyncio.StreamReader(), asyncio.StreamReader()
    from_server.feed_data(SWITCHED)

    async def send_raw(piece: bytes) -> None:
        if not piece and end == "barred":  # what came with the server's answer
            barred.set()
        if piece == frames.closing(frames.RESTART):
            order.append("told to leave")
            from_caller.feed_data(CLOSE)

    async def hang_up() -> None:
        order.append("hung up")

    async def drain() -> None:
        pass

    def write(piece: bytes) -> None:
        if piece == CLOSE:
            order.append("the server has the caller's close")

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        raise AssertionError(message)

    caller = SimpleNamespace(
        leave=asyncio.Event(), left=None, open_tunnel=lambda _: from_caller, send_raw=send_raw, hang_up=hang_up
    )
    scope = {"extensions": {"era.connection": caller}, "headers": [], "state": {"request_id": "r"}}
    writer = cast(Any, SimpleNamespace(write=write, drain=drain, is_closing=lambda: False))
    exchange = PassedOn(scope, receive, send, from_server, writer, None)
    exchange.barred = barred
    exchange.idle_seconds = 0.1 if end == "idle" else None
    async with asyncio.timeout(10):
        await exchange.run()
    assert order == ["told to leave", "the server has the caller's close", "hung up"]
