"""Rows of versions."""

from __future__ import annotations

import pytest

from era.core.metadata import Retention, SessionChange
from era.core.models import EMPTY, Cause, KeptVersion, Snapshot, Trim
from era.errors import Conflict, NotFound
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


async def test_a_change_to_what_is_there_makes_no_version(store: SqlStore) -> None:
    session = await store.create_session(new("a", data='{"n": 0}'))
    assert (await store.change_session(mine("a"), SessionChange(data='{"n": 0}'))).version == 1
    assert (await store.commit(mine("a"), "files", data=None, snapshot=session.snapshot)).version == 1
    assert (await store.change_session(mine("a"), SessionChange(data='{"n": 1}'))).version == 2
    assert (await store.rollback(mine("a"), 2)).version == 3, "whoever asks for one gets one"


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


async def numbers(store: SqlStore) -> list[tuple[int, str | None]]:
    """The versions of the session `a`, newest first, with their names."""
    return [(each.n, each.name) for each in await store.versions(mine("a"), limit=100, before=None)]


async def name(store: SqlStore, n: int, name: str) -> None:
    """Name a version of the session `a`."""
    session = await store.session(mine("a"))
    named = {each.n for each in await store.kept_versions(session.key) if each.named}
    made = await store.name_version(mine("a"), n, name, named=named)
    assert made is not None
    assert (made.n, made.name) == (n, name)


async def change(store: SqlStore, times: int) -> None:
    """Make so many versions of the session `a`."""
    for _ in range(times):
        n = (await store.session(mine("a"))).version + 1
        await store.change_session(mine("a"), SessionChange(data=f'{{"n": {n}}}'))


async def test_named_versions_stay(url: str) -> None:
    async with opened(url, Retention(versions=2)) as store:
        await store.create_session(new("a"))
        await name(store, 1, "first")
        await change(store, 2)
        await name(store, 2, "second")
        await change(store, 3)
        assert await numbers(store) == [(6, None), (5, None), (2, "second"), (1, "first")]
        assert (await store.version(mine("a"), 2)).version.name == "second"
        assert (await store.rollback(mine("a"), 1)).data == "{}"
        await name(store, 2, "other")
        await name(store, 2, "other")
        with pytest.raises(Conflict, match=r"Version 2 .* 'other'"):
            await name(store, 1, "other")
        for n, code in ((3, "version_gone"), (8, "no_such_version")):
            with pytest.raises(NotFound) as gone:
                await name(store, n, "x")
            assert gone.value.code == code
            with pytest.raises(NotFound) as gone:
                await store.clear_name(mine("a"), n)
            assert gone.value.code == code
        assert await store.name_version(mine("a"), 6, "x", named={1}) is None, "2 has a name, too"
        await store.clear_name(mine("a"), 1)
        assert await numbers(store) == [(7, None), (6, None), (2, "other")], "it was kept for its name only"
        await name(store, 7, "first")
        await store.clear_name(mine("a"), 7)
        assert await numbers(store) == [(7, None), (6, None), (2, "other")]
        with pytest.raises(NotFound, match="has no name"):
            await store.clear_name(mine("a"), 7)
        await store.create_session(new("b"))
        session = await store.session(mine("b"))
        assert await store.name_version(mine("b"), 1, "other", named=()) is not None, "names are a session's own"
        assert await store.kept_versions(session.key) == [KeptVersion(1, None, named=True)]
        await store.purge_session(mine("a"))
        await store.purge_session(mine("b"))


async def test_a_commit_trims_the_history(store: SqlStore) -> None:
    session = await store.create_session(new("a"))
    assert session.history_bytes == 0
    for n in range(2, 6):
        await store.begin_run(mine("a"), f"r{n}")
        await store.end_run(ended(session, f"r{n}"), data=None, snapshot=Snapshot(f"{n}" * 64, 1, 1, stored_bytes=10))
    await change(store, 1)
    assert (await store.session(mine("a"))).history_bytes == 40, "data is no content"
    await name(store, 3, "kept")
    await store.begin_run(mine("a"), "r")
    record = await store.end_run(
        ended(session, "r"), data=None, snapshot=Snapshot("7" * 64, 1, 1), trim=Trim([1, 2], held=25)
    )
    assert (record.version, record.versions_dropped) == (7, 2)
    assert await store.runs(session.key, 1) == [record]
    assert [each.n for each in await store.kept_versions(session.key)] == [7, 6, 5, 4, 3]
    assert (await store.session(mine("a"))).history_bytes == 25
    after = await store.commit(
        mine("a"), "files", data=None, snapshot=Snapshot("8" * 64, 1, 1, stored_bytes=5), trim=Trim([3, 4], held=20)
    )
    assert after.history_bytes is None, "a version was named meanwhile, so nobody knows"
    assert [each.n for each in await store.kept_versions(session.key)] == [8, 7, 6, 5, 3]
    after = await store.commit(mine("a"), "files", data=None, snapshot=Snapshot("9" * 64, 1, 1, stored_bytes=5))
    assert after.history_bytes is None


async def test_checkpoints_push_out_each_other_and_nothing_else(url: str) -> None:
    async with opened(url, Retention(versions=3, checkpoints=2)) as store:
        session = await store.create_session(new("a"))
        for n in range(4):
            await store.begin_run(mine("a"), f"r{n}")
            await store.end_run(ended(session, f"r{n}"), data=f'{{"n": {n}}}', snapshot=None)
            for kind in range(3):
                cause: Cause = "checkpoint" if kind else "loose_checkpoint"
                root = f"{n}{kind}" * 32
                await store.commit(mine("a"), cause, data=None, snapshot=Snapshot(root, 1, 1))
            if n == 0:
                await name(store, 4, "one")
        assert await numbers(store) == [(17, None), (16, None), (14, None), (10, None), (6, None), (4, "one")]
        causes = [each.cause for each in await store.versions(mine("a"), limit=9, before=None)]
        assert causes == ["checkpoint", "checkpoint", "run", "run", "run", "checkpoint"]
        kept = await store.kept_versions(session.key)
        assert [each.n for each in kept if each.is_checkpoint] == [17, 16, 4]
        await name(store, 6, "two")
        await store.clear_name(mine("a"), 6)
        assert [n for n, _ in await numbers(store)] == [17, 16, 14, 10, 6, 4], "it would be kept without its name"
        await store.clear_name(mine("a"), 4)
        assert [n for n, _ in await numbers(store)] == [17, 16, 14, 10, 6]
