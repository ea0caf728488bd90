"""How much is held of large bodies, whoever sends them, and whatever their requests wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from era.api import guard
from era.api.guard import Guard
from era.core.owners.api_keys import Caller

MIB = 1 << 20


class Callers:
    """Callers of a guard, of whose bodies `held` is what is in memory."""

    def __init__(self, idle_seconds: float = 300.0) -> None:
        """`idle_seconds` is for how long a body may pause."""
        self.held = 0
        self.guard = Guard(self.app, keys=None, names=(), idle_seconds=idle_seconds)
        self.statuses: list[int] = []
        self.turn: asyncio.Event | None = None
        """What requests wait for once they are complete, if anything."""

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        size, more = 0, True
        try:
            while more:
                message = await receive()
                size, self.held = size + len(message["body"]), self.held + len(message["body"])
                more = message["more_body"]
            if self.turn is not None:
                await self.turn.wait()
        finally:
            self.held -= size
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def call(
        self, pieces: Iterable[bytes], declared: int | None, goes_on: asyncio.Event, owner: str = ""
    ) -> None:
        """An owner's call whose body's end comes once it `goes_on`."""
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

        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/x", "raw_path": b"/x", "headers": headers}
        scope["state"] = {"caller": Caller(owner)}
        await self.guard(scope | {"query_string": b"", "extensions": {}}, receive, send)


def bound(monkeypatch: pytest.MonkeyPatch, *, is_sound: bool) -> None:
    """Leave room for 64 MiB of bodies, or have all of them need none."""
    monkeypatch.setattr(guard, "MOST_BYTES", 64 * MIB)
    if not is_sound:
        monkeypatch.setattr(guard, "SMALL_BYTES", 1 << 40)


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
    monkeypatch.setattr(guard, "MOST_BYTES", 64 * MIB)
    callers, ended = Callers(0.3), asyncio.Event()
    ended.set()
    with callers.guard._large_bodies.room("") as room:
        await room.take(32 * MIB, 0.1)
        await callers.call([b"x"], 2 * MIB, ended)
        await callers.call([b"x"], guard.SMALL_BYTES, ended)
    await callers.call([b"x"], 2 * MIB, ended)
    assert callers.statuses == [503, 200, 200]


@pytest.mark.parametrize("declared", [10 * MIB, None], ids=["declared", "chunked"])
@pytest.mark.parametrize("is_sound", [True, False], ids=["", "weakened"])
async def test_what_waits_for_a_turn_has_room_until_it_is_let_go(
    declared: int | None, is_sound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MOST_BYTES", 64 * MIB)
    if not is_sound:
        monkeypatch.setattr(guard.Room, "complete", lambda room, size: room.give_back())
    callers, ended = Callers(0.5), asyncio.Event()
    callers.turn = asyncio.Event()
    ended.set()

    def call(size: int, owner: str) -> asyncio.Task[None]:
        pieces = [bytes(MIB // 16)] * (size // (MIB // 16))
        return asyncio.create_task(callers.call(pieces, declared and size, ended, owner))

    greedy = [call(10 * MIB, "greedy") for _ in range(12)]
    await asyncio.wait(greedy, timeout=None if is_sound else 0.1, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.sleep(0)
    assert (callers.held <= 32 * MIB) is is_sound
    if is_sound:
        others = [call(8 * MIB, "another"), call(MIB // 16, "greedy")]
        while callers.held < sum([20 if declared is None else 30, 8]) * MIB + MIB // 16:  # noqa: ASYNC110  nothing tells
            await asyncio.sleep(0.001)
        callers.turn.set()
        await asyncio.gather(*greedy, *others)
        assert sorted(set(callers.statuses)) == [200, 503]
        assert callers.statuses.count(200) >= 2 + 2
    callers.turn.set()
    await asyncio.gather(*greedy)
    assert (callers.held, callers.guard._large_bodies.shares.taken) == (0, 0)


async def test_once_it_is_complete_a_body_holds_no_more_than_its_size() -> None:
    all_ = guard.LargeBodies()
    with all_.room("") as room, all_.room("") as small, all_.room("") as passed_on:
        passed_on.is_passed_on = True
        for each, size in ((room, 2 * MIB), (small, guard.SMALL_BYTES), (passed_on, 2 * MIB)):
            await each.take(16 * MIB, 0)
            each.complete(size)
        assert all_.shares.taken == 2 * MIB
    assert all_.shares.taken == 0
