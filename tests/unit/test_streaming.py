"""Answers that are sent piece by piece, and callers that hang up in the middle of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest
from starlette.background import BackgroundTask

from era.api.routing.event_stream import Event, event_stream
from era.api.routing.streaming import ClosingResponse
from era.core.concurrency.tasks import Threads

SCOPE = {"type": "http", "asgi": {"spec_version": "2.3"}}
"""As uvicorn says it."""


class Caller:
    """A caller that hangs up when it is told to."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.got: list[bytes] = []

    async def receive(self) -> Any:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.got.append(message.get("body", b""))


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_hang_up_within_a_piece_on_a_thread_leaves_the_event_loop_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    caller, begun, go_on, closed = Caller(), asyncio.Event(), threading.Event(), []
    loop, waits, wait = asyncio.get_running_loop(), 0, asyncio.wait
    threads = Threads(1, "test-streaming")

    def piece() -> bytes:
        loop.call_soon_threadsafe(begun.set)
        go_on.wait(60)
        return b"x"

    async def pieces() -> AsyncIterator[bytes]:
        yield await threads.in_turn("owner", piece)

    async def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal waits
        waits += 1
        return await wait(*arguments, **options)

    monkeypatch.setattr(asyncio, "wait", counted)  # as to_its_end does
    try:
        answer = asyncio.create_task(
            ClosingResponse(pieces(), lambda: closed.append(1))(SCOPE, caller.receive, caller.send)
        )
        await begun.wait()
        before = waits
        caller.gone.set()
        await _turns(200)
        assert not closed, "the thread may still read what would be closed"
        assert waits - before < 10
    finally:
        go_on.set()
    await answer
    assert closed == [1]
    assert caller.got == [b""], "nothing but the head"
    await threads.close()


@pytest.mark.parametrize("later", range(12))
async def test_events_are_closed_when_the_answer_has_ended(later: int) -> None:
    """Whatever was under way when the caller hung up."""
    caller, closed = Caller(), []
    loop = asyncio.get_running_loop()

    async def events() -> AsyncGenerator[Event]:
        try:
            while True:
                await asyncio.sleep(0)
                yield Event(1, "line", {})
        finally:
            await asyncio.sleep(0)
            closed.append(1)

    def hang_up(left: int) -> None:
        if left:
            loop.call_soon(hang_up, left - 1)
        else:
            caller.gone.set()

    async def send(message: Any) -> None:
        await caller.send(message)
        if len(caller.got) == 3:
            hang_up(later)

    await event_stream(events())({**SCOPE, "client": ("127.0.0.1", 1)}, caller.receive, send)
    assert closed == [1]


async def test_a_failure_of_the_pieces_is_raised_as_it_is_and_ends_the_wait_for_the_caller() -> None:
    caller, closed, after = Caller(), [], []

    async def pieces() -> AsyncIterator[bytes]:
        yield b"x"
        raise KeyError("bug")

    background = BackgroundTask(lambda: after.append(1))
    with pytest.raises(KeyError, match="bug"):
        await ClosingResponse(pieces(), lambda: closed.append(1), background=background)(
            SCOPE, caller.receive, caller.send
        )
    assert (caller.got, closed, after) == ([b"", b"x"], [1], [])


async def test_an_answer_that_is_cancelled_has_stopped_its_pieces() -> None:
    caller, begun, stopped = Caller(), asyncio.Event(), []

    async def pieces() -> AsyncIterator[bytes]:
        begun.set()
        try:
            yield await asyncio.Event().wait() and b""
        finally:
            await asyncio.sleep(0)
            stopped.append(1)

    answer = asyncio.create_task(ClosingResponse(pieces())(SCOPE, caller.receive, caller.send))
    await begun.wait()
    answer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answer
    assert stopped == [1]
