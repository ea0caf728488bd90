"""The text of the metrics, which anybody may ask for: it is made once a second."""

from __future__ import annotations

import asyncio

import pytest

from era.telemetry import gauges
from era.telemetry.gauges import KeptText


class Made:
    """Texts that are made when this is called, each of its own number."""

    def __init__(self) -> None:
        self.count = 0

    async def __call__(self) -> bytes:
        self.count += 1
        await asyncio.sleep(0)
        return b"%d" % self.count


async def test_text_is_made_once_when_many_ask_within_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges, "_KEPT_SECONDS", float("inf"))
    kept = KeptText(made := Made())
    hung_up = asyncio.create_task(kept.get())
    await asyncio.sleep(0)
    hung_up.cancel()
    assert set(await asyncio.gather(*(kept.get() for _ in range(100)))) == {b"1"}
    assert await kept.get() == b"1"
    assert made.count == 1


async def test_text_is_made_anew_when_it_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges, "_KEPT_SECONDS", 0)
    kept = KeptText(Made())
    assert [await kept.get() for _ in range(3)] == [b"1", b"2", b"3"]
