"""Readers of one watch: what each event costs the event loop, however many they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fastapi import Request

from era.api import watching
from era.api.context import Context
from era.api.event_stream import encoded
from era.core.api_keys import Caller
from era.core.event_log import EventLog
from era.core.live.watching import FileEvent
from era.core.models import OwnedId


async def test_event_is_encoded_once_for_all_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 80 readers had each of its own, and was sent them one by one."""
    made = list[Any]()

    def counting(event: Any) -> bytes:
        made.append(event)
        return encoded(event)

    monkeypatch.setattr(watching, "encoded", counting)
    log: EventLog[FileEvent] = EventLog(max_size=1 << 20)
    for number in range(50):
        log.append(FileEvent("write", f"file{number}"))
    log.end()

    @asynccontextmanager
    async def watched(*_: object, **__: object) -> AsyncIterator[Any]:
        yield log.pieces(0, 100)

    api_keys = SimpleNamespace(until_barred=lambda *_: asyncio.Event().wait())
    context = cast(Context, SimpleNamespace(watching=SimpleNamespace(watched=watched), api_keys=api_keys))

    async def read() -> list[bytes]:
        request = Request({"type": "http", "headers": [], "state": {"caller": Caller("me")}})
        answer = await watching.watch_files(OwnedId("me", "a"), request, context, 0)
        sent = list[bytes]()

        async def send(message: Any) -> None:
            if message.get("body"):
                sent.append(message["body"])

        await answer({"type": "http", "state": {}}, asyncio.Event().wait, send)  # type: ignore[arg-type]
        return sent

    answers = [await read() for _ in range(8)]
    assert answers[0] == answers[7]
    assert len(answers[0]) == 1, "events that are there go together"
    assert answers[0][0].count(b"event: write") == 50
    assert len(made) == 50
