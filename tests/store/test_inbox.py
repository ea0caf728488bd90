"""Rows of inboxes and deliveries: bounds, how many are kept, and their end with their session."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import func, select

from era.core.metadata import Retention
from era.core.models import Session, now
from era.core.public.inbox import Content, Delivery, DeliveryStatus, Outcome
from era.core.signatures import Verify
from era.errors import NotFound, TooManyDeliveries
from era.store import inbox as rows
from era.store.engine.database import DatabaseAway
from era.store.engine.tables import deliveries
from era.store.metadata import SqlStore
from tests.owners import mine
from tests.soaking import soak_the_rest
from tests.store.rows import new, opened

CONTENT = Content("POST", "/x", "", [("a", "b")], b"body", "http://x")

ONE_DATABASE = pytest.mark.parametrize("url", soak_the_rest(["sqlite_url", "postgres_url"], 1), indirect=True)
"""Marks tests of so many deliveries that to remove them takes several transactions."""


@pytest.fixture
async def store(url: str) -> AsyncIterator[SqlStore]:
    """An open store that keeps removed sessions for no time at all."""
    async with opened(url, Retention(grace_seconds=0)) as store:
        yield store


@pytest.fixture
async def session(store: SqlStore) -> Session:
    """A session with an inbox."""
    session = await store.create_session(new("s", allow_public=True))
    await store.inboxes.put_inbox(mine("s"), Verify("hmac", "k", "x"), 5)
    return session


async def listed(store: SqlStore) -> list[Delivery]:
    return list(await store.inboxes.deliveries(mine("s"), status=None, limit=1000, before=None))


async def end(store: SqlStore, session: Session, status: DeliveryStatus = "done") -> None:
    """Give the session its next delivery, with this result."""
    head = await store.inboxes.next_delivery(session.key)
    assert head is not None
    await store.inboxes.begin_attempt(head.delivery.key, f"run-{head.delivery.id}", counts=True)
    await store.inboxes.end_attempt(session.key, head.delivery, Outcome(status, head.delivery.attempts + 1, 1))


async def test_only_so_many_deliveries_may_wait(
    store: SqlStore, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MAX_PENDING", 3)
    for name in "abc":
        assert (await store.inboxes.add_delivery(session.key, name, name, CONTENT)).first
    with pytest.raises(TooManyDeliveries):
        await store.inboxes.add_delivery(session.key, "d", "d", CONTENT)
    again = await store.inboxes.add_delivery(session.key, "d", "a", CONTENT)  # its sender can still be answered
    assert (again.delivery_id, again.status, again.first) == ("a", "pending", False)
    await end(store, session)
    assert (await store.inboxes.add_delivery(session.key, "d", "d", CONTENT)).first
    with pytest.raises(TooManyDeliveries):
        await store.inboxes.replay_delivery(mine("s"), "a")
    monkeypatch.setattr(rows, "MAX_PENDING", 100)
    monkeypatch.setattr(rows, "MAX_PENDING_BYTES", sum(delivery.size for delivery in await listed(store)))
    with pytest.raises(TooManyDeliveries):
        await store.inboxes.add_delivery(session.key, "e", "e", Content("POST", "/", "", [], b"x" * 100, ""))


async def test_the_newest_ended_deliveries_are_kept(
    store: SqlStore, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "KEPT", 3)
    for n in range(8):
        await store.inboxes.add_delivery(session.key, f"d{n}", f"s{n}", CONTENT)
    for n in range(6):
        await end(store, session, "failed" if n % 2 else "done")
    assert [delivery.id for delivery in await listed(store)] == ["d7", "d6", "d5", "d4", "d3"]
    assert (await store.inboxes.add_delivery(session.key, "new", "s0", CONTENT)).first  # it isn't known any more
    assert not (await store.inboxes.add_delivery(session.key, "no", "s5", CONTENT)).first
    with pytest.raises(NotFound):
        await store.inboxes.delivery(mine("s"), "d0")


async def test_a_replayed_delivery_comes_last(store: SqlStore, session: Session) -> None:
    for name in "ab":
        await store.inboxes.add_delivery(session.key, name, None, CONTENT)
    await end(store, session, "failed")
    assert (await store.inboxes.replay_delivery(mine("s"), "a"))[1].status == "pending"
    order = []
    while head := await store.inboxes.next_delivery(session.key):
        order.append((head.delivery.id, head.delivery.run_ids, head.delivery.tries))
        await end(store, session)
    assert order == [("b", [], 0), ("a", ["run-a"], 0)]


async def tried(store: SqlStore, session: Session) -> Delivery:
    """A pending delivery that has failed once, as its worker has read it."""
    await store.inboxes.add_delivery(session.key, "a", None, CONTENT)
    await end(store, session, "pending")
    head = await store.inboxes.next_delivery(session.key)
    assert head is not None
    assert (head.delivery.attempts, head.delivery.tries) == (1, 1)
    return head.delivery


async def test_an_attempt_is_one_of_the_delivery_as_it_is_when_it_begins(store: SqlStore, session: Session) -> None:
    read = await tried(store, session)
    await store.inboxes.replay_delivery(mine("s"), "a")  # while the worker waits for the session's turn
    before = await store.inboxes.begin_attempt(read.key, "run-2", counts=True)
    assert before is not None
    assert (before.attempts, before.tries) == (1, 0)
    [delivery] = await listed(store)
    assert (delivery.status, delivery.attempts, delivery.tries) == ("running", 2, 1)
    assert await store.inboxes.begin_attempt(read.key, "run-3", counts=True) is None, "it isn't pending"


async def test_an_outcome_that_is_recorded_twice_leaves_a_replay_alone(store: SqlStore, session: Session) -> None:
    read = await tried(store, session)
    await store.inboxes.begin_attempt(read.key, "run-2", counts=True)
    for _ in range(2):  # the answer to the first may have been lost
        await store.inboxes.end_attempt(session.key, read, Outcome("failed", 2, 2))
        assert [delivery.status for delivery in await listed(store)] == ["failed"]
    await store.inboxes.replay_delivery(mine("s"), "a")
    await store.inboxes.end_attempt(session.key, read, Outcome("failed", 2, 2))
    [delivery] = await listed(store)
    assert (delivery.status, delivery.attempts, delivery.tries) == ("pending", 2, 0)


@pytest.mark.parametrize("replayed", [False, True])
async def test_the_outcome_of_an_attempt_whose_beginning_is_not_recorded(
    store: SqlStore, session: Session, replayed: bool
) -> None:
    read = await tried(store, session)
    if replayed:
        await store.inboxes.replay_delivery(mine("s"), "a")
    await store.inboxes.end_attempt(session.key, read, Outcome("failed", 2, 2))
    [delivery] = await listed(store)
    assert (delivery.status, delivery.attempts) == (("pending", 1) if replayed else ("failed", 2))


@pytest.mark.parametrize("at_once", [True, False])
@ONE_DATABASE
async def test_an_inbox_is_purged_with_its_session(store: SqlStore, session: Session, at_once: bool) -> None:
    for n in range(110):
        await store.inboxes.add_delivery(session.key, f"d{n}", None, CONTENT)
    if at_once:
        await store.purge_session(mine("s"))
    else:
        await store.delete_session(mine("s"))
        assert await store.inboxes.next_delivery(session.key) is None  # none is run while it is removed
        assert await store.purge(now() + 10) == 1
    assert await store.inboxes.inbox_of(session.key) is None
    count = select(func.count()).select_from(deliveries)
    assert await store.database.read(lambda connection: connection.execute(count).scalar_one()) == 0
    # A new one of that id has nothing of it.
    await store.create_session(new("s", allow_public=True))
    with pytest.raises(NotFound):
        await store.inboxes.inbox(mine("s"))
    await store.inboxes.put_inbox(mine("s"), None, 0)
    assert await listed(store) == []


@ONE_DATABASE
async def test_deleted_inbox_goes_with_its_deliveries_also_where_a_call_was_cut_off(
    store: SqlStore, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(120):
        await store.inboxes.add_delivery(session.key, f"d{n}", None, CONTENT)
    write = store.database.write

    async def once(job: Callable[..., Any], *args: Any) -> Any:
        monkeypatch.undo()
        await write(job, *args)
        await store.inboxes.add_delivery(session.key, "meanwhile", None, CONTENT)
        raise DatabaseAway(may_have_committed=False)

    monkeypatch.setattr(store.database, "write", once)
    with pytest.raises(DatabaseAway):
        await store.inboxes.delete_inbox(mine("s"))
    assert await store.inboxes.delete_inbox(mine("s")) == 21
    with pytest.raises(NotFound):
        await store.inboxes.delete_inbox(mine("s"))
    with pytest.raises(NotFound, match="Session 's' has no inbox"):
        await store.inboxes.add_delivery(session.key, "late", None, CONTENT)  # its sender asked before
    await store.inboxes.put_inbox(mine("s"), None, 0)
    assert await listed(store) == []


@ONE_DATABASE
async def test_inbox_is_deleted_while_deliveries_keep_coming(
    store: SqlStore, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(110):
        await store.inboxes.add_delivery(session.key, f"d{n}", None, CONTENT)
    write, transactions = store.database.write, 0

    async def another_comes(job: Callable[..., Any], *args: Any) -> Any:
        nonlocal transactions
        transactions += 1
        assert transactions < 10, "it goes on for as long as deliveries come"
        result = await write(job, *args)
        with suppress(NotFound), monkeypatch.context() as unchanged:
            unchanged.setattr(store.database, "write", write)
            await store.inboxes.add_delivery(session.key, f"late{transactions}", None, CONTENT)
        return result

    monkeypatch.setattr(store.database, "write", another_comes)
    assert await store.inboxes.delete_inbox(mine("s")) == 111
    monkeypatch.undo()
    assert await store.inboxes.inbox_of(session.key) is None
    count = select(func.count()).select_from(deliveries)
    assert await store.database.read(lambda connection: connection.execute(count).scalar_one()) == 0
