"""The metadata store on a real SQLite file."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from era.core.idempotency import unpacked
from era.core.metadata import Retention, SessionChange, SessionFilter
from era.core.models import (
    DEFAULT_OWNER,
    EMPTY,
    Answered,
    Claim,
    KeptOutputs,
    NewCopy,
    NewSession,
    RunRecord,
    Session,
    Snapshot,
    StoredCode,
    now,
)
from era.errors import CommitFailed, Conflict, Expired, NotFound, SessionDeleted, Unavailable
from era.store import migrations
from era.store import runs as runs_module
from era.store.metadata import LOST, SqlStore
from era.store.runs import DELETED
from era.store.tables import metadata as tables
from tests.owners import mine

type WithStore = Callable[[Callable[[SqlStore], Awaitable[None]]], None]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/era.db"


@pytest.fixture
def with_store(url: str) -> WithStore:
    def run(test: Callable[[SqlStore], Awaitable[None]]) -> None:
        async def main() -> None:
            store = SqlStore(url)
            try:
                await store.open()
                await test(store)
            finally:
                await store.close()

        asyncio.run(main())

    return run


def new(session_id: str, **changes: Any) -> NewSession:
    return replace(NewSession(mine(session_id), "python", True, "{}", {}, True, False, 30.0), **changes)


def ended(session: Session, run_id: str, **changes: Any) -> RunRecord:
    record = RunRecord(run_id, session.key, "ok", started_at=1, ended_at=now(), exit_code=0, committed=True)
    return replace(record, **changes)


def test_the_migrations_make_the_tables(url: str, with_store: WithStore) -> None:
    async def test(_: SqlStore) -> None:
        engine = create_engine(url)
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            assert compare_metadata(context, tables) == []
        engine.dispose()

    with_store(test)
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    assert ScriptDirectory.from_config(config).get_current_head() == migrations.HEAD


def test_a_database_of_a_newer_version_is_left_alone(url: str, tmp_path: Path, with_store: WithStore) -> None:
    async def nothing(_: SqlStore) -> None: ...

    with_store(nothing)
    with closing(sqlite3.connect(tmp_path / "era.db", isolation_level=None)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(Unavailable, match="9999"):
        with_store(nothing)


OLD_ROWS = """
INSERT INTO sessions (key, id, language, persistent, data, metadata, allow_internet, allow_public, default_timeout,
    version, snapshot_root, file_count, total_bytes, created_at, updated_at) VALUES
    (3, 'new', 'python', 1, '{}', '{}', 1, 0, 30, 1, NULL, 0, 0, 5, 5),
    (4, 'ran', 'node', 0, '{"n": 1}', '{"who": "me"}', 1, 1, 7, 9, 'ffff', 2, 8, 5, 6),
    (5, 'patched', 'python', 1, '{}', '{}', 1, 1, 30, 2, NULL, 0, 0, 5, 7);
INSERT INTO session_pairs VALUES (4, 'pair');
INSERT INTO runs (id, session_key, status, started_at, stdout_bytes, stderr_bytes, stdout_truncated, stderr_truncated,
    committed, version, enforced) VALUES
    ('r1', 4, 'ok', 1, 0, 0, 0, 0, 1, 8, '{}'), ('r2', 4, 'ok', 1, 0, 0, 0, 0, 1, 9, '{}'),
    ('r3', 4, 'failed', 1, 0, 0, 0, 0, 0, 9, '{}'), ('r4', 5, 'failed', 1, 0, 0, 0, 0, 0, 2, '{}');
UPDATE sqlite_sequence SET seq = 11 WHERE name = 'sessions';
"""


def test_the_rows_of_an_older_version_are_carried_over(tmp_path: Path, url: str, with_store: WithStore) -> None:
    engine = create_engine(url)
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    engine.dispose()
    with closing(sqlite3.connect(tmp_path / "era.db")) as connection:
        connection.executescript(OLD_ROWS)

    async def test(store: SqlStore) -> None:
        ran = await store.session(mine("ran"))
        assert (ran.key, ran.language, ran.persistent, ran.data, ran.metadata) == (
            4,
            "node",
            False,
            '{"n": 1}',
            {"who": "me"},
        )
        assert (ran.version, ran.snapshot, ran.updated_at, ran.ttl) == (9, Snapshot("ffff", 2, 8), 6, None)
        assert [run.id for run in await store.runs(4, 10)] == ["r3", "r2", "r1"], "a table was dropped with its rows"
        causes = {}
        for session_id in ("new", "ran", "patched"):
            [version] = await store.versions(mine(session_id), limit=10, before=None)
            causes[session_id] = (version.n, version.cause, version.run_id)
        assert causes == {"new": (1, "create", None), "ran": (9, "run", "r2"), "patched": (2, "data", None)}
        assert (await store.create_session(new("later"))).key == 12, "a key was given twice"
        with pytest.raises(Conflict):
            await store.create_session(new("new"))
        await store.begin_run(mine("ran"), "r5")
        assert (await store.end_run(ended(ran, "r5"), data=None, snapshot=None)).version == 10
        await store.purge_session(mine("ran"))
        assert await store.runs(4, 10) == []

    with_store(test)
    with closing(sqlite3.connect(tmp_path / "era.db")) as connection:
        assert connection.execute("SELECT count(*) FROM session_pairs").fetchone() == (0,)
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def test_create_read_change_delete(with_store: WithStore) -> None:
    async def test(store: SqlStore) -> None:
        created = await store.create_session(new("a", data='{"n": 1}', metadata={"who": "me"}))
        assert created.version == 1
        assert created.snapshot == EMPTY
        assert created.last_run_at is None
        assert await store.session(mine("a")) == created

        changed = await store.change_session(mine("a"), SessionChange(default_timeout=5.0, allow_public=True))
        assert (changed.default_timeout, changed.allow_public, changed.version) == (5.0, True, 1)
        assert changed.data == created.data
        changed = await store.change_session(mine("a"), SessionChange(data="{}", metadata={"who": "you"}))
        assert (changed.data, changed.version, changed.metadata) == ("{}", 2, {"who": "you"})
        assert changed.updated_at >= created.updated_at

        await store.store_code(mine("a"), StoredCode("print(1)", None, 7))
        assert (await store.session(mine("a"))).stored == StoredCode("print(1)", None, 7)

        assert (await store.delete_session(mine("a"))).version == 2
        again = await store.create_session(new("a"))
        assert again.key > created.key
        assert again.stored is None

    with_store(test)


def test_what_is_not_there_is_not_found(with_store: WithStore) -> None:
    async def test(store: SqlStore) -> None:
        for call in (
            store.session(mine("a")),
            store.change_session(mine("a"), SessionChange(data="{}")),
            store.store_code(mine("a"), StoredCode("", None, 1)),
            store.delete_session(mine("a")),
            store.begin_run(mine("a"), "r"),
        ):
            with pytest.raises(NotFound, match="'a'"):
                await call

    with_store(test)


def test_two_creates_of_one_id_are_one_session(with_store: WithStore) -> None:
    async def test(store: SqlStore) -> None:
        results = await asyncio.gather(*(store.create_session(new("a")) for _ in range(2)), return_exceptions=True)
        conflicts = [result for result in results if isinstance(result, BaseException)]
        assert [(type(error), str(error)) for error in conflicts] == [(Conflict, "Session 'a' already exists.")]
        assert len(await store.sessions(SessionFilter(DEFAULT_OWNER))) == 1

    with_store(test)


def test_a_commit_moves_everything_together(with_store: WithStore) -> None:
    async def test(store: SqlStore) -> None:
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
        answer = await store.end_run(ended(session, "r2"), data=None, snapshot=None)
        assert answer.version == 3
        after = await store.session(mine("a"))
        assert (after.data, after.snapshot) == ('{"n": 1}', snapshot)

        await store.begin_run(mine("a"), "r3")
        await store.end_run(ended(session, "r3"), data=None, snapshot=EMPTY)
        assert (await store.session(mine("a"))).snapshot == EMPTY

    with_store(test)


def test_a_run_that_is_not_committed_leaves_the_state(with_store: WithStore) -> None:
    async def test(store: SqlStore) -> None:
        session = await store.create_session(new("a", data='{"n": 1}'))
        await store.begin_run(mine("a"), "r1")
        record = ended(session, "r1", committed=False, reason="not JSON", status="failed")
        answer = await store.end_run(record, data="{}", snapshot=Snapshot("f" * 64, 1, 1))
        assert answer.version == 1
        after = await store.session(mine("a"))
        assert (after.data, after.version, after.snapshot) == ('{"n": 1}', 1, EMPTY)
        assert after.last_run_at is not None

    with_store(test)


def test_the_end_of_a_run_of_a_deleted_session(with_store: WithStore) -> None:
    async def test(store: SqlStore) -> None:
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

    with_store(test)


def test_versions_hold_what_each_commit_left(with_store: WithStore) -> None:
    async def test(store: SqlStore) -> None:
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

    with_store(test)


def test_old_versions_go_with_the_commit_that_makes_them_too_many(url: str) -> None:
    async def main() -> None:
        store = SqlStore(url, Retention(versions=2))
        await store.open()
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
        await store.close()

    asyncio.run(main())


def test_a_duplicate_has_content_and_settings(with_store: WithStore) -> None:
    async def test(store: SqlStore) -> None:
        source = await store.create_session(new("a", data='{"n": 1}', metadata={"who": "me"}, ttl=60))
        await store.store_code(mine("a"), StoredCode("print(1)", "d", 7))
        await store.begin_run(mine("a"), "r1")
        await store.end_run(ended(source, "r1"), data='{"n": 2}', snapshot=Snapshot("f" * 64, 3, 99))
        copy = await store.duplicate(NewCopy(mine("a"), "b"))
        source = await store.session(mine("a"))
        same = {"key": 0, "id": "", "version": 0, "created_at": 0, "updated_at": 0, "last_run_at": 0, "expires_at": 0}
        assert replace(copy, **same) == replace(source, **same)
        assert (copy.version, copy.last_run_at) == (1, None)
        assert await store.sessions(SessionFilter(DEFAULT_OWNER, metadata={"who": "me"})) == [copy, source]
        assert await store.runs(copy.key, 10) == []
        old = await store.duplicate(NewCopy(mine("a"), "c", version=1))
        assert (old.data, old.snapshot) == ('{"n": 1}', EMPTY)
        other = await store.duplicate(NewCopy(mine("a"), "d", data="{}"))
        assert (other.data, other.snapshot) == ("{}", copy.snapshot)
        for wrong, error in (
            (NewCopy(mine("a"), "b"), Conflict),
            (NewCopy(mine("a"), "e", 9), NotFound),
            (NewCopy(mine("x"), "e"), NotFound),
        ):
            with pytest.raises(error):
                await store.duplicate(wrong)
        assert len(await store.sessions(SessionFilter(DEFAULT_OWNER))) == 4

    with_store(test)


def test_a_setup_ends_with_what_its_commands_left_or_not_at_all(with_store: WithStore) -> None:
    left = Snapshot("a" * 64, 1, 10)

    async def test(store: SqlStore) -> None:
        made = await store.create_session(new("s", setup='{"commands":["true"]}'))
        (job,) = await store.setups_to_do()
        assert (job.session_key, job.session_id, job.setup) == (made.key, mine("s"), made.setup)
        await store.begin_setup(job)
        end = {"status": "completed", "result": "{}", "environment": None}
        changed = await store.commit(mine("s"), "data", data='{"n":1}', snapshot=None)
        assert not await store.end_setup(job, **end, left=(made.version, left))
        session = await store.session(mine("s"))
        assert (session.setup_status, session.version, session.snapshot) == ("running", changed.version, EMPTY)
        assert await store.end_setup(job, **end, left=(changed.version, left))
        session = await store.session(mine("s"))
        assert (session.setup_status, session.version, session.snapshot) == ("completed", changed.version + 1, left)
        assert (session.data, session.setup_result) == ('{"n":1}', "{}")
        assert [each.cause for each in await store.versions(mine("s"), limit=9, before=None)] == [
            "setup",
            "data",
            "create",
        ]
        # Where nothing was left no version is made; where the session asks for another setup, or is gone, nothing is.
        await store.set_up_again(mine("s"))
        assert await store.end_setup(job, **end, left=(session.version, left))
        assert (await store.session(mine("s"))).version == session.version
        await store.change_session(mine("s"), SessionChange(setup='{"commands":["false"]}'))
        assert not await store.end_setup(job, **end, left=(session.version, EMPTY))
        await store.purge_session(mine("s"))
        assert not await store.end_setup(job, **end, left=(session.version, EMPTY))

    with_store(test)


def test_a_run_id_is_used_once(with_store: WithStore) -> None:
    async def test(store: SqlStore) -> None:
        await store.create_session(new("a"))
        await store.begin_run(mine("a"), "r1")
        with pytest.raises(Conflict, match="Run 'r1'"):
            await store.begin_run(mine("a"), "r1")

    with_store(test)


def test_runs_under_way_at_a_stop_are_lost(with_store: WithStore) -> None:
    async def before(store: SqlStore) -> None:
        session = await store.create_session(new("a"))
        for run_id in ("r1", "r2"):
            await store.begin_run(mine("a"), run_id)
        await store.end_run(ended(session, "r1"), data=None, snapshot=None)

    async def after(store: SqlStore) -> None:
        assert await store.mark_lost() == 1
        assert await store.mark_lost() == 0
        lost, ok = await store.runs((await store.session(mine("a"))).key, 10)
        assert (lost.id, lost.status, lost.reason) == ("r2", "lost", LOST)
        assert lost.ended_at is not None
        assert ok.status == "ok"
        assert await store.counts() == {"sessions": 1, "runs": {"ok": 1, "lost": 1}}

    with_store(before)
    with_store(after)


def test_lists_come_newest_first_in_pages(with_store: WithStore) -> None:
    async def test(store: SqlStore) -> None:
        for number in range(5):
            await store.create_session(new(f"s{number}", language="node" if number % 2 else "python"))
        page = await store.sessions(SessionFilter(DEFAULT_OWNER, limit=2))
        assert [session.id for session in page] == ["s4", "s3"]
        await store.create_session(new("later"))
        page = await store.sessions(SessionFilter(DEFAULT_OWNER, limit=2, before_key=page[-1].key))
        assert [session.id for session in page] == ["s2", "s1"]
        page = await store.sessions(SessionFilter(DEFAULT_OWNER, language="node"))
        assert [session.id for session in page] == ["s3", "s1"]
        session = await store.session(mine("s0"))
        for number in range(4):
            await store.begin_run(mine("s0"), f"r{number}")
        assert [run.id for run in await store.runs(session.key, 2)] == ["r3", "r2"]

    with_store(test)


ODD = {
    "a.b": "dot",
    "quote\"'": "quotes",
    "$[0]": "path",
    "%": "_%",
    "": "empty",
    "\x00": "nul",
    "\ud800": "surrogate",
    "n": 3,
    "x": 2.50,
    "flag": True,
    "none": None,
    "list": [1, "a"],
    "long" * 1000: "v" * 10000,
}


@pytest.mark.parametrize(("name", "text"), [(name, v if isinstance(v, str) else None) for name, v in ODD.items()])
def test_metadata_filters_take_any_key_literally(name: str, text: str | None, with_store: WithStore) -> None:
    text = json.dumps(ODD[name], separators=(",", ":")) if text is None else text

    async def test(store: SqlStore) -> None:
        odd = await store.create_session(new("odd", metadata=ODD))
        await store.create_session(new("other", metadata={"a": {"b": "dot"}, "n": 4, "flag": "yes"}))
        assert await store.sessions(SessionFilter(DEFAULT_OWNER, metadata={name: text})) == [odd]
        assert await store.sessions(SessionFilter(DEFAULT_OWNER, metadata={name: text, "n": "3"})) == [odd]
        assert await store.sessions(SessionFilter(DEFAULT_OWNER, metadata={name: text + "x"})) == []
        assert await store.sessions(SessionFilter(DEFAULT_OWNER, metadata={name: text, "nowhere": "4"})) == []
        await store.change_session(mine("odd"), SessionChange(metadata={"n": "3"}))
        found = await store.sessions(SessionFilter(DEFAULT_OWNER, metadata={"n": "3"}))
        assert [session.id for session in found] == ["odd"]
        await store.change_session(mine("odd"), SessionChange(metadata={}))
        assert await store.sessions(SessionFilter(DEFAULT_OWNER, metadata={"n": "3"})) == []

    with_store(test)


def test_snapshot_roots_are_those_that_rows_need(with_store: WithStore) -> None:
    async def test(store: SqlStore) -> None:
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

    with_store(test)


def test_outputs_are_kept_for_the_newest_runs(url: str) -> None:
    async def main() -> None:
        store = SqlStore(url, Retention(outputs=2))
        await store.open()
        session = await store.create_session(new("a"))
        given = [
            KeptOutputs(b"1", b""),
            KeptOutputs(None, b"2", "d" * 64),
            None,
            KeptOutputs(b"", b""),
            KeptOutputs(b"4", None, None, "e" * 64),
        ]
        for n, outputs in enumerate(given):
            await store.begin_run(mine("a"), f"r{n}")
            assert await store.run(mine("a"), f"r{n}") == ((await store.runs(session.key, 1))[0], None)
            await store.end_run(ended(session, f"r{n}"), data=None, snapshot=None, outputs=outputs)
            if n == 1:
                assert list(await store.output_digests()) == ["d" * 64]
        kept = [(await store.run(mine("a"), f"r{n}"))[1] for n in range(5)]
        assert kept == [None, None, None, None, given[4]], "nothing written is nothing kept"
        assert list(await store.output_digests()) == ["e" * 64]
        with pytest.raises(NotFound, match="'r9'"):
            await store.run(mine("a"), "r9")
        await store.create_session(new("b"))
        with pytest.raises(NotFound, match="'r0'"):
            await store.run(mine("b"), "r0")
        await store.close()

    asyncio.run(main())


def test_records_are_kept_for_the_newest_runs(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those too many go, a few at a time, but for one under way and one that a key still answers for."""
    monkeypatch.setattr(runs_module, "_PRUNED_AT_ONCE", 2)
    claim = Claim("run", "k", "h" * 64, "mark")

    async def main() -> None:
        store = SqlStore(url, Retention(runs=3, outputs=10))
        await store.open()
        keys = {name: (await store.create_session(new(name))).key for name in "ab"}
        await store.begin_run(mine("a"), "under way")
        for n in range(10):
            for name, key in keys.items():
                run_id, session = f"{name}{n}", await store.session(mine(name))
                await store.begin_run(mine(name), run_id, claim if run_id == "a2" else None)
                answered = Answered(claim, "{}", KeptOutputs(b"", b"")) if run_id == "a2" else None
                record = ended(replace(session, key=key), run_id)
                outputs = KeptOutputs(run_id.encode(), None, None, f"{n:064}")
                await store.end_run(record, data=None, snapshot=None, outputs=outputs, answered=answered)
            if n == 2:
                assert await store.prune_runs() == 0, "the one under way is the first of four"
        assert await store.prune_runs() == 6 + 7
        assert [run.id for run in await store.runs(keys["a"], 99)] == ["a9", "a8", "a7", "a2", "under way"]
        assert [run.id for run in await store.runs(keys["b"], 99)] == ["b9", "b8", "b7"]
        assert {int(digest) for digest in await store.output_digests()} == {2, 7, 8, 9}
        claimed = await store.claimed(mine("a"), claim)
        assert claimed is not None
        assert claimed.run is not None
        assert claimed.run.id == "a2"
        assert [each.run_id for each in await store.versions(mine("a"), limit=2, before=None)] == ["a9", "a8"]
        assert await store.prune_runs() == 0
        await store.close()

    asyncio.run(main())


def test_a_key_is_claimed_with_its_run_and_answered_with_its_end(with_store: WithStore) -> None:
    claim = Claim("run", "k", "h" * 64, "mark")

    async def test(store: SqlStore) -> None:
        session = await store.create_session(new("a"))
        assert await store.claimed(mine("a"), claim) is None
        await store.begin_run(mine("a"), "r1", claim)
        with pytest.raises(Conflict):
            await store.begin_run(mine("a"), "r2", claim)
        assert [run.id for run in await store.runs(session.key, 9)] == ["r1"], "a run began without its claim"
        claimed = await store.claimed(mine("a"), claim)
        assert claimed is not None
        assert claimed.run is not None
        assert (claimed.request_hash, claimed.answer, claimed.run.status) == ("h" * 64, None, "running")
        outputs = KeptOutputs(b"out", None, None, "d" * 64)
        await store.end_run(
            ended(session, "r1"), data="{}", snapshot=None, answered=Answered(claim, '{"n": 1}', outputs)
        )
        claimed = await store.claimed(mine("a"), claim)
        assert claimed is not None
        assert (claimed.answer, claimed.outputs) == ('{"n": 1}', outputs)
        assert list(await store.output_digests()) == ["d" * 64]
        assert await store.claimed(mine(""), claim) is None
        assert await store.claimed(mine("a"), replace(claim, key="K")) is None

        await store.begin_run(mine("a"), "r3", replace(claim, key="other"))
        released = Answered(replace(claim, key="other"))
        await store.end_run(ended(session, "r3", committed=False), data=None, snapshot=None, answered=released)
        assert await store.claimed(mine("a"), replace(claim, key="other")) is None

    with_store(test)


def test_a_session_is_made_and_its_key_answered_together(with_store: WithStore) -> None:
    claim = Claim("create", "k", "h" * 64, "mark")

    async def test(store: SqlStore) -> None:
        session = await store.create_session(new("a", data='{"n": 1}'), claim)
        await store.store_code(mine("a"), StoredCode("1", None, 7))
        with pytest.raises(Conflict):
            await store.create_session(new("b"), claim)
        with pytest.raises(Conflict):
            await store.create_session(new("a"), replace(claim, key="free"))
        assert await store.claimed(mine(""), replace(claim, key="free")) is None
        claimed = await store.claimed(mine(""), claim)
        assert claimed is not None
        assert claimed.answer is not None
        assert unpacked(claimed.answer) == session
        source = await store.session(mine("a"))
        copying = replace(claim, route="duplicate")
        copy = await store.duplicate(NewCopy(mine("a"), "b"), copying)
        claimed = await store.claimed(mine("a"), copying)
        assert claimed is not None
        assert claimed.answer is not None
        assert unpacked(claimed.answer) == copy
        assert copy.stored == source.stored

    with_store(test)


def test_keys_are_forgotten_after_a_day(tmp_path: Path, with_store: WithStore) -> None:
    claim = Claim("create", "k", "h" * 64, "mark")

    async def test(store: SqlStore) -> None:
        await store.create_session(new("a"), claim)
        await store.create_session(new("b"), replace(claim, key="young"))
        with closing(sqlite3.connect(tmp_path / "era.db", isolation_level=None)) as other:
            other.execute("UPDATE idempotency_keys SET created_at = created_at - 86400000000 WHERE key = 'k'")
        assert await store.claimed(mine(""), claim) is None
        await store.create_session(new("c"), claim)
        assert await store.claimed(mine(""), claim) is not None
        assert await store.forget_keys() == 0
        with closing(sqlite3.connect(tmp_path / "era.db", isolation_level=None)) as other:
            other.execute("UPDATE idempotency_keys SET created_at = created_at - 86400000000 WHERE key = 'k'")
        assert await store.forget_keys() == 1

    with_store(test)


def test_gone_sessions_free_their_id_and_can_be_restored(with_store: WithStore) -> None:
    async def test(store: SqlStore) -> None:
        first = await store.create_session(new("a", metadata={"who": "me"}, data='{"n": 1}'))
        assert (await store.delete_session(mine("a"))).gone is None
        with pytest.raises(NotFound) as gone:
            await store.session(mine("a"))
        assert "restore" in gone.value.hint
        second = await store.create_session(new("a"))
        with pytest.raises(Conflict, match="in use"):
            await store.restore_session(mine("a"))
        assert await store.sessions(SessionFilter(DEFAULT_OWNER)) == [second]
        [deleted] = await store.sessions(SessionFilter(DEFAULT_OWNER, gone="deleted", metadata={"who": "me"}))
        assert (deleted.key, deleted.gone) == (first.key, "deleted")
        assert await store.sessions(SessionFilter(DEFAULT_OWNER, gone="expired")) == []
        await store.delete_session(mine("a"))
        assert (await store.restore_session(mine("a"))).key == second.key, "the last one comes back"
        with pytest.raises(Conflict):
            await store.restore_session(mine("a"))
        assert sorted(await store.purge_session(mine("a"))) == [first.key, second.key]
        for call in (store.restore_session(mine("a")), store.purge_session(mine("a"))):
            with pytest.raises(NotFound):
                await call

    with_store(test)


def test_sessions_expire_when_nobody_has_called(with_store: WithStore) -> None:
    second = 1_000_000

    async def test(store: SqlStore) -> None:
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
        [expired] = await store.sessions(SessionFilter(DEFAULT_OWNER, gone="expired"))
        assert (expired.gone, expired.version) == ("expired", 2)
        back = await store.restore_session(mine("a"))
        assert (back.gone, back.version) == (None, 2)
        assert back.expires_at is not None
        assert back.expires_at >= now() + 99 * second
        changed = await store.change_session(mine("a"), SessionChange(ttl=None))
        assert (changed.ttl, changed.expires_at) == (None, None)
        changed = await store.change_session(mine("a"), SessionChange(ttl=5))
        assert changed.expires_at == changed.updated_at + 5 * second

    with_store(test)


def test_a_read_is_noted_only_now_and_then(tmp_path: Path, with_store: WithStore) -> None:
    async def test(store: SqlStore) -> None:
        session = await store.create_session(new("a", ttl=100))
        assert await store.session(mine("a")) == session
        with closing(sqlite3.connect(tmp_path / "era.db", isolation_level=None)) as other:
            other.execute("UPDATE sessions SET expires_at = expires_at - 11000000")
        touched = await store.session(mine("a"))
        assert session.expires_at is not None
        assert touched.expires_at is not None
        assert touched.expires_at >= session.expires_at
        with closing(sqlite3.connect(tmp_path / "era.db", isolation_level=None)) as other:
            other.execute("UPDATE sessions SET expires_at = 1000000")
        with pytest.raises(Expired):  # though nobody has marked it
            await store.session(mine("a"))
        again = await store.create_session(new("a"))
        assert again.key > session.key
        assert [gone.key for gone in await store.sessions(SessionFilter(DEFAULT_OWNER, gone="expired"))] == [
            session.key
        ]

    with_store(test)


def test_gone_sessions_are_purged_in_the_end(url: str) -> None:
    async def main() -> None:
        store = SqlStore(url, Retention(grace_seconds=100))
        await store.open()
        session = await store.create_session(new("a"), Claim("create", "k", "h", "m"))
        for n in range(12):  # which takes more than one transaction to drop
            await store.commit(mine("a"), "data", data=f'{{"n":{n}}}', snapshot=None)
        await store.begin_run(mine("a"), "r1")
        await store.end_run(
            ended(session, "r1"), data=None, snapshot=Snapshot("f" * 64, 1, 1), outputs=KeptOutputs(b"x", b"")
        )
        await store.create_session(new("b"))
        await store.delete_session(mine("a"))
        assert await store.purge(now() + 99_000_000) == 0
        assert list(await store.snapshot_roots()) == ["f" * 64]
        assert await store.purge(now() + 100_000_000) == 1
        assert list(await store.snapshot_roots()) == []
        assert await store.runs(session.key, 9) == []
        with pytest.raises(NotFound):
            await store.restore_session(mine("a"))
        [there] = await store.sessions(SessionFilter(DEFAULT_OWNER))
        await store._purge_one(there.key)  # as if it had been restored in between
        assert await store.sessions(SessionFilter(DEFAULT_OWNER)) == [there]
        await store.close()

        store = SqlStore(url, Retention(grace_seconds=0))
        await store.open()
        await store.delete_session(mine("b"))
        with pytest.raises(NotFound):
            await store.restore_session(mine("b"))
        await store.close()

    asyncio.run(main())


def test_a_failing_database_is_told_without_its_sql(
    tmp_path: Path, with_store: WithStore, caplog: pytest.LogCaptureFixture
) -> None:
    """A table that is gone stands for any trouble; the store must work again once the trouble is over."""

    async def test(store: SqlStore) -> None:
        session = await store.create_session(new("a"))
        await store.begin_run(mine("a"), "r1")
        other = sqlite3.connect(tmp_path / "era.db", isolation_level=None)
        other.execute("ALTER TABLE runs RENAME TO away")
        with pytest.raises(CommitFailed) as commit:
            await store.end_run(ended(session, "r1"), data='{"secret": 1}', snapshot=None)
        with pytest.raises(Unavailable) as unavailable:
            await store.begin_run(mine("a"), "r2")
        for told in (str(commit.value), str(unavailable.value), caplog.text):
            assert "UPDATE" not in told
            assert "secret" not in told
        assert (await store.session(mine("a"))).version == 1
        other.execute("ALTER TABLE away RENAME TO runs")
        other.close()
        assert (await store.end_run(ended(session, "r1"), data=None, snapshot=None)).version == 2

    with_store(test)


def test_a_full_disk_fails_the_commit_and_keeps_the_old_state(with_store: WithStore) -> None:
    async def test(store: SqlStore) -> None:
        session = await store.create_session(new("a"))
        await store.begin_run(mine("a"), "r1")

        def cap() -> None:
            assert store._connection is not None
            store._connection.exec_driver_sql("PRAGMA max_page_count = 30")
            store._connection.rollback()

        await asyncio.get_running_loop().run_in_executor(store._writer, cap)
        with pytest.raises(CommitFailed):
            await store.end_run(ended(session, "r1"), data=json.dumps("x" * 1_000_000), snapshot=None)
        assert (await store.session(mine("a"))).data == "{}"
        assert (await store.end_run(ended(session, "r1"), data='{"n": 1}', snapshot=None)).version == 2

    with_store(test)


def test_a_closed_store_says_so(url: str) -> None:
    async def main() -> None:
        store = SqlStore(url)
        await store.open()
        await store.close()
        await store.close()
        for call in (store.session(mine("a")), store.create_session(new("a"))):
            with pytest.raises(Unavailable):
                await call

    asyncio.run(main())


def test_connections_are_as_durable_as_promised(with_store: WithStore) -> None:
    async def test(store: SqlStore) -> None:
        await store.create_session(new("a"))

        def pragmas() -> list[Any]:
            assert store._connection is not None
            names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            return [store._connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]

        assert await asyncio.get_running_loop().run_in_executor(store._writer, pragmas) == ["wal", 2, 1, 5000]

    with_store(test)


COMMITTER = """
import asyncio, sys
from era.core.models import NewSession, RunRecord, now
from tests.owners import mine
from era.store.metadata import SqlStore

async def main():
    store = SqlStore(sys.argv[1])
    await store.open()
    session = await store.create_session(NewSession(mine("a"), "python", True, "{}", {}, True, True, 30.0))
    for n in range(1_000_000):
        await store.begin_run(mine("a"), f"r{n}")
        record = RunRecord(f"r{n}", session.key, "ok", now(), now(), 0, committed=True)
        ended = await store.end_run(record, data='{"n": %d}' % n, snapshot=None)
        print(ended.version, n, flush=True)

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("wait", [0.0, 0.07, 0.2])
def test_kill_9_loses_nothing_acknowledged(url: str, wait: float, with_store: WithStore) -> None:
    command = [sys.executable, "-c", textwrap.dedent(COMMITTER), url]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first
        time.sleep(wait)
        process.kill()
        lines = (first + process.stdout.read()).splitlines(keepends=True)
    version, n = map(int, [line for line in lines if line.endswith(b"\n")][-1].split())

    async def test(store: SqlStore) -> None:
        session = await store.session(mine("a"))
        assert session.version >= version
        kept = json.loads(session.data)["n"]
        assert kept >= n
        assert session.version == kept + 2, "data and version move together"
        runs = {run.id: run for run in await store.runs(session.key, 10)}
        assert runs[f"r{kept}"].version == session.version
        assert await store.mark_lost() in (0, 1)

    with_store(test)
