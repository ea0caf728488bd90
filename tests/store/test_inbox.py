"""Rows of deliveries: bounds, what is kept, and what goes with its session."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from era.core.metadata import Retention
from era.core.models import NewSession, Session, now
from era.core.public.inbox import Content, Delivery, DeliveryStatus, Outcome, delay
from era.core.public.signatures import Verify
from era.errors import NotFound, TooManyDeliveries
from era.store import inbox as rows
from era.store.metadata import SqlStore
from tests.owners import mine

CONTENT = Content("POST", "/x", "", [("a", "b")], b"body", "http://x")
type Test = Callable[[SqlStore, Session], Awaitable[None]]


@pytest.fixture
def with_inbox(tmp_path: Path) -> Callable[[Test], None]:
    """Runs a test on a store of its own, with a session that has an inbox."""

    def run(test: Test) -> None:
        async def main() -> None:
            store = SqlStore(f"sqlite:///{tmp_path}/era.db", Retention(grace_seconds=0))
            await store.open()
            try:
                session = await store.create_session(NewSession(mine("s"), "python", True, "{}", {}, True, True, 30.0))
                await store.inboxes.put_inbox(mine("s"), Verify("hmac", "k", "x"), 5)
                await test(store, session)
            finally:
                await store.close()

        asyncio.run(main())

    return run


async def listed(store: SqlStore) -> list[Delivery]:
    return list(await store.inboxes.deliveries(mine("s"), status=None, limit=1000, before=None))


async def end(store: SqlStore, session: Session, status: DeliveryStatus = "done") -> None:
    """Give the session its next delivery, with this result."""
    found = await store.inboxes.next_delivery(session.key)
    assert found is not None
    await store.inboxes.begin_attempt(found.delivery, f"run-{found.delivery.id}")
    await store.inboxes.end_attempt(session.key, found.delivery.key, Outcome(status, 1, 1))


def test_as_many_wait_as_may(with_inbox: Callable[[Test], None], monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(store: SqlStore, session: Session) -> None:
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
        monkeypatch.setattr(rows, "MAX_PENDING_BYTES", sum(one.size for one in await listed(store)))
        with pytest.raises(TooManyDeliveries):
            await store.inboxes.add_delivery(session.key, "e", "e", Content("POST", "/", "", [], b"x" * 100, ""))

    with_inbox(test)


def test_the_newest_that_ended_are_kept(with_inbox: Callable[[Test], None], monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(store: SqlStore, session: Session) -> None:
        monkeypatch.setattr(rows, "KEPT", 3)
        for n in range(8):
            await store.inboxes.add_delivery(session.key, f"d{n}", f"s{n}", CONTENT)
        for n in range(6):
            await end(store, session, "failed" if n % 2 else "done")
        assert [one.id for one in await listed(store)] == ["d7", "d6", "d5", "d4", "d3"]
        assert (await store.inboxes.add_delivery(session.key, "new", "s0", CONTENT)).first  # it isn't known any more
        assert not (await store.inboxes.add_delivery(session.key, "no", "s5", CONTENT)).first
        with pytest.raises(NotFound):
            await store.inboxes.delivery(mine("s"), "d0")

    with_inbox(test)


def test_a_replay_comes_last(with_inbox: Callable[[Test], None]) -> None:
    async def test(store: SqlStore, session: Session) -> None:
        for name in "ab":
            await store.inboxes.add_delivery(session.key, name, None, CONTENT)
        await end(store, session, "failed")
        assert (await store.inboxes.replay_delivery(mine("s"), "a"))[1].status == "pending"
        order = []
        while found := await store.inboxes.next_delivery(session.key):
            order.append((found.delivery.id, found.delivery.run_ids, found.delivery.tries))
            await end(store, session)
        assert order == [("b", [], 0), ("a", ["run-a"], 0)]

    with_inbox(test)


def test_what_was_running_is_pending_at_the_next_start(with_inbox: Callable[[Test], None]) -> None:
    async def test(store: SqlStore, session: Session) -> None:
        assert await store.inboxes.cut_off() == 0
        for name in "ab":
            await store.inboxes.add_delivery(session.key, name, None, CONTENT)
        found = await store.inboxes.next_delivery(session.key)
        assert found is not None
        await store.inboxes.begin_attempt(found.delivery, "run")
        assert [one.status for one in await listed(store)] == ["pending", "running"]
        assert await store.inboxes.cut_off() == 1
        found = await store.inboxes.next_delivery(session.key)
        assert found is not None
        assert (found.delivery.id, found.delivery.attempts, found.delivery.run_ids) == ("a", 1, ["run"])

    with_inbox(test)


@pytest.mark.parametrize("at_once", [True, False])
def test_they_go_with_their_session(with_inbox: Callable[[Test], None], at_once: bool) -> None:
    async def test(store: SqlStore, session: Session) -> None:
        for n in range(150):
            await store.inboxes.add_delivery(session.key, f"d{n}", None, CONTENT)
        if at_once:
            await store.purge_session(mine("s"))
        else:
            await store.delete_session(mine("s"))
            assert await store.inboxes.next_delivery(session.key) is None  # none is run while it is gone
            assert await store.inboxes.content(1 << 62) is None
            assert await store.inboxes.content(1) is not None
            assert await store.purge(now() + 10) == 1
        assert await store.inboxes.inbox_of(session.key) is None
        assert await store.inboxes.content(1) is None
        # A new one of that id has nothing of it.
        await store.create_session(NewSession(mine("s"), "python", True, "{}", {}, True, True, 30.0))
        with pytest.raises(NotFound):
            await store.inboxes.inbox(mine("s"))
        await store.inboxes.put_inbox(mine("s"), None, 0)
        assert await listed(store) == []

    with_inbox(test)


def test_an_inbox_goes_with_all_it_has(with_inbox: Callable[[Test], None]) -> None:
    async def test(store: SqlStore, session: Session) -> None:
        for n in range(250):
            await store.inboxes.add_delivery(session.key, f"d{n}", None, CONTENT)
        assert await store.inboxes.delete_inbox(mine("s")) == 250
        with pytest.raises(NotFound):
            await store.inboxes.delete_inbox(mine("s"))

    with_inbox(test)


def test_delays_grow_up_to_a_quarter_of_an_hour() -> None:
    assert [delay(n) for n in (1, 2, 3, 4, 5, 6, 20)] == [1, 4, 16, 64, 256, 900, 900]
