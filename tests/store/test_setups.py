"""Setups in the rows of their sessions."""

from __future__ import annotations

import pytest

from era.core.metadata import SessionChange
from era.core.models import DEFAULT_OWNER, EMPTY, OwnedId, Snapshot
from era.core.owners.quotas import Bound
from era.errors import QuotaReached
from era.store.metadata import SqlStore
from tests.owners import mine
from tests.store.rows import new


async def test_a_setup_and_the_files_of_its_commands_are_recorded_together(store: SqlStore) -> None:
    left = Snapshot("a" * 64, 1, 10)
    made = await store.create_session(new("s", setup='{"commands":["true"]}'))
    (job,) = await store.unfinished_setups()
    assert (job.session_key, job.session_id, job.setup) == (made.key, mine("s"), made.setup)
    await store.begin_setup(job)

    async def end(version: int, files: Snapshot) -> bool:
        return await store.end_setup(job, status="completed", result="{}", package_set=None, left=(version, files))

    changed = await store.commit(mine("s"), "data", data='{"n":1}', snapshot=None)
    assert not await end(made.version, left)
    session = await store.session(mine("s"))
    assert (session.setup_status, session.version, session.snapshot) == ("running", changed.version, EMPTY)
    assert await end(changed.version, left)
    session = await store.session(mine("s"))
    assert (session.setup_status, session.version, session.snapshot) == ("completed", changed.version + 1, left)
    assert (session.data, session.setup_result) == ('{"n":1}', "{}")
    assert [each.cause for each in await store.versions(mine("s"), limit=9, before=None)] == [
        "setup",
        "data",
        "create",
    ]
    # Where nothing was left no version is made; where the session asks for another setup, or is gone, nothing is.
    await store.restart_setup(mine("s"))
    assert await end(session.version, left)
    assert (await store.session(mine("s"))).version == session.version
    await store.change_session(mine("s"), SessionChange(setup='{"commands":["false"]}'))
    assert not await end(session.version, EMPTY)
    await store.purge_session(mine("s"))
    assert not await end(session.version, EMPTY)


async def test_a_setup_that_is_repeated_and_fails_leaves_the_packages_of_the_one_before(store: SqlStore) -> None:
    await store.create_session(new("s", setup='{"pip":["one"]}'))

    async def end(status: str, package_set: str | None) -> None:
        (job,) = await store.unfinished_setups()
        assert await store.end_setup(job, status=status, result="{}", package_set=package_set)

    async def has() -> tuple[str | None, str | None]:
        session = await store.session(mine("s"))
        return session.setup_status, session.package_set

    await end("failed", None)
    assert await has() == ("failed", None)
    await store.restart_setup(mine("s"))
    await end("completed", "a" * 64)
    await store.restart_setup(mine("s"))
    assert await has() == ("pending", "a" * 64)
    assert await store.package_sets() == ["a" * 64], "nobody removes it meanwhile"
    await end("failed", None)
    assert await has() == ("failed", "a" * 64)
    await store.restart_setup(mine("s"))
    await end("completed", "b" * 64)
    assert await has() == ("completed", "b" * 64)
    await store.change_session(mine("s"), SessionChange(setup='{"pip":["one"]}'))
    assert await has() == ("pending", "b" * 64), "it is the same"
    await store.change_session(mine("s"), SessionChange(setup='{"pip":["two"]}'))
    assert await has() == ("pending", None)
    await end("failed", None)
    assert await has() == ("failed", None)


async def test_files_of_a_setup_count_for_quotas(store: SqlStore) -> None:
    """Those that are too many aren't kept; those that are kept count for the next commit, without a new count."""
    store.bounds = lambda _, *names: [Bound("owner", DEFAULT_OWNER, name, 10, lambda _: None) for name in names]
    await store.create_session(new("other"))
    await store.commit(mine("other"), "files", data=None, snapshot=Snapshot("a" * 64, 1, 1 << 20))
    made = await store.create_session(new("s", setup='{"commands":["true"]}'))
    (job,) = await store.unfinished_setups()

    async def end(size: int) -> bool:
        left = (made.version, Snapshot("b" * 64, 1, size << 20))
        return await store.end_setup(job, status="completed", result="{}", package_set=None, left=left)

    with pytest.raises(QuotaReached) as caught:
        await end(10)
    assert caught.value.details == {
        "quota": "disk_mb",
        "of": "owner",
        "limit": 10,
        "used": 1,
        "filled_by": ["other", "s"],
    }
    session = await store.session(mine("s"))
    assert (session.setup_status, session.version, session.snapshot) == ("pending", made.version, EMPTY)
    assert await end(8)
    with pytest.raises(QuotaReached):
        await store.commit(mine("other"), "files", data=None, snapshot=Snapshot("c" * 64, 1, 3 << 20))
    assert await store.end_setup(job, status="completed", result="{}", package_set=None) is False, "it has ended"


async def test_an_owner_s_many_setups_leave_others_theirs(store: SqlStore) -> None:
    """Of those that are looked at a time."""
    for n in range(4):
        await store.create_session(new(f"g{n}", id=OwnedId("greedy", f"g{n}"), setup='{"pip":["one"]}'))
    await store.create_session(new("s", setup='{"pip":["one"]}'))
    assert [job.session_id.id for job in await store.unfinished_setups()] == ["g0", "s", "g1", "g2", "g3"]
