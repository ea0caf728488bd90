"""Hosts, leases and homes: one home a session, and no change of a session by a host that isn't it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
from sqlalchemy import Connection, event

from era.core.cluster.homes import Homes, Host
from era.core.metadata import SessionChange
from era.core.models import Session, StoredCode, now
from era.core.owners import deliveries
from era.core.owners.usage import day_of
from era.core.process import ProcessRecord
from era.core.public.inbox import Content, Outcome
from era.core.public.inbox_worker import Inbox
from era.core.runs.runs import Runs
from era.errors import CommitFailed, Fenced, HostLost, NotFound, SessionDeleted, SessionMoved
from era.store.engine import tables
from era.store.homes import _ANY_LOST, LOST, HomeRows
from era.store.metadata import SqlStore
from tests.owners import mine
from tests.soaking import soak_the_rest
from tests.store.rows import ended, execute, multiply, new, opened
from tests.unit.core import until

LONG = 3600.0
"""Seconds of a lease that doesn't end by itself in a test."""

LATE = 3.0
"""Those of one that a busy machine doesn't miss between the two transactions of a heartbeat."""


@dataclass
class OneHost:
    """A host as the store sees it: a store of its own on the shared database."""

    host: Host
    store: SqlStore
    homes: HomeRows


type Joined = Callable[..., Awaitable[OneHost]]


@pytest.fixture
async def join(url: str) -> AsyncIterator[Joined]:
    """Opens a store on the same database as a host with this name."""
    async with AsyncExitStack() as stack:

        async def joined(name: str, lease: float = LONG) -> OneHost:
            store = await stack.enter_async_context(opened(url, alone=False))
            one = OneHost(Host(name, f"http://{name}"), store, await store.homes())
            await one.homes.join(one.host, lease)
            return one

        yield joined


def age(url: str, name: str, part: float, lease: float = LONG) -> None:
    """Have so much of a host's lease go by."""
    micros = int(lease * part * 1_000_000)
    assert execute(url, f"UPDATE hosts SET heartbeat_at = heartbeat_at - {micros} WHERE id = '{name}'") == 1


async def made(one: OneHost, name: str = "s") -> Session:
    return await one.store.create_session(new(name))


async def test_the_hosts_on_record(join: Joined, url: str) -> None:
    a, b, c = await join("a", LONG / 2), await join("b"), await join("c")
    for name in ("one", "two", "gone"):
        await a.homes.take((await made(a, name)).key)
    await a.store.delete_session(mine("gone"))
    await b.homes.take((await made(a, "three")).key)
    await c.homes.leave("c")
    records = await b.homes.records()
    assert [(each.host.id, each.dead, each.leads, each.sessions) for each in records] == [
        ("a", False, True, 2),
        ("b", False, False, 1),
        ("c", True, False, 0),
    ]
    assert all(each.started_at <= each.heartbeat_at for each in records)
    age(url, "a", 1.1, LONG / 2)
    await b.homes.beat(b.host)
    assert [(each.dead, each.leads) for each in await b.homes.records()] == [
        (True, False),
        (False, True),
        (True, False),
    ]


async def test_record_of_a_dead_host_is_dropped_after_an_hour(join: Joined, url: str) -> None:
    a, b, c = await join("a"), await join("b"), await join("c")
    for one, minutes in ((a, 61), (b, 59)):
        await one.homes.leave(one.host.id)
        since = minutes * 60 * 1_000_000
        execute(url, f"UPDATE hosts SET heartbeat_at = heartbeat_at - {since} WHERE id = '{one.host.id}'")
    await c.homes.beat(c.host)
    assert {each.host.id for each in await c.homes.records()} == {"b", "c"}


async def test_the_heartbeats_of_the_hosts_at_a_url(join: Joined, url: str) -> None:
    a, b = await join("a"), await join("b")
    first = await b.homes.heartbeats_at("http://a")
    assert list(first) == ["a"]
    await a.homes.beat(a.host)
    assert (await b.homes.heartbeats_at("http://a"))["a"] > first["a"]
    age(url, "a", 1.1)
    assert await b.homes.heartbeats_at("http://a") == {}
    await b.homes.leave("b")
    assert await a.homes.heartbeats_at("http://b") == {}


async def test_a_home_that_was_taken_in_vain_is_taken_once_more(join: Joined) -> None:
    """The transaction that took it was undone."""
    a, b = await join("a"), await join("b")
    await made(a)
    with pytest.raises(NotFound):
        await a.store.rollback(mine("s"), 9)
    assert (await a.store.change_session(mine("s"), SessionChange(default_timeout=7))).default_timeout == 7
    await made(a, "t")
    with pytest.raises(NotFound):
        await a.store.rollback(mine("t"), 9)
    await b.store.change_session(mine("t"), SessionChange(default_timeout=8))
    with pytest.raises(SessionMoved):
        await a.store.change_session(mine("t"), SessionChange(default_timeout=9))


async def test_a_session_that_was_given_away_may_come_back(join: Joined) -> None:
    """Also one that has never been called here, but had its setup."""
    a, b = await join("a"), await join("b")
    session = await made(a)
    await a.homes.take(session.key)
    assert await Homes(a.homes, LONG, lambda: None).give("s", session.key, b.host)
    assert await b.homes.give(session.key, "a")
    assert (await a.store.change_session(mine("s"), SessionChange(default_timeout=7))).default_timeout == 7


async def test_the_first_host_that_needs_a_session_is_its_home(join: Joined) -> None:
    a, b = await join("a"), await join("b")
    session = await made(a)
    place = await b.homes.find("s")
    assert place is not None
    assert (place.session_key, place.home) == (session.key, None)
    await b.store.begin_run(mine("s"), "r1")
    for which in ("s", session.key):
        found = await a.homes.find(which)
        assert found is not None
        assert found.home is not None
        assert (found.home.host, found.home.epoch) == (b.host, 1)
    assert (await a.homes.take(session.key)).host == b.host
    with pytest.raises(SessionMoved):
        await a.store.begin_run(mine("s"), "r2")
    assert [run.id for run in await a.store.runs(session.key, 9)] == ["r1"]


async def test_two_hosts_that_need_a_session_at_once_agree(join: Joined) -> None:
    a, b = await join("a"), await join("b")
    keys = [(await made(a, f"s{n}")).key for n in range(20)]
    for key in keys:
        first, second = await asyncio.gather(a.homes.take(key), b.homes.take(key))
        assert first == second


CHANGES: dict[str, Callable[[SqlStore, Session], Awaitable[object]]] = {
    "run": lambda store, session: store.begin_run(session.owned_id, "other"),
    "end": lambda store, session: store.end_run(ended(session, "r"), data='{"n": 1}', snapshot=None),
    "settings": lambda store, session: store.change_session(session.owned_id, SessionChange(default_timeout=7)),
    "data": lambda store, session: store.commit(session.owned_id, "data", data='{"n": 1}', snapshot=None),
    "code": lambda store, session: store.store_code(session.owned_id, StoredCode("1", None, 1)),
    "rollback": lambda store, session: store.rollback(session.owned_id, 1),
    "name": lambda store, session: store.name_version(session.owned_id, 1, "one", named=()),
    "context": lambda store, session: store.note_context(session.key, "c"),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_a_host_whose_session_was_taken_changes_nothing(join: Joined, change: str) -> None:
    a = await join("a")
    session = await made(a)
    await a.store.begin_run(mine("s"), "r")
    b = await join("b")
    await b.homes.leave("a")  # as b does for a host whose lease is over
    taken = await b.homes.take(session.key)
    assert (taken.host, taken.epoch) == (b.host, 2)
    before = await b.store.session(mine("s"))
    with pytest.raises(Fenced):
        await CHANGES[change](a.store, session)
    # Nor does it get the session back, whatever it begins anew.
    with pytest.raises((HostLost, Fenced)):
        await CHANGES[change](a.store, session)
    assert await b.store.session(mine("s")) == before
    assert [(run.id, run.status, run.reason) for run in await b.store.runs(session.key, 9)] == [("r", "lost", LOST)]


async def test_what_a_dead_host_was_doing_is_lost(join: Joined, url: str) -> None:
    a, b = await join("a"), await join("b")
    session = await made(a)
    await a.store.begin_run(mine("s"), "r")
    age(url, "a", 1.1)
    view = await b.homes.beat(b.host)
    assert (list(view.hosts), view.leader, view.lost) == (["b"], "b", 1)
    with pytest.raises(HostLost):
        await a.homes.beat(a.host)
    # Its session isn't taken yet, and its run is over all the same.
    with pytest.raises(CommitFailed):
        await a.store.end_run(ended(session, "r"), data='{"n": 1}', snapshot=None)
    [run] = await b.store.runs(session.key, 9)
    assert (run.status, run.committed) == ("lost", False)
    assert (await b.store.session(mine("s"))).version == 1
    await b.store.begin_run(mine("s"), "r2")
    await b.store.end_run(ended(session, "r2"), data='{"n": 2}', snapshot=None)
    assert (await b.store.session(mine("s"))).data == '{"n": 2}'


@pytest.mark.parametrize("is_taken", [False, True])
async def test_runs_that_are_lost_with_their_host_count_as_runs(join: Joined, url: str, is_taken: bool) -> None:
    a, b = await join("a"), await join("b")
    session = await made(a)
    await a.store.begin_run(mine("s"), "r")
    if is_taken:
        assert execute(url, "UPDATE hosts SET dead = TRUE WHERE id = 'a'") == 1
        await b.homes.take(session.key)
    else:
        age(url, "a", 1.1)
    await b.homes.beat(b.host)
    await b.homes.beat(b.host)
    today = day_of(now())
    assert sum(day.runs for day in await b.store.usage.days(session.owner, today - 1, today)) == 1


async def test_a_delivery_whose_attempt_a_dead_host_began_is_pending_again(join: Joined, url: str) -> None:
    """It was declared dead while it was paused, and nobody needs its session."""
    a, b = await join("a"), await join("b")
    session = await a.store.create_session(new("s", allow_public=True))
    await a.homes.take(session.key)
    await a.store.inboxes.put_inbox(mine("s"), None, 3)
    await a.store.inboxes.add_delivery(session.key, "dlv", None, Content("POST", "/", "", [], b"", "http://x"))
    head = await a.store.inboxes.next_delivery(session.key)
    assert head is not None
    age(url, "a", 1.1)
    assert (await b.homes.beat(b.host)).leader == "b"
    before = await a.store.inboxes.begin_attempt(head.delivery.key, "run", counts=True)
    assert before is not None
    await b.homes.beat(b.host)
    await a.store.inboxes.end_attempt(session.key, before, Outcome("failed", 1, 1))  # that is over, too
    delivery, _ = await b.store.inboxes.delivery(mine("s"), "dlv")
    assert (delivery.status, delivery.attempts) == ("pending", 1)


async def test_looking_for_what_is_lost_walks_through_no_table(sqlite_store: SqlStore) -> None:
    """Each heartbeat of the leader does. On PostgreSQL the planner decides by what is in the tables."""

    def plan(connection: Connection) -> list[str]:
        query = _ANY_LOST.compile(connection, compile_kwargs={"literal_binds": True})
        return [row.detail for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}")]

    steps = await sqlite_store.database.read(plan)
    assert "SCAN deliveries USING COVERING INDEX ix_deliveries_running" in steps
    assert [step for step in steps if step.startswith("SCAN") and not step.endswith(("_running", "CONSTANT ROW"))] == []


async def test_one_host_leads_until_it_is_dead(join: Joined) -> None:
    a, b, c = await join("a"), await join("b"), await join("c")
    assert {(await each.homes.beat(each.host)).leader for each in (a, b, c)} == {"a"}
    await a.homes.leave("a")
    assert {(await each.homes.beat(each.host)).leader for each in (c, b)} == {"c"}


async def test_a_lease_is_renewed_by_a_heartbeat(join: Joined, url: str) -> None:
    a, b = await join("a"), await join("b")
    for _ in range(3):
        age(url, "a", 0.9)
        assert "a" in (await b.homes.beat(b.host)).hosts
        await a.homes.beat(a.host)
    age(url, "a", 0.9)
    age(url, "a", 0.9)
    assert "a" not in (await b.homes.beat(b.host)).hosts


async def test_nobody_is_declared_dead_by_whoever_comes_back_first(join: Joined, url: str) -> None:
    a, b = await join("a"), await join("b")
    for name in "ab":
        age(url, name, 1.1)  # as if the database had been away for both
    assert set((await b.homes.beat(b.host)).hosts) == {"a", "b"}
    assert set((await a.homes.beat(a.host)).hosts) == {"a", "b"}


async def test_whoever_never_comes_back_is_declared_dead_a_lease_later(join: Joined, url: str) -> None:
    _, b = await join("a", 1.0), await join("b", 1.0)
    for name in "ab":
        age(url, name, 1.2, lease=1.0)  # no heartbeat of either
    seen = [sorted((await b.homes.beat(b.host)).hosts)]
    until = time.monotonic() + 30
    while seen[-1] != ["b"] and time.monotonic() < until:
        await asyncio.sleep(0.2)
        seen.append(sorted((await b.homes.beat(b.host)).hosts))
    assert (seen[0], seen[-1]) == (["a", "b"], ["b"])


@pytest.mark.parametrize("url", soak_the_rest(["sqlite_url", "postgres_url"], ["postgres_url"]), indirect=True)
async def test_a_host_that_is_always_late_declares_others_dead_all_the_same(join: Joined, url: str) -> None:
    _, b = await join("a", LATE), await join("b", LATE)
    age(url, "a", 1.2, lease=LATE)
    seen = ["a", "b"]
    until = time.monotonic() + 30
    while seen != ["b"] and time.monotonic() < until:
        age(url, "b", 0.6, lease=LATE)
        seen = sorted((await b.homes.beat(b.host)).hosts)
    assert seen == ["b"]


async def test_a_session_that_is_given_away_is_at_home_there(join: Joined) -> None:
    a, b = await join("a"), await join("b")
    session = await made(a)
    assert not await a.homes.give(session.key, "b"), "it is at home nowhere"
    await a.store.begin_run(mine("s"), "r1")
    assert not await b.homes.give(session.key, "b"), "whose home is another host can only be given by that"
    assert not await a.homes.give(session.key, "c"), "there is no such host"
    assert await a.homes.give(session.key, "b")
    assert not await a.homes.give(session.key, "b"), "it is another host's by now"
    place = await a.homes.find(session.key)
    assert place is not None
    assert place.home is not None
    assert (place.home.host, place.home.epoch) == (b.host, 2)
    # What was under way there is fenced off, as if the session had been taken.
    with pytest.raises(Fenced):
        await a.store.end_run(ended(session, "r1"), data='{"n": 1}', snapshot=None)
    assert (await b.store.begin_run(mine("s"), "r2")).version == 1
    await b.homes.leave("a")
    assert not await b.homes.give(session.key, "a"), "that host is dead"
    await b.store.end_run(ended(session, "r2"), data='{"n": 2}', snapshot=None)
    assert (await b.store.session(mine("s"))).data == '{"n": 2}'


async def test_a_session_is_given_to_one_host_only(join: Joined) -> None:
    a, *others = [await join(name) for name in "abc"]
    keys = []
    for number in range(10):
        keys.append((await made(a, f"s{number}")).key)
        await a.store.begin_run(mine(f"s{number}"), f"r{number}")
    for key in keys:
        given = await asyncio.gather(*(a.homes.give(key, other.host.id) for other in others))
        assert sorted(given) == [False, True]
        place = await a.homes.find(key)
        assert place is not None
        assert place.home is not None
        assert (place.home.host, place.home.epoch) == (others[given.index(True)].host, 2)


@pytest.mark.soak
async def test_many_hosts_that_beat_at_once_are_in_nobodys_way(join: Joined) -> None:
    hosts = [await join(f"h{number}") for number in range(8)]

    async def beats(one: OneHost) -> None:
        for _ in range(40):
            assert len((await one.homes.beat(one.host)).hosts) == len(hosts)

    await asyncio.gather(*map(beats, hosts))


async def test_a_purged_session_is_gone_rather_than_taken(join: Joined) -> None:
    a = await join("a")
    session = await made(a)
    await a.store.begin_run(mine("s"), "r")
    await a.store.purge_session(mine("s"))
    with pytest.raises(SessionDeleted):
        await a.store.end_run(ended(session, "r"), data='{"n": 1}', snapshot=None)
    with pytest.raises(NotFound):
        await a.store.begin_process(ProcessRecord("p", session.key, "true", 1))


async def test_without_a_cluster_nothing_is_checked(url: str) -> None:
    async with opened(url) as store:
        session = await store.create_session(new("s"))
        await store.begin_run(mine("s"), "r")
        await store.end_run(ended(session, "r"), data=None, snapshot=None)
    async with opened(url, alone=False) as store:
        place = await (await store.homes()).find("s")
    assert place is not None
    assert place.home is None


async def test_who_looks_for_deliveries_asks_for_all_sessions_at_once(
    join: Joined, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most are at home at another host, and are to be left to it, whatever they wait for."""
    monkeypatch.setattr(deliveries, "_POLL_SECONDS", 0.01)
    a, b = await join("a"), await join("b")
    session = await b.store.create_session(replace(new("s"), allow_public=True))
    await b.store.store_code(mine("s"), StoredCode("1", None, now()))
    await b.store.inboxes.put_inbox(mine("s"), None, 0)
    await b.store.inboxes.add_delivery(session.key, "dlv", None, Content("POST", "/", "", [], b"", "http://era.test"))
    its = f"{session.key} + i"
    multiply(url, tables.sessions, 500, key=its, id="'s' || i")
    multiply(url, tables.inboxes, 500, session_key=its)
    multiply(url, tables.homes, 500, session_key=its)
    multiply(url, tables.deliveries, 500, session_key=its, id="'dlv' || i")
    asked = Counter[str]()

    def about(*args: Any) -> None:
        asked.update(table for table in ("deliveries", "homes") if f"FROM {table}" in args[2])
        asked.update(["sessions"] if "FROM sessions LEFT" in args[2] else [])

    for engine in (a.store.database.engines.reader, a.homes._database.engines.reader):
        event.listen(engine, "before_cursor_execute", about)
    homes = Homes(a.homes, LONG, lambda: None)
    await homes.start()
    inbox = Inbox(a.store.inboxes, cast("Runs", None), at_a_time=1, cluster=homes)
    await inbox.start()
    await until(lambda: asked["deliveries"] >= 3)
    await inbox.stop()
    await homes.leave()
    assert 0 < asked["homes"] <= asked["deliveries"]
    assert not asked["sessions"], "nobody asks for each"
