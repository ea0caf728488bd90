"""Sessions removed: expired, deleted, restored, purged."""

from __future__ import annotations

from typing import Any

import pytest

from era.core.metadata import Retention, SessionChange, SessionFilter
from era.core.models import DEFAULT_OWNER, Claim, KeptOutputs, OwnedId, Snapshot, StoredCode, now
from era.errors import Conflict, Expired, NotFound
from era.store.metadata import SqlStore
from era.store.sessions import purge_removed
from tests.owners import mine
from tests.store.rows import ended, execute, new, opened


async def test_removed_sessions_free_their_id_and_can_be_restored(store: SqlStore) -> None:
    first = await store.create_session(new("a", metadata={"who": "me"}, data='{"n": 1}'))
    assert (await store.delete_session(mine("a"))).removal is None
    with pytest.raises(NotFound) as gone:
        await store.session(mine("a"))
    assert "restore" in gone.value.hint
    second = await store.create_session(new("a"))
    with pytest.raises(Conflict, match="in use"):
        await store.restore_session(mine("a"))
    assert await store.sessions(SessionFilter(DEFAULT_OWNER)) == [second]
    [deleted] = await store.sessions(SessionFilter(DEFAULT_OWNER, removed="deleted", metadata={"who": "me"}))
    assert (deleted.key, deleted.removal) == (first.key, "deleted")
    assert await store.sessions(SessionFilter(DEFAULT_OWNER, removed="expired")) == []
    await store.delete_session(mine("a"))
    assert (await store.restore_session(mine("a"))).key == second.key, "the last one comes back"
    with pytest.raises(Conflict):
        await store.restore_session(mine("a"))
    assert sorted(await store.purge_session(mine("a"))) == [first.key, second.key]
    for call in (store.restore_session(mine("a")), store.purge_session(mine("a"))):
        with pytest.raises(NotFound):
            await call


async def test_sessions_expire_when_nobody_has_called(store: SqlStore) -> None:
    second = 1_000_000
    session = await store.create_session(new("a", ttl=100))
    assert session.expires_at == session.created_at + 100 * second
    await store.create_session(new("never"))
    assert await store.expire(session.expires_at + 9 * second) == [], "a call may not be noted for so long"
    await store.begin_run(mine("a"), "r1")
    assert await store.expire(session.expires_at + 500 * second) == [], "a run is under way"
    await store.end_run(ended(session, "r1"), data=None, snapshot=None)
    after = await store.session(mine("a"))
    assert after.expires_at is not None
    assert after.expires_at > session.expires_at
    assert await store.expire(after.expires_at + 10 * second) == [session.key]
    for call in (
        store.session(mine("a")),
        store.change_session(mine("a"), SessionChange(data="{}")),
        store.store_code(mine("a"), StoredCode("", None, 1)),
        store.delete_session(mine("a")),
        store.begin_run(mine("a"), "r2"),
        store.rollback(mine("a"), 1),
        store.versions(mine("a"), limit=1, before=None),
        store.run(mine("a"), "r1"),
    ):
        with pytest.raises(Expired):
            await call
    [expired] = await store.sessions(SessionFilter(DEFAULT_OWNER, removed="expired"))
    assert (expired.removal, expired.version) == ("expired", 1)
    before = now()
    back = await store.restore_session(mine("a"))
    assert (back.removal, back.version) == (None, 1)
    assert back.expires_at is not None
    assert back.expires_at >= before + 100 * second
    changed = await store.change_session(mine("a"), SessionChange(ttl=None))
    assert (changed.ttl, changed.expires_at) == (None, None)
    changed = await store.change_session(mine("a"), SessionChange(ttl=5))
    assert changed.expires_at == changed.updated_at + 5 * second


async def test_a_read_puts_off_expiry_only_now_and_then(url: str, store: SqlStore) -> None:
    session = await store.create_session(new("a", ttl=100))
    assert await store.session(mine("a")) == session
    execute(url, "UPDATE sessions SET expires_at = expires_at - 11000000")
    touched = await store.session(mine("a"))
    assert session.expires_at is not None
    assert touched.expires_at is not None
    assert touched.expires_at >= session.expires_at
    execute(url, "UPDATE sessions SET expires_at = 1000000")
    with pytest.raises(Expired):  # though nobody has marked it
        await store.session(mine("a"))
    again = await store.create_session(new("a"))
    assert again.key > session.key
    expired = await store.sessions(SessionFilter(DEFAULT_OWNER, removed="expired"))
    assert [each.key for each in expired] == [session.key]


async def test_removed_sessions_have_bounds(store: SqlStore) -> None:
    for n in range(6):
        session = await store.create_session(new(f"s{n}"))
        await store.commit(session.owned_id, "files", data=None, snapshot=Snapshot(f"{n}" * 64, 1, 10 + n))
    others = await store.create_session(new("other", id=OwnedId("other", "other")))
    for n in range(5):
        await store.delete_session(mine(f"s{n}"))
    await store.delete_session(others.owned_id)
    asked = []

    async def left(most: int, most_bytes: int) -> list[str]:
        def bounds(owner: str) -> tuple[int, int]:
            asked.append(owner)
            return most, most_bytes

        await store.purge_beyond(bounds)
        return sorted(each.id for each in await store.sessions(SessionFilter(DEFAULT_OWNER, removed="deleted")))

    assert await left(0, 0) == ["s0", "s1", "s2", "s3", "s4"]
    assert await left(5, 60) == ["s0", "s1", "s2", "s3", "s4"]
    assert await left(4, 0) == ["s1", "s2", "s3", "s4"]
    assert await left(0, 14 + 13 + 12) == ["s2", "s3", "s4"]
    assert set(asked) == {DEFAULT_OWNER, "other"}
    assert await left(3, 1) == ["s4"], "one can always be restored"
    assert (await store.restore_session(mine("s4"))).version == 2
    assert await left(1, 1) == []
    assert len(await store.sessions(SessionFilter("other", removed="deleted"))) == 1
    assert (await store.session(mine("s5"))).version == 2


@pytest.mark.parametrize("moment", range(6))
async def test_a_session_is_restored_whole_or_not_at_all(
    store: SqlStore, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Whichever of a purge's transactions a restore comes behind."""
    session = await store.create_session(new("a"))
    for n in range(20):
        await store.commit(mine("a"), "data", data=f'{{"n":{n}}}', snapshot=None)
    await store.begin_run(mine("a"), "r1")
    await store.end_run(ended(session, "r1"), data=None, snapshot=None)
    await store.delete_session(mine("a"))
    write, count = store.database.write, 0
    restored = False

    async def restore() -> bool:
        try:
            await store.restore_session(mine("a"))
        except NotFound:
            return False
        return True

    async def and_then_restore(*job: Any, **of: Any) -> Any:
        nonlocal count, restored
        if count == moment:
            count += 1  # before it writes itself
            restored = await restore()
        count += 1
        return await write(*job, **of)

    with monkeypatch.context() as patch:
        patch.setattr(store.database, "write", and_then_restore)
        await purge_removed(store.database, session.key, now())
    assert restored == (moment == 0)
    if restored:
        assert len(await store.versions(mine("a"), limit=100, before=None)) == 21
        assert len(await store.runs(session.key, 9)) == 1
    else:
        assert not await restore()
        assert await store.sessions(SessionFilter(DEFAULT_OWNER, removed="deleted")) == []


async def test_removed_sessions_are_purged_in_the_end(url: str) -> None:
    async with opened(url, Retention(grace_seconds=100)) as store:
        session = await store.create_session(new("a"), Claim("create", "k", "h", "m"))
        for n in range(12):  # which takes more than one transaction to drop
            await store.commit(mine("a"), "data", data=f'{{"n":{n}}}', snapshot=None)
        await store.begin_run(mine("a"), "r1")
        await store.end_run(
            ended(session, "r1"), data=None, snapshot=Snapshot("f" * 64, 1, 1), outputs=KeptOutputs(b"x", b"")
        )
        await store.create_session(new("b"))
        before = now()
        await store.delete_session(mine("a"))
        assert await store.purge(before + 99_000_000) == 0
        assert list(await store.snapshot_roots()) == ["f" * 64]
        assert await store.purge(now() + 100_000_000) == 1
        assert list(await store.snapshot_roots()) == []
        assert await store.runs(session.key, 9) == []
        with pytest.raises(NotFound):
            await store.restore_session(mine("a"))
        [present] = await store.sessions(SessionFilter(DEFAULT_OWNER))
        await purge_removed(store.database, present.key, now())  # as if it had been restored in between
        assert await store.sessions(SessionFilter(DEFAULT_OWNER)) == [present]

    async with opened(url, Retention(grace_seconds=0)) as store:
        await store.delete_session(mine("b"))
        with pytest.raises(NotFound):
            await store.restore_session(mine("b"))
