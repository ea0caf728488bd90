"""Rows of versions."""

from __future__ import annotations

import pytest

from era.core.metadata import Retention, SessionChange
from era.core.models import EMPTY, Snapshot
from era.errors import NotFound
from era.store.metadata import SqlStore
from tests.owners import mine
from tests.store.rows import ended, new, opened


async def test_versions_hold_what_each_commit_left(store: SqlStore) -> None:
    session = await store.create_session(new("a", data='{"n": 0}'))
    snapshot = Snapshot("f" * 64, 3, 99)
    await store.begin_run(mine("a"), "r1")
    await store.end_run(ended(session, "r1"), data=None, snapshot=snapshot)
    await store.change_session(mine("a"), SessionChange(data='{"n": 1}'))
    await store.commit(mine("a"), "files", data=None, snapshot=EMPTY)
    back = await store.rollback(mine("a"), 2)
    assert (back.version, back.data, back.snapshot) == (5, '{"n": 0}', snapshot)
    found = await store.versions(mine("a"), limit=10, before=None)
    assert [(version.n, version.cause, version.run_id) for version in found] == [
        (5, "rollback", None),
        (4, "files", None),
        (3, "data", None),
        (2, "run", "r1"),
        (1, "create", None),
    ]
    assert [version.n for version in await store.versions(mine("a"), limit=2, before=4)] == [3, 2]
    third = await store.version(mine("a"), 3)
    assert (third.data, third.version.snapshot) == ('{"n": 1}', snapshot)
    for n in (0, 6, 1 << 62):
        with pytest.raises(NotFound, match=f"no version {n}"):
            await store.version(mine("a"), n)


async def test_old_versions_go_with_the_commit_that_makes_them_too_many(url: str) -> None:
    async with opened(url, Retention(versions=2)) as store:
        session = await store.create_session(new("a"))
        for n in range(3):
            await store.begin_run(mine("a"), f"r{n}")
            await store.end_run(ended(session, f"r{n}"), data=f'{{"n": {n}}}', snapshot=Snapshot(f"{n}" * 64, 1, 1))
        assert [version.n for version in await store.versions(mine("a"), limit=10, before=None)] == [4, 3]
        assert sorted(await store.snapshot_roots()) == ["1" * 64, "2" * 64]
        with pytest.raises(NotFound) as gone:
            await store.rollback(mine("a"), 2)
        assert gone.value.code == "version_gone"
        assert (await store.session(mine("a"))).version == 4


async def test_snapshot_roots_are_those_that_rows_need(store: SqlStore) -> None:
    for session_id, root in (("a", "1" * 64), ("b", "1" * 64), ("c", "2" * 64)):
        session = await store.create_session(new(session_id))
        await store.begin_run(mine(session_id), f"run_{session_id}")
        await store.end_run(ended(session, f"run_{session_id}"), data=None, snapshot=Snapshot(root, 1, 1))
    await store.create_session(new("d"))
    assert sorted(await store.snapshot_roots()) == ["1" * 64, "2" * 64]
    await store.delete_session(mine("c"))
    assert sorted(await store.snapshot_roots()) == ["1" * 64, "2" * 64], "it can be restored"
    await store.purge_session(mine("c"))
    assert list(await store.snapshot_roots()) == ["1" * 64]
