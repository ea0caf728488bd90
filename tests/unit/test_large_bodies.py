"""How much is held of bodies that aren't complete, whoever sends them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest
from starlette.types import Message, Receive, Scope, Send

from era.api import large_bodies
from era.api.guard import Guard

MIB = 1 << 20


class Callers:
    """Callers of a guard, of whose bodies `held` is what is in memory."""

    def __init__(self, idle_seconds: float = 300.0) -> None:
        """`idle_seconds` is for how long a body may pause."""
        self.held = 0
        self.guard = Guard(self.app, keys=None, names=(), idle_seconds=idle_seconds)
        self.statuses: list[int] = []

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        size, more = 0, True
        try:
            while more:
                message = await receive()
                size, self.held = size + len(message["body"]), self.held + len(message["body"])
                more = message["more_body"]
        finally:
            self.held -= size
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def call(self, pieces: Iterable[bytes], declared: int | None, goes_on: asyncio.Event) -> None:
        """A call whose body's end comes once it `goes_on`."""
        headers = [(b"host", b"localhost")]
        headers += [] if declared is None else [(b"content-length", str(declared).encode())]
        rest = iter(pieces)

        async def receive() -> Message:
            if (piece := next(rest, None)) is not None:
                return {"type": "http.request", "body": piece, "more_body": True}
            await goes_on.wait()
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.statuses.append(message["status"])

        scope = {"type": "http", "method": "POST", "path": "/x", "raw_path": b"/x", "headers": headers}
        await self.guard(scope | {"query_string": b"", "extensions": {}}, receive, send)


def bound(monkeypatch: pytest.MonkeyPatch, *, is_sound: bool) -> None:
    """Leave room for 64 MiB of bodies, or have all of them need none."""
    monkeypatch.setattr(large_bodies, "MOST_BYTES", 64 * MIB)
    if not is_sound:
        monkeypatch.setattr(large_bodies, "SMALL_BYTES", 1 << 40)


@pytest.mark.parametrize("declared", [MIB - 1, None], ids=["declared", "chunked"])
@pytest.mark.parametrize("is_sound", [True, False], ids=["", "weakened"])
async def test_many_that_are_not_large_wait_as_well(
    declared: int | None, is_sound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound(monkeypatch, is_sound=is_sound)
    callers, goes_on = Callers(), asyncio.Event()
    pieces = [bytes(MIB // 32)] * 28
    calls = [asyncio.create_task(callers.call(pieces, declared, goes_on)) for _ in range(160)]
    for _ in range(1000):
        await asyncio.sleep(0)
    assert (callers.held <= 64 * MIB) is is_sound
    goes_on.set()
    await asyncio.gather(*calls)
    assert (callers.statuses, callers.held) == ([200] * 160, 0)


@pytest.mark.parametrize("declared", [10 * MIB, None], ids=["declared", "chunked"])
@pytest.mark.parametrize("is_sound", [True, False], ids=["", "weakened"])
async def test_bodies_wait_for_room(declared: int | None, is_sound: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bound(monkeypatch, is_sound=is_sound)
    callers, goes_on = Callers(), asyncio.Event()
    pieces = [bytes(MIB // 16)] * 160
    calls = [asyncio.create_task(callers.call(pieces, declared, goes_on)) for _ in range(12)]
    await asyncio.sleep(0.1)
    assert (callers.held <= 44 * MIB) is is_sound
    goes_on.set()
    await asyncio.gather(*calls)
    assert callers.statuses == [200] * 12
    assert callers.held == 0
    again = asyncio.Event()
    again.set()
    await callers.call(pieces, declared, again)
    assert callers.statuses[-1] == 200


async def test_who_waits_too_long_is_refused_and_small_bodies_never_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_bodies, "MOST_BYTES", 64 * MIB)
    callers, ended = Callers(0.3), asyncio.Event()
    ended.set()
    with callers.guard._large_bodies.room("") as room:
        await room.take(32 * MIB, 0.1)
        await callers.call([b"x"], 2 * MIB, ended)
        await callers.call([b"x"], large_bodies.SMALL_BYTES, ended)
    await callers.call([b"x"], 2 * MIB, ended)
    assert callers.statuses == [503, 200, 200]
