"""Hot sessions, which move where processors are idle: when, where to, and what becomes of the calls meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from era.core.homes import Host
from era.core.models import JsonObject
from tests.owners import mine
from tests.unit.core import until
from tests.unit.test_moves import Cluster, at, cluster

IDLE: dict[str, Any] = {"a": at(1), "b": at(0), "c": at(0.5)}


def hot(one: Cluster, wanted: int = 6) -> None:
    """Session `s` has a sandbox that nothing uses, where so many runs want one of two processors."""
    one.told = dict(IDLE)
    one.sandboxes.keys.add(1)
    one.is_busy(wanted)


async def test_a_hot_session_moves_to_the_host_with_least_to_do_and_its_sandbox_goes() -> None:
    async with cluster(places=8) as one:
        hot(one)
        assert await one.move()
        assert one.rows.given == [(1, "b")]
        assert one.sandboxes.released == [1]
        assert one.moves.has_gone("s")


async def test_a_process_needs_a_processor_too() -> None:
    async with cluster(places=8) as one:
        hot(one)
        assert await one.move(live=True)


async def test_a_process_waits_for_no_run() -> None:
    """It begins beside them, wherever that is."""
    async with cluster(places=8) as one:
        hot(one)
        async with one.turns.take(mine("s"), long=True), asyncio.timeout(5):
            assert not await one.move(live=True)
        assert one.rows.given == []


async def runs_get_processors(one: Cluster) -> None:
    one.processors.add(-3)


async def only_just_wanted(one: Cluster) -> None:
    one.processors._too_many.shift(-0.6)


async def has_come_just_now(one: Cluster) -> None:
    one.homes.stay(1)


async def all_have_as_much_to_do(one: Cluster) -> None:
    one.told = dict.fromkeys("abc", at(4))


async def others_are_larger_and_have_as_much_to_do(one: Cluster) -> None:
    one.told = dict.fromkeys("abc", at(9, slots=8))


async def others_do_not_say(one: Cluster) -> None:
    """Hosts of the version before."""
    one.told = {host: {"sandboxes": 8, "live": 8, "packages": []} for host in "abc"}


async def others_have_no_place(one: Cluster) -> None:
    one.told = {host: {**at(0), "sandboxes": 0} for host in "abc"}


async def is_live(one: Cluster) -> None:
    one.live.keys.add(1)


async def takes_deliveries(one: Cluster) -> None:
    one.works.add(1)


@pytest.mark.parametrize(
    "why",
    [
        runs_get_processors,
        only_just_wanted,
        has_come_just_now,
        all_have_as_much_to_do,
        others_are_larger_and_have_as_much_to_do,
        others_do_not_say,
        others_have_no_place,
        is_live,
        takes_deliveries,
    ],
)
async def test_a_hot_session_stays(why: Callable[[Cluster], Awaitable[None]]) -> None:
    async with cluster(places=8) as one:
        hot(one)
        await why(one)
        assert not await one.move()
        assert (one.rows.given, one.sandboxes.released) == ([], [])


async def test_a_session_that_had_no_home_moves_at_once() -> None:
    async with cluster(places=8) as one:
        hot(one)
        await one.arrives()
        assert await one.move()


async def test_no_more_move_than_make_both_hosts_alike() -> None:
    """Neither host's mean of the last seconds shows what was just sent, so that is counted besides."""
    async with cluster(places=40) as one:
        hot(one, wanted=14)
        one.told = {"a": None, "b": at(0), "c": None}
        for key in range(1, 15):
            await one.is_home(f"s{key}", key)
            one.homes._since[key] -= 60
            one.moves._asked_at -= 60
            await one.move(name=f"s{key}")
        # Of 14 there are 8 left. With one more the other host would have 7, which is over three quarters of that.
        assert len(one.rows.given) == 6


@pytest.mark.parametrize("others", [7])
async def test_runs_of_many_clients_go_on_until_the_session_moves_and_then_there(
    others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are before: they are waited for as long as one after the other ends."""
    monkeypatch.setattr("era.core.moves._PATIENCE", 2.0)
    async with cluster(places=8) as one:
        hot(one)
        ended: list[str] = []
        turn = asyncio.Event()

        async def run(number: int) -> None:
            """A call that has passed the gate, and waits for the session's turn."""
            async with one.moves.calling("s", to_run=True), one.turns.take(mine("s"), long=True):
                one.sandboxes.busy.add(1)
                await turn.wait()
                await asyncio.sleep(0.4)
                if one.turns.long_ones(mine("s")) == 1:
                    one.sandboxes.busy.clear()
            ended.append(f"here {number}")

        async def later() -> None:
            async with one.moves.calling("s", to_run=True):
                ended.append("there" if one.moves.has_gone("s") else "here")

        async def read() -> None:
            async with one.moves.calling("s"):
                ended.append("read")

        runs = [asyncio.create_task(run(number)) for number in range(others)]
        await until(lambda: one.moves._calls["s"] == others)
        moving = asyncio.create_task(one.move())
        await until(lambda: "s" in one.moves._leaving)
        after = asyncio.create_task(later())
        await read()
        turn.set()
        assert await moving
        await asyncio.gather(*runs, after)
        assert ended == ["read", *(f"here {number}" for number in range(others)), "there"]
        assert one.rows.given == [(1, "b")]


async def test_calls_that_come_at_the_same_moment_move_with_the_first() -> None:
    async with cluster(places=8) as one:
        hot(one)
        one.rows.may_give.clear()

        async def call() -> bool:
            async with one.moves.calling("s", to_run=True):
                await asyncio.sleep(0)  # as whoever looks up where the session is at home
                return await one.moves.move(mine("s"), live=False)

        calls = [asyncio.create_task(call()) for _ in range(8)]
        await until(lambda: one.turns.taken(mine("s")))
        one.rows.may_give.set()
        assert await asyncio.gather(*calls) == [True] * 8
        assert one.rows.given == [(1, "b")]
        assert not one.moves._calls


async def test_calls_are_not_held_up_by_one_that_lasts_and_leaves_the_turn_free() -> None:
    """Such as one that follows the events of a run: the session stays, and isn't tried again at once."""
    async with cluster(places=8) as one:
        hot(one)
        async with one.moves.calling("s"), asyncio.timeout(5):
            assert not await one.move()
            assert "s" not in one.moves._leaving
        assert not await one.move(), "just tried"
        one.homes._since[1] -= 60
        assert await one.move()


async def test_a_session_that_becomes_live_while_it_is_to_move_stays() -> None:
    async with cluster(places=8) as one:
        hot(one)
        async with one.turns.take(mine("s"), long=True):
            moving = asyncio.create_task(one.move())
            await until(lambda: "s" in one.moves._leaving)
            async with one.moves.calling("s"):
                assert not await one.moves.move(mine("s"), live=True), "it begins where the session is"
                one.live.keys.add(1)
            assert not await moving


async def test_a_long_run_is_waited_for_some_seconds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("era.core.moves._PATIENCE", 0.5)
    async with cluster(places=8) as one:
        hot(one)
        one.sandboxes.busy.add(1)
        async with one.turns.take(mine("s"), long=True):
            assert not await one.move()
        assert one.rows.given == []


async def test_a_run_that_begins_at_the_last_moment_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose caller has hung up before it had the turn is no call that could be counted."""
    monkeypatch.setattr("era.core.moves._KNOWN_SECONDS", -1)
    async with cluster(places=8) as one, AsyncExitStack() as turn:
        hot(one)
        room = one.room

        async def asked(host: Host, packages: str | None = None) -> JsonObject | None:
            if one.moves._leaving["s"].for_all and not one.turns.taken(mine("s")):
                await turn.enter_async_context(one.turns.take(mine("s"), long=True))
            return await room(host, packages)

        one.room = asked  # type: ignore[method-assign]  # the same, and something besides
        async with asyncio.timeout(5):
            assert not await one.move()
        assert one.turns.taken(mine("s"))
        assert one.rows.given == []


async def test_a_run_that_waits_for_its_slot_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where processors are full it may do so for longer than the patience is with one that runs."""
    monkeypatch.setattr("era.core.moves._PATIENCE", 0.2)
    async with cluster(places=8) as one:
        hot(one)
        async with one.turns.take(mine("s"), long=True):
            moving = asyncio.create_task(one.move())
            await asyncio.sleep(1)
        assert await moving


async def test_a_run_that_ends_when_somebody_waits_for_the_turn_is_not_waited_for() -> None:
    """Nobody would wait for the turn while its runs wait for the session to move."""
    async with cluster(places=8) as one:
        hot(one)
        async with one.turns.take(mine("s")), asyncio.timeout(5):
            assert not await one.move()
        assert one.rows.given == []


async def test_a_session_with_a_sandbox_moves_where_it_can_be_live() -> None:
    async with cluster(places=8) as one:
        one.live.number = 4
        one.sandboxes.keys.add(1)
        one.sandboxes.busy.add(1)
        assert not await one.move(live=True), "its run could not go on elsewhere"
        one.sandboxes.busy.clear()
        assert not await one.move(), "it has what a run needs"
        assert await one.move(live=True)
        assert one.rows.given == [(1, "c")]
        assert one.sandboxes.released == [1]


async def test_a_move_that_fails_leaves_the_sandbox() -> None:
    async with cluster(places=8) as one:
        hot(one)

        async def nobody(session_key: int, host_id: str) -> bool:
            return False

        one.rows.give = nobody  # type: ignore[method-assign]  # that host is dead by then
        assert not await one.move()
        assert one.sandboxes.released == []
