"""Numbered events: their log, for readers that come early, late or again, and what is sent of them."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from era.api.routing import event_stream as streams
from era.api.routing.event_stream import Event, event_stream
from era.core.concurrency.event_log import EventLog, Gap
from era.errors import Unavailable


async def _all(log: EventLog[str], after: int = 0) -> list[tuple[int, str] | Gap]:
    return [item async for item in log.follow(after)]


async def test_readers_that_come_early_late_or_again_get_the_same() -> None:
    log: EventLog[str] = EventLog(max_size=1000)
    early = asyncio.create_task(_all(log))
    gone = asyncio.create_task(_all(log))
    await asyncio.sleep(0)
    for n in range(1, 101):
        assert log.append(str(n)) == n == log.last
        if n % 7 == 0:
            await asyncio.sleep(0)
    again = asyncio.create_task(_all(log, after=40))
    ahead = asyncio.create_task(_all(log, after=100))
    await asyncio.sleep(0)
    gone.cancel()
    log.append("last")
    log.end()
    expected = [(n, str(n)) for n in range(1, 101)] + [(101, "last")]
    assert await early == await _all(log) == expected
    assert await again == expected[40:]
    assert await ahead == expected[100:]
    assert await _all(log, after=101) == await _all(log, after=5000) == []
    with pytest.raises(RuntimeError):
        log.append("late")


async def test_what_is_kept_is_bounded_and_what_is_gone_is_said() -> None:
    log: EventLog[str] = EventLog(max_size=100, max_events=20)
    slow = log.follow()
    log.append("first", 10)
    assert await anext(slow) == (1, "first")
    for n in range(2, 51):
        log.append(str(n), 10)
    assert await anext(slow) == Gap(2, 40), "ten of size 10 are kept"
    assert await anext(slow) == (41, "41")
    for n in range(51, 101):
        log.append(str(n), 0)
    assert await anext(slow) == Gap(42, 80), "twenty are kept"
    assert await anext(slow) == (81, "81")
    assert await anext(log.follow()) == Gap(1, 80)
    assert await anext(log.follow(79)) == Gap(80, 80)
    assert await anext(log.follow(80)) == (81, "81")
    log.append("large", 1_000_000)
    log.end()
    assert [item async for item in slow] == [Gap(82, 100), (101, "large")]


async def _sent(events: AsyncGenerator[Event | Gap], until: int = 1 << 30, key_until: int | None = None) -> bytes:
    """What the answer with these events sends, to a caller that hangs up after `until` pieces, and whose key is good
    for `key_until` pieces, if it has one."""
    pieces: list[bytes] = []
    hung_up = asyncio.Event()
    ended = asyncio.Event()

    async def barred() -> None:
        await ended.wait()

    async def send(message: Any) -> None:
        pieces.append(message.get("body", b""))
        if len(pieces) > until:
            hung_up.set()
        if key_until is not None and len(pieces) > key_until:
            ended.set()
            await asyncio.sleep(0.01)

    async def receive() -> Any:
        await hung_up.wait()
        return {"type": "http.disconnect"}

    await event_stream(events, barred=None if key_until is None else barred)(
        {"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send
    )
    return b"".join(pieces)


async def test_what_is_sent() -> None:
    async def events() -> AsyncGenerator[Event | Gap]:
        yield Gap(1, 3)
        yield Event(4, "line", {"text": "a\r\n\ndata: ü"})
        raise Unavailable("No more.", hint="Wait.")

    blocks = (await _sent(events())).decode().removesuffix("\n\n").split("\n\n")
    fields = [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]
    assert [(each["event"], each.get("id"), json.loads(each["data"])) for each in fields] == [
        ("gap", "3", {"type": "gap", "from": 1, "to": 3}),
        ("line", "4", {"type": "line", "text": "a\r\n\ndata: ü"}),
        ("error", None, {"type": "error", "error": "No more.", "code": Unavailable.code, "hint": "Wait."}),
    ]


async def test_a_bug_is_an_event_without_its_reason() -> None:
    async def events() -> AsyncGenerator[Event | Gap]:
        yield Event(1, "line", {})
        raise KeyError("secret")

    sent = (await _sent(events())).decode()
    line, error = sent.split("\n\n", 1)
    assert line.endswith("id: 1")
    assert error.startswith("event: error\n")
    assert "secret" not in error
    assert "id:" not in error


async def test_silence_is_broken_and_a_reader_that_goes_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "HEARTBEAT_SECONDS", 0.01)
    log: EventLog[str] = EventLog(max_size=10)
    closed = asyncio.Event()

    async def events() -> AsyncGenerator[Event | Gap]:
        try:
            async for item in log.follow():
                yield item if isinstance(item, Gap) else Event(item[0], "line", {})
        finally:
            closed.set()

    before = asyncio.all_tasks()
    log.append("x")
    sent = await _sent(events(), until=4)
    assert sent.startswith(b'event: line\ndata: {"type": "line"}\nid: 1\n\n: heartbeat\n\n: heartbeat\n\n')
    assert closed.is_set()
    gc.collect()
    assert asyncio.all_tasks() == before
