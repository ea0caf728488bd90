"""core.Moves: what a host says of its room where its disk is slow or hangs."""

from __future__ import annotations

import asyncio

import pytest

from era.errors import Unready
from tests.unit.test_moves import cluster


async def test_a_host_with_a_slow_disk_says_what_room_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, whatever it is writing: others ask, who don't wait for long."""
    monkeypatch.setattr("era.core.readiness._VALID_SECONDS", 0.0)
    monkeypatch.setattr("era.core.readiness._ANSWER_SECONDS", 60.0)
    async with cluster(places=8) as one:
        writing, may_end = asyncio.Event(), asyncio.Event()

        async def slowly() -> None:
            writing.set()
            await may_end.wait()

        monkeypatch.setattr(one.readiness, "_write_to_store", slowly)
        assert (await one.moves.room_for_others())["sandboxes"] == 6
        await writing.wait()
        assert (await one.moves.room_for_others())["sandboxes"] == 6
        monkeypatch.setattr("era.core.readiness._ANSWER_SECONDS", 0.1)
        may_end.set()
        await one.readiness.check()
        may_end.clear()
        with pytest.raises(Unready, match="too long"):
            await one.readiness.check()
        assert (await one.moves.room_for_others())["sandboxes"] == 6
        may_end.set()


async def test_a_host_whose_disk_hangs_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is slow for a while is busy; what doesn't come to an end would have sessions sent to it for ever."""
    monkeypatch.setattr("era.core.readiness._VALID_SECONDS", 0.0)
    monkeypatch.setattr("era.core.readiness._ANSWER_SECONDS", 0.1)
    async with cluster(places=8) as one:
        may_end = asyncio.Event()
        monkeypatch.setattr(one.readiness, "_write_to_store", may_end.wait)
        with pytest.raises(Unready, match="too long"):
            await one.readiness.check()
        assert (await one.moves.room_for_others())["sandboxes"] == 6
        monkeypatch.setattr("era.core.readiness._SLOW_SECONDS", 0.0)
        assert (await one.moves.room_for_others())["sandboxes"] == 0
        may_end.set()
        await one.readiness.check()
        assert (await one.moves.room_for_others())["sandboxes"] == 6
