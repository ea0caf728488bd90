"""core.Moves: what a host says of its room where it is slow, and how long others wait for that."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from era.api import other_hosts
from era.api.other_hosts import OtherHosts
from era.core.homes import Host
from era.core.models import JsonObject
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


async def test_a_host_is_waited_for_longer_that_is_to_say_what_room_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    class Connections:
        async def ask(self, *_: object) -> JsonObject:
            await asyncio.sleep(other_hosts._SECONDS + 0.5)
            return {"sandboxes": 1}

    others: Any = OtherHosts.__new__(OtherHosts)
    others.connections = Connections()
    monkeypatch.setattr(other_hosts, "_ROOM_SECONDS", 60.0)
    assert await others.room(Host("a", "http://a")) == {"sandboxes": 1}
