"""What a host answers about its sessions while the database can't be reached: what is so, or nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from era.core.homes import Host
from era.core.metadata import SessionChange
from era.core.models import DEFAULT_OWNER, EMPTY, Session
from era.errors import NotFound
from era.store import last_known
from era.store.database import DatabaseAway
from era.store.last_known import MOST_DATA, LastKnown
from era.store.metadata import SqlStore
from tests.owners import mine
from tests.postgres import Postgres
from tests.store.postgres_proxy import PostgresProxy, postgres_proxy
from tests.store.rows import ended, new, opened

__all__ = ["postgres_proxy"]


class Lease:
    lasts = True

    def __call__(self) -> bool:
        return self.lasts


@asynccontextmanager
async def host(url: str, lease: Lease) -> AsyncIterator[SqlStore]:
    """The store of a host of a cluster."""
    async with opened(url, alone=False) as store:
        await (await store.homes()).join(Host("a", "http://a"), 3600)
        store.answers_while(lease, lambda: False, lambda *_: False)
        yield store


async def test_a_session_at_home_here_is_shown_while_the_database_is_away(
    postgres_url: str, restarted: Postgres
) -> None:
    lease = Lease()
    async with host(postgres_url, lease) as store:
        session = await store.create_session(new("a"))
        await store.create_session(new("elsewhere"))
        await store.create_session(new("large", data='"' + "x" * MOST_DATA + '"'))
        for name in ("a", "large"):
            await store.begin_run(mine(name), f"r {name}")
        await store.end_run(ended(session, "r a"), data='{"n": 1}', snapshot=None)
        await store.change_session(mine("a"), SessionChange(default_timeout=7))
        await store.look_again()  # as after each heartbeat
        told = await store.session(mine("elsewhere"))
        assert told.version == 1
        truth = await store._read(mine("a"), lambda _, session: session)
        restarted.stop()
        assert await store.session(mine("a")) == truth
        assert (truth.version, truth.data, truth.default_timeout) == (2, '{"n": 1}', 7)
        for name in ("elsewhere", "large", "none"):
            with pytest.raises(DatabaseAway):
                await store.session(mine(name))
        with pytest.raises(DatabaseAway):
            await store.begin_run(mine("a"), "r2")
        lease.lasts = False
        with pytest.raises(DatabaseAway):
            await store.session(mine("a"))
        restarted.start()
        assert await store.session(mine("a")) == truth


CHANGES = ("run", "settings", "deletion", "purge")


@pytest.mark.parametrize("change", CHANGES)
async def test_what_has_changed_is_not_shown_as_it_was(postgres_url: str, restarted: Postgres, change: str) -> None:
    async with host(postgres_url, Lease()) as store:
        await store.create_session(new("a"))
        await store.change_session(mine("a"), SessionChange(default_timeout=7))
        await store.session(mine("a"))
        if change == "run":
            await store.begin_run(mine("a"), "r")
        elif change == "settings":
            await store.change_session(mine("a"), SessionChange(default_timeout=8))
        elif change == "deletion":
            await store.delete_session(mine("a"))
        else:
            await store.purge_session(mine("a"))
        restarted.stop()
        with pytest.raises(DatabaseAway):
            await store.session(mine("a"))


async def test_what_was_cut_off_in_its_commit_is_in_doubt(
    postgres_url: str, postgres_proxy: PostgresProxy, restarted: Postgres
) -> None:
    """It may still be carried out, behind the back of whoever reads meanwhile."""
    async with host(postgres_proxy.url(postgres_url), Lease()) as store:
        await store.create_session(new("a"))
        await store.change_session(mine("a"), SessionChange(default_timeout=7))
        postgres_proxy.cut("late")
        with pytest.raises(DatabaseAway, match="not known"):
            await store.change_session(mine("a"), SessionChange(default_timeout=8))
        await store.session(mine("a"))
        restarted.stop()
        with pytest.raises(DatabaseAway):
            await store.session(mine("a"))


@pytest.fixture
def session() -> Session:
    return Session(
        key=7,
        id="a",
        owner=DEFAULT_OWNER,
        language="python",
        persistent=True,
        data="{}",
        metadata={},
        allow_internet=True,
        allow_public=False,
        default_timeout=30.0,
        stored=None,
        version=1,
        snapshot=EMPTY,
        created_at=1,
        updated_at=1,
        last_run_at=None,
    )


async def away() -> Session:
    raise DatabaseAway(may_have_committed=False)


async def test_what_was_read_beside_a_change_is_not_remembered(session: Session) -> None:
    known = LastKnown({7}, lambda: True, lambda: False)

    async def remembered() -> bool:
        try:
            return await known.read(session.owned_id, away) == session
        except DatabaseAway:
            return False

    before = known.moment
    known.begin(7)
    within = known.moment
    known.note(session, before)
    assert not await remembered()
    known.begin(7)
    known.end(7, True)
    known.note(session, known.moment)
    assert not await remembered(), "another change is under way"
    known.end(7, True)
    for began in (before, within):
        known.note(session, began)
        assert not await remembered()
    known.note(session, known.moment)
    assert await remembered()
    known.begin(7)
    assert not await remembered()
    known.end(7, True)
    assert not await remembered()
    assert known.stale() == [7]
    assert known.stale() == []
    known.note(replace(session, ttl=1, expires_at=1), known.moment)
    assert not await remembered(), "it has expired"
    known.note(replace(session, key=8), known.moment)
    assert not await remembered(), "it isn't at home here"
    known.note(session, known.moment)
    known.forget(7)
    assert not await remembered()


async def test_a_session_that_is_gone_is_forgotten(session: Session) -> None:
    known = LastKnown({7}, lambda: True, lambda: False)
    known.note(session, known.moment)

    async def gone() -> Session:
        raise NotFound("it was deleted at another host")

    with pytest.raises(NotFound):
        await known.read(session.owned_id, gone)
    with pytest.raises(DatabaseAway):
        await known.read(session.owned_id, away)


async def test_a_database_that_answers_nothing_is_not_waited_for(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(last_known, "_PATIENCE", 0.1)
    late = [False]
    known = LastKnown({7}, lambda: True, lambda: late[0])
    known.note(session, known.moment)
    goes_on = asyncio.Event()

    async def waits() -> Session:
        await goes_on.wait()
        return replace(session, version=2)

    # One that answers late, but answers heartbeats, is.
    asking = asyncio.create_task(known.read(session.owned_id, waits))
    await asyncio.wait([asking], timeout=0.5)
    assert not asking.done()
    goes_on.set()
    assert (await asking).version == 2
    goes_on.clear()
    late[0] = True
    async with asyncio.timeout(30):
        assert (await known.read(session.owned_id, waits)).version == 2


def test_little_is_remembered(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_known, "_MOST", 3)
    known = LastKnown(range(100), lambda: True, lambda: False)
    began = known.moment
    for key in range(20):
        known.note(replace(session, key=key, id=f"s{key}"), began)
    assert len(known._known) == len(known._ids) == 3
    for key in range(20):
        known.begin(key)
        known.end(key, True)
    assert len(known._changed) == 3
    known.note(replace(session, key=1, id="s1"), began)
    assert mine("s1") not in known._known, "it isn't known any more when it was changed"
