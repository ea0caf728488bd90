"""A host's lease and its view of the others, on rows that do as they are told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest

from era.api.routes.health import ready
from era.core import models
from era.core.cluster.homes import Home, Homes, Host, HostRecord, Place, View
from era.core.models import now, set_clock
from era.errors import HostLost, NoLease, NotReady, Unavailable, Unready
from tests.unit.core import until

LEASE = 0.5


class Rows:
    """A HomeStore whose heartbeats fail as `failure` says."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.beats = self.failed = 0
        self.sees_nothing = False
        self.others = {"other": Host("other", "http://other")}
        self.place = Place(1, None)
        self.left: list[str] = []
        self.taken: list[int] = []
        self.seen: Iterator[Mapping[str, int]] = iter(())

    async def join(self, host: Host, lease_seconds: float) -> View:
        return await self.beat(host)

    async def beat(self, host: Host, renewed: Callable[[], None] = lambda: None) -> View:
        if self.failure is not None:
            self.failed += 1
            raise self.failure
        self.beats += 1
        renewed()
        if self.sees_nothing:
            raise Unavailable("somebody has locked what it looks at")
        return View({host.id: host, **self.others}, host.id, now())

    async def leave(self, host_id: str) -> None:
        self.left.append(host_id)

    async def heartbeats_at(self, url: str) -> Mapping[str, int]:
        return next(self.seen, {})

    async def records(self) -> Sequence[HostRecord]:
        return []

    async def find(self, session: str | int) -> Place | None:
        return self.place

    async def hosts_of(self, session_keys: Sequence[int]) -> Mapping[int, Host]:
        return dict.fromkeys(session_keys, self.others["other"])

    async def take(self, session_key: int) -> Home:
        self.taken.append(session_key)
        return Home(self.others["other"], 1)

    async def give(self, session_key: int, host_id: str) -> bool:
        return False

    def forget(self, session_key: int) -> None: ...


async def started(rows: Rows, lost: Callable[[], None] = lambda: None, *, lease: float = LEASE) -> Homes:
    homes = Homes(rows, lease, lost)
    await homes.start()
    return homes


async def test_a_host_that_has_come_since_the_last_look_is_not_dead() -> None:
    rows = Rows()
    homes = await started(rows)
    died = asyncio.create_task(homes.died("new"))
    rows.others["new"] = Host("new", "http://new")
    await asyncio.wait([died], timeout=2 * LEASE)
    assert "new" in homes.hosts
    assert not died.done()
    del rows.others["new"]
    await asyncio.wait_for(died, 60)
    await homes.leave()


async def test_a_host_that_can_not_see_the_others_keeps_its_own_lease() -> None:
    rows = Rows()
    homes = await started(rows, lease=60.0)
    rows.sees_nothing = True
    beats = rows.beats
    for _ in range(6):
        homes._valid_until = 0.0  # as if it hadn't been renewed for long
        homes._beat_now.set()
        await until(lambda: homes.has_lease)
        homes.check_lease()
    assert rows.beats > beats + 5
    await homes.leave()


async def test_a_host_without_the_database_answers_until_its_lease_is_over_and_goes_on_afterwards() -> None:
    rows = Rows()
    homes = await started(rows)
    await until(lambda: homes.leads)
    rows.failure = Unavailable("the database is away")
    await until(lambda: not homes.has_lease)
    with pytest.raises(NoLease):
        homes.check_lease()
    assert not homes.leads
    assert not await homes.owns(1)
    rows.failure = None
    await until(lambda: homes.has_lease)
    await homes.leave()
    assert rows.left == [homes.host_id]
    assert not homes.has_lease


async def test_what_tells_of_this_host_ends_with_its_lease() -> None:
    rows = Rows()
    homes = await started(rows, lease=1.0)
    ended: list[str] = []
    with homes.while_leased(lambda: ended.append("over before")):
        before = rows.beats
        await until(lambda: rows.beats > before + 2 * 5)  # of several leases
    assert ended == []
    with homes.while_leased(lambda: ended.append("goes on")):
        rows.failure = Unavailable("the database is away")
        await until(lambda: ended)
        assert not homes.has_lease
    with homes.while_leased(lambda: ended.append("came too late")):
        assert ended == ["goes on", "came too late"]
    rows.failure = None
    await until(lambda: homes.has_lease)
    with homes.while_leased(lambda: ended.append("again")):
        rows.failure = Unavailable("the database is away once more")
        await until(lambda: len(ended) == 3)
    await homes.leave()


async def test_no_two_hosts_are_reached_at_one_url() -> None:
    rows = Rows()
    homes = Homes(rows, LEASE, lambda: None)
    rows.seen = iter([{"gone": 1}, {"gone": 1, "new": 5}, {"new": 5}, {}])
    await homes.check_alone_at("http://a")
    rows.seen = iter([{"gone": 1, "other": 5}, {"other": 5}, {"other": 6}])
    with pytest.raises(NotReady, match=r"at http://a, too: .* ERA_HOST_URL"):
        await homes.check_alone_at("http://a")


async def test_of_hosts_that_start_at_one_url_at_the_same_time_one_finds_out() -> None:
    """Neither has told its URL while the other looks whether it's alone."""
    rows = Rows()
    homes = await started(rows)
    rows.seen = iter([{homes.host_id: 1}, {homes.host_id: 2, "other": 2}])
    await homes.reached_at("http://a")
    with pytest.raises(NotReady, match="at http://a, too"):
        await homes.reached_at("http://a")
    await homes.leave()


async def test_a_host_that_was_declared_dead_ends() -> None:
    rows, ended = Rows(), asyncio.Event()
    homes = await started(rows, ended.set)
    rows.failure = HostLost("declared dead")
    await ended.wait()
    assert not homes.has_lease


async def test_a_heartbeat_that_fails_as_nobody_expected_is_not_the_last() -> None:
    rows = Rows()
    homes = await started(rows)
    rows.failure = RuntimeError("a bug")
    await until(lambda: not homes.has_lease)
    rows.failure = None
    await until(lambda: homes.has_lease)
    await homes.leave()


async def test_a_host_is_ready_once_the_others_can_know_where_it_listens() -> None:
    """Which they can at once, and not only with the next heartbeat that is due."""
    rows = Rows()
    homes = Homes(rows, 100, lambda: None)
    context: Any = SimpleNamespace(homes=homes, readiness=AsyncMock(), places=dict)
    await homes.start()
    with pytest.raises(Unready):
        await ready(context)
    rows.failure = Unavailable("the database is away")
    said = asyncio.create_task(homes.reached_at("http://this"))
    await until(lambda: rows.failed)
    with pytest.raises(Unready):
        await ready(context)
    rows.failure = None
    await asyncio.wait_for(homes.reached_at("http://this"), 10)
    assert (await ready(context)).status_code == 200
    await said
    await homes.leave()


async def test_what_follows_a_heartbeat_keeps_none_from_being_sent() -> None:
    rows = Rows()
    homes = await started(rows)
    never = asyncio.Event()

    async def hangs() -> None:
        await never.wait()

    async def fails() -> None:
        raise Unavailable("nor this")

    homes.each_beat(hangs)
    homes.each_beat(fails)
    before = rows.beats
    await until(lambda: rows.beats > before + 3)
    never.set()
    await homes.leave()


async def test_all_who_ask_while_somebody_reads_have_one_more_reading_which_begins_afterwards() -> None:
    homes = Homes(Rows(), LEASE, lambda: None)
    change, seen, goes_on = 0, [], asyncio.Event()

    async def read() -> None:
        was = change
        await goes_on.wait()
        seen.append(was)

    homes.shares(read)
    first = asyncio.create_task(homes.catch_up())
    await asyncio.sleep(0)
    asked = []
    for change in range(1, 10):  # noqa: B007  `read` sees it
        asked.append(asyncio.create_task(homes.catch_up()))
        await asyncio.sleep(0)
    goes_on.set()
    await asyncio.wait_for(asyncio.gather(first, *asked), 10)
    assert seen == [0, 9]


async def test_the_death_of_a_host_is_seen() -> None:
    rows = Rows()
    homes = await started(rows)
    died = asyncio.create_task(homes.died("other"))
    await asyncio.sleep(0)
    assert not died.done()
    rows.others.clear()
    await died
    await homes.leave()


async def test_reading_takes_no_home() -> None:
    rows = Rows()
    homes = await started(rows)
    assert await homes.elsewhere("s", take=False) is None
    assert rows.taken == []
    assert await homes.elsewhere("s", take=True) == rows.others["other"]  # who was faster
    rows.place = Place(1, Home(Host(homes.host_id, ""), 1))
    assert await homes.elsewhere("s", take=True) is None
    assert homes.is_here("s")
    homes.moved("s")
    assert not homes.is_here("s")
    await homes.leave()


async def test_of_sessions_without_a_home_some_are_taken_to_do_something_for_them() -> None:
    class Homeless(Rows):
        async def hosts_of(self, session_keys: Sequence[int]) -> Mapping[int, Host]:
            return {1: Host(homes.host_id, ""), 2: self.others["other"]}

        async def take(self, session_key: int) -> Home:
            self.taken.append(session_key)
            return Home(Host(homes.host_id, ""), 1)

    rows = Homeless()
    homes = await started(rows, lease=60.0)
    owned = await homes.owned(range(1, 100), 3)
    assert owned == [1, *rows.taken]
    assert len(set(rows.taken) - {1, 2}) == 3
    assert await homes.owned(range(1, 100), 0) == [1]
    await homes.leave()


async def test_time_is_that_of_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_clock", models._Clock())
    machine = time.time_ns() // 1000
    assert abs(now() - machine) < 5_000_000
    assert set_clock(now() + 400_000) == 0, "time jumps with how long a message takes"
    assert abs(set_clock(machine + 300_000_000) - 300_000_000) < 5_000_000
    assert abs(now() - machine - 300_000_000) < 5_000_000
    assert abs(set_clock(machine) + 300_000_000) < 5_000_000
    assert abs(now() - machine) < 5_000_000
