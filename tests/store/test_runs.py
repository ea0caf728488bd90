"""Records of runs, and what a run commits."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
from sqlalchemy import Connection

from era.core.metadata import Retention, RunFilter
from era.core.models import EMPTY, Answered, Claim, KeptOutputs, OwnedId, Snapshot, Status
from era.errors import CommitFailed, Conflict, NotFound, SessionDeleted, Unavailable
from era.store import runs as runs_module
from era.store.metadata import SqlStore
from era.store.runs import DELETED, LOST
from tests.owners import mine
from tests.store.rows import ended, new, opened


async def test_a_commit_moves_everything_together(store: SqlStore) -> None:
    session = await store.create_session(new("a"))
    assert await store.begin_run(mine("a"), "r1") == session
    snapshot = Snapshot("f" * 64, 3, 99)
    record = ended(session, "r1", enforced={"network": "none"}, peak_memory_bytes=7, stdout_truncated=True)
    answer = await store.end_run(record, data='{"n": 1}', snapshot=snapshot)
    assert answer == replace(record, version=2)
    after = await store.session(mine("a"))
    assert (after.data, after.version, after.snapshot) == ('{"n": 1}', 2, snapshot)
    assert after.last_run_at == record.ended_at
    assert list(await store.runs(session.key, 10)) == [answer]

    await store.begin_run(mine("a"), "r2")
    answer = await store.end_run(ended(session, "r2"), data='{"n": 2}', snapshot=None)
    assert answer.version == 3
    after = await store.session(mine("a"))
    assert (after.data, after.snapshot) == ('{"n": 2}', snapshot)

    await store.begin_run(mine("a"), "r3")
    await store.end_run(ended(session, "r3"), data=None, snapshot=EMPTY)
    assert (await store.session(mine("a"))).snapshot == EMPTY


async def test_runs_are_found_by_whatever_status_they_have(store: SqlStore) -> None:
    session = await store.create_session(new("a"))
    statuses = get_args(Status.__value__)
    for status in statuses:
        await store.begin_run(mine("a"), status)
        if status != "running":
            await store.end_run(ended(session, status, status=status), data=None, snapshot=None)
    for status in statuses:
        found = await store.runs_of_owner(RunFilter(session.owner, 9, status))
        assert [record.id for _, record in found] == [status]


async def test_a_run_that_changed_nothing_makes_no_version(store: SqlStore) -> None:
    session = await store.create_session(new("a", ttl=100))
    await store.begin_run(mine("a"), "r1")
    record = ended(session, "r1")
    assert await store.end_run(record, data=None, snapshot=None) == replace(record, version=1)
    after = await store.session(mine("a"))
    assert (after.version, after.last_run_at, after.updated_at) == (1, record.ended_at, session.updated_at)
    assert after.expires_at is not None
    assert session.expires_at is not None
    assert after.expires_at > session.expires_at
    assert len(await store.versions(mine("a"), limit=9, before=None)) == 1
    assert [(each.id, each.committed) for each in await store.runs(session.key, 9)] == [("r1", True)]


async def test_a_run_that_is_not_committed_leaves_the_state(store: SqlStore) -> None:
    session = await store.create_session(new("a", data='{"n": 1}'))
    await store.begin_run(mine("a"), "r1")
    record = ended(session, "r1", committed=False, reason="not JSON", status="failed")
    answer = await store.end_run(record, data="{}", snapshot=Snapshot("f" * 64, 1, 1))
    assert answer.version == 1
    after = await store.session(mine("a"))
    assert (after.data, after.version, after.snapshot) == ('{"n": 1}', 1, EMPTY)
    assert after.last_run_at is not None


async def test_the_end_of_a_run_of_a_deleted_session(store: SqlStore) -> None:
    session = await store.create_session(new("a"))
    await store.begin_run(mine("a"), "r1")
    await store.delete_session(mine("a"))
    await store.create_session(new("a"))
    with pytest.raises(SessionDeleted):
        await store.end_run(ended(session, "r1"), data='{"n": 1}', snapshot=None)
    assert (await store.session(mine("a"))).version == 1
    [record] = await store.runs(session.key, 9)
    assert (record.status, record.committed, record.reason, record.version) == ("ok", False, DELETED, None)
    await store.purge_session(mine("a"))
    with pytest.raises(SessionDeleted):
        await store.end_run(ended(session, "r1"), data=None, snapshot=None)
    assert await store.counts() == {"sessions": 0, "runs": {}}


async def test_a_run_id_is_used_once(store: SqlStore) -> None:
    await store.create_session(new("a"))
    await store.begin_run(mine("a"), "r1")
    with pytest.raises(Conflict, match="Run 'r1'"):
        await store.begin_run(mine("a"), "r1")


async def test_a_run_ends_once(store: SqlStore) -> None:
    session = await store.create_session(new("a"))
    await store.begin_run(mine("a"), "r1")
    first = ended(session, "r1")
    await store.end_run(first, data='{"n": 1}', snapshot=None, outputs=KeptOutputs(b"first", b""))
    with pytest.raises(CommitFailed, match="has ended"):
        await store.end_run(ended(session, "r1"), data='{"n": 2}', snapshot=None, outputs=KeptOutputs(b"second", b""))
    assert (await store.session(mine("a"))).data == '{"n": 1}'
    _, outputs = await store.run(mine("a"), "r1")
    assert outputs is not None
    assert outputs.stdout == b"first"


async def test_runs_under_way_at_a_stop_are_lost(url: str) -> None:
    async with opened(url) as store:
        session = await store.create_session(new("a"))
        for run_id in ("r1", "r2"):
            await store.begin_run(mine("a"), run_id)
        await store.end_run(ended(session, "r1"), data=None, snapshot=None)

    async with opened(url) as store:
        assert await store.mark_lost() == 1
        assert await store.mark_lost() == 0
        lost, ok = await store.runs((await store.session(mine("a"))).key, 10)
        assert (lost.id, lost.status, lost.reason) == ("r2", "lost", LOST)
        assert lost.ended_at is not None
        assert ok.status == "ok"
        assert await store.counts() == {"sessions": 1, "runs": {"ok": 1, "lost": 1}}


async def test_outputs_are_kept_for_the_newest_runs(url: str) -> None:
    async with opened(url, Retention(outputs=2)) as store:
        session = await store.create_session(new("a"))
        given = [
            KeptOutputs(b"1", b""),
            KeptOutputs(None, b"2", "d" * 64),
            None,
            KeptOutputs(b"", b""),
            KeptOutputs(b"4", None, None, "e" * 64, None, "f" * 64),
        ]
        for n, outputs in enumerate(given):
            await store.begin_run(mine("a"), f"r{n}")
            assert await store.run(mine("a"), f"r{n}") == ((await store.runs(session.key, 1))[0], None)
            await store.end_run(ended(session, f"r{n}"), data=None, snapshot=None, outputs=outputs)
            if n == 1:
                assert list(await store.output_digests()) == ["d" * 64]
        kept = [(await store.run(mine("a"), f"r{n}"))[1] for n in range(5)]
        assert kept == [None, None, None, None, given[4]], "nothing written is nothing kept"
        assert sorted(await store.output_digests()) == ["e" * 64, "f" * 64]
        with pytest.raises(NotFound, match="'r9'"):
            await store.run(mine("a"), "r9")
        await store.create_session(new("b"))
        with pytest.raises(NotFound, match="'r0'"):
            await store.run(mine("b"), "r0")


async def test_outputs_of_a_session_take_so_many_bytes_and_no_more(url: str) -> None:
    """The oldest go first, and the newest stays however long it is. Where all are short, nobody counts."""
    sizes, left = [40, 40, 40, 10, 200, 30, 90], list[list[int]]()
    async with opened(url, Retention(outputs=5, output_bytes=100)) as store:
        other = await store.create_session(new("b"))
        await store.begin_run(mine("b"), "of b")
        kept = KeptOutputs(None, b"", "b" * 64, blob_bytes=90)
        await store.end_run(replace(ended(other, "of b"), stdout_bytes=90), data=None, snapshot=None, outputs=kept)
        session = await store.create_session(new("a"))
        for n, size in enumerate(sizes):
            await store.begin_run(mine("a"), f"r{n}")
            record = replace(ended(session, f"r{n}"), stdout_bytes=size - 10, stderr_bytes=10)
            kept = KeptOutputs(None, b"e" * 10, str(n) * 64, blob_bytes=size if size != 30 else 0)
            await store.end_run(record, data=None, snapshot=None, outputs=kept)
            left.append([m for m in range(n + 1) if (await store.run(mine("a"), f"r{m}"))[1] is not None])
        assert (await store.run(mine("b"), "of b"))[1] is not None
    assert left == [[0], [0, 1], [1, 2], [1, 2, 3], [4], [4, 5], [6]]


async def test_records_are_kept_for_the_newest_runs(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those too many go, a few at a time, but for one under way and one that a key still answers for."""
    monkeypatch.setattr(runs_module, "_PRUNED_AT_ONCE", 2)
    claim = Claim("run", "k", "h" * 64, "mark")
    async with opened(url, Retention(runs=3, outputs=10)) as store:
        keys = {name: (await store.create_session(new(name))).key for name in "ab"}
        await store.begin_run(mine("a"), "under way")
        for n in range(10):
            for name, key in keys.items():
                run_id, session = f"{name}{n}", await store.session(mine(name))
                await store.begin_run(mine(name), run_id, claim if run_id == "a2" else None)
                answered = Answered(claim, "{}", KeptOutputs(b"", b"")) if run_id == "a2" else None
                record = ended(replace(session, key=key), run_id)
                outputs = KeptOutputs(run_id.encode(), None, None, f"{n:064}")
                await store.end_run(record, data=str(n), snapshot=None, outputs=outputs, answered=answered)
            if n == 2:
                assert await store.prune_runs() == 0, "the one under way is the first of four"
        assert await store.prune_runs() == 6 + 7
        assert [run.id for run in await store.runs(keys["a"], 99)] == ["a9", "a8", "a7", "a2", "under way"]
        assert [run.id for run in await store.runs(keys["b"], 99)] == ["b9", "b8", "b7"]
        assert {int(digest) for digest in await store.output_digests()} == {2, 7, 8, 9}
        claimed = await store.find_claim(mine("a"), claim)
        assert claimed is not None
        assert claimed.run is not None
        assert claimed.run.id == "a2"
        assert [each.run_id for each in await store.versions(mine("a"), limit=2, before=None)] == ["a9", "a8"]
        assert await store.prune_runs() == 0


async def test_a_record_that_was_not_synced_is_there_after_a_kill(sqlite_store: SqlStore, sqlite_url: str) -> None:
    """The service that finds it is another process, to which the killed one's connections are as good as open."""
    session = await sqlite_store.create_session(new("a"))
    await sqlite_store.begin_run(mine("a"), "r1", durably=False)
    async with opened(sqlite_url) as next_service:
        assert await next_service.mark_lost() == 1
        assert [record.status for record in await next_service.runs(session.key, 10)] == ["lost"]


async def test_only_such_records_are_not_synced(sqlite_store: SqlStore) -> None:
    store = sqlite_store

    def level(connection: Connection) -> int:
        return int(connection.exec_driver_sql("PRAGMA synchronous").scalar_one())

    full = await store.database.write(level)
    assert full == 2
    assert await store.database.write_unsynced(level) == 1
    assert await store.database.write(level) == full
    with pytest.raises(ZeroDivisionError):
        await store.database.write_unsynced(lambda _: 1 / 0)
    assert await store.database.write(level) == full
    with pytest.raises(Unavailable):
        await store.database.write_unsynced(lambda connection: connection.exec_driver_sql("SELECT nothing"))
    assert await store.database.write(level) == full


LISTS = {
    "of all": RunFilter("many", 50),
    "of later": RunFilter("many", 50, since=1 << 60),
    "with a status": RunFilter("many", 50, status="ok"),
    "of long ago": RunFilter("many", 50, before_key=15_000),
}


@pytest.mark.parametrize("which", LISTS)
@pytest.mark.parametrize(
    ("few", "weakened"), [(9, False), (1, False), (1, True)], ids=["few sessions", "many sessions", "weakened"]
)
async def test_a_list_of_an_owner_s_runs_does_not_walk_all_of_others(
    sqlite_store: SqlStore, which: str, few: int, weakened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in steps of SQLite's, of which each row takes several."""
    monkeypatch.setattr(runs_module, "_FEW_SESSIONS", few)
    monkeypatch.setattr(runs_module, "_LOOKED_THROUGH", 1 << 40 if weakened else 100)
    other = await sqlite_store.create_session(new("other"))
    for name in ("first", "second"):
        await sqlite_store.create_session(new(name, id=OwnedId("many", name)))
        await sqlite_store.begin_run(OwnedId("many", name), f"run of {name}")

    def fill(connection: Connection) -> None:
        connection.exec_driver_sql(
            "INSERT INTO runs (id, session_key, status, started_at, stdout_bytes, stderr_bytes, stdout_truncated, "
            "stderr_truncated, committed, enforced) WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n "
            "WHERE i < 20000) SELECT 'run ' || i, ?, 'ok', 1, 0, 0, 0, 0, 1, '{}' FROM n",
            (other.key,),
        )

    await sqlite_store.database.write(fill)
    hundreds = 0

    def step() -> int:
        nonlocal hundreds
        hundreds += 1
        return 0

    def listing(connection: Connection) -> int:
        raw = connection.connection.driver_connection
        assert raw is not None
        raw.set_progress_handler(step, 100)
        try:
            return len(runs_module.list_runs_of_owner(connection, LISTS[which]))
        finally:
            raw.set_progress_handler(None, 0)

    found = await sqlite_store.database.read(listing)
    assert found == (2 if which in ("of all", "of long ago") else 0)
    assert (hundreds > 500) is weakened
