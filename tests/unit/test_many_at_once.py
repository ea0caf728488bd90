"""What thousands of connections want at the same moment: some of it in each iteration of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from era.api.guard import Guard
from era.api.routing.event_stream import Event, event_stream
from era.core.concurrency import meter
from era.core.concurrency.event_log import Gap
from era.core.live.output_log import OutputLog, Piece
from era.core.owners.api_keys import OPERATOR

MANY = 1000
SHORT = 1e-4
"""Seconds of a slice in which no more than a few of them go on, however fast this machine is."""


@pytest.fixture(params=[True, False], ids=["", "weakened"])
def is_sound(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Weakened, nobody pays."""
    monkeypatch.setattr(meter, "SLICE", SHORT if request.param else float("inf"))
    return bool(request.param)


class Ticks:
    """The most that a count grows by in one iteration of the loop."""

    def __init__(self, count: Callable[[], int]) -> None:
        self._count, self._seen, self.most = count, count(), 0
        self._loop = asyncio.get_running_loop()
        self._tick()

    def _tick(self) -> None:
        now = self._count()
        self.most, self._seen = max(self.most, now - self._seen), now
        self._handle = self._loop.call_soon(self._tick)

    def stop(self) -> int:
        self._handle.cancel()
        self._tick()
        self._handle.cancel()
        return self.most


async def never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


@pytest.mark.slow
async def test_many_who_follow_the_same_thing(is_sound: bool) -> None:
    meter.install()
    sent, expected, done, log = 0, MANY, asyncio.Event(), OutputLog()

    async def events() -> AsyncGenerator[Event | Gap]:
        async for piece in log.follow(0):
            if isinstance(piece, Piece):
                yield Event(piece.number, "stdout", {"content": piece.data.decode()})

    async def send(message: Message) -> None:
        nonlocal sent
        sent += b"event: stdout" in message.get("body", b"")
        if sent == expected:
            done.set()

    scope = {"type": "http", "asgi": {"spec_version": "2.3"}, "state": {"caller": OPERATOR}}
    followers = [asyncio.create_task(event_stream(events())(scope, never, send)) for _ in range(MANY)]
    await asyncio.sleep(0.05)
    ticks = Ticks(lambda: sent)
    for number in range(1, 4):
        expected = MANY * number
        log.append("stdout", b"a line\n")
        await done.wait()
        done.clear()
    assert ticks.stop() < MANY / 5 if is_sound else ticks.stop() > MANY / 2, ticks.most
    log.finish(0, None, None)
    await asyncio.gather(*followers)


async def test_many_requests_of_one_caller_and_one_of_another(is_sound: bool) -> None:
    meter.install()
    begun: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        begun.append(scope["client"][0])

    async def send(message: Message) -> None:
        pass

    guard = Guard(app, keys=None, names=(), idle_seconds=1)

    def call(address: str, path: str) -> asyncio.Task[None]:
        scope: dict[str, Any] = {
            "type": "http",
            "method": "GET",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
        }
        scope |= {"headers": [(b"host", b"localhost")], "client": (address, 1), "extensions": {}}
        return asyncio.create_task(guard(scope, never, send))

    ticks = Ticks(lambda: len(begun))
    calls = [call("192.0.2.1", "/proxy/x/80/") for _ in range(MANY)]
    calls += [call("192.0.2.2", "/proxy/x/80/"), call("192.0.2.1", "/health")]
    await asyncio.gather(*calls)
    assert ticks.stop() < MANY / 5 if is_sound else ticks.stop() > MANY / 2, ticks.most
    if is_sound:
        assert begun.index("192.0.2.2") < MANY / 5, "it doesn't wait for those of others"
