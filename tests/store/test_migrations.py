"""The schema: made by its migrations, and older databases carried over."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from contextlib import closing

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Column, Integer, MetaData

from era.core.homes import Host
from era.core.models import Snapshot
from era.errors import Conflict, HostLost, NotReady, Unavailable
from era.store import migrations
from era.store.tables import metadata as tables
from tests.owners import mine
from tests.store.rows import ended, engine_of, execute, make_at_revision, migration_config, new, opened


async def test_the_migrations_make_the_tables(empty_url: str) -> None:
    url = empty_url
    async with opened(url):
        engine = engine_of(url)
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            assert compare_metadata(context, tables) == []
        engine.dispose()
    assert ScriptDirectory.from_config(migration_config()).get_current_head() == migrations.HEAD


async def test_a_database_of_a_newer_version_is_left_alone(empty_url: str) -> None:
    url = empty_url
    async with opened(url):
        pass
    execute(url, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(Unavailable, match="9999"):
        async with opened(url):
            pass


HOST = (
    "INSERT INTO hosts (id, url, started_at, heartbeat_at, lease_us, dead) VALUES ('{name}', '', 1, {at}, {us}, {dead})"
)
BEAT = "UPDATE hosts SET heartbeat_at = heartbeat_at + 1"


def test_hosts_of_a_version_whose_table_has_fewer_columns_are_found(
    empty_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_at_revision(empty_url, "0025")
    execute(empty_url, HOST.format(name="works", at=time.time_ns() // 1000, us=3_600_000_000, dead="false"))
    newer = tables.tables["hosts"].to_metadata(MetaData())
    newer.append_column(Column("added", Integer))
    monkeypatch.setattr(migrations, "hosts", newer)
    engine = engine_of(empty_url)
    with engine.begin() as connection:
        assert list(migrations._heartbeats(connection)) == ["works"]
    engine.dispose()


async def test_nothing_is_migrated_under_hosts_that_could_not_go_on(
    empty_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are gone without a word are waited for until their leases are over."""
    url = empty_url
    make_at_revision(url, "0025")
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
            connection.execute("PRAGMA journal_mode = WAL")  # as the hosts have it
    micros = time.time_ns() // 1000
    execute(
        url,
        HOST.format(name="left", at=micros, us=3_600_000_000, dead="true"),
        HOST.format(name="gone", at=micros - 3_600_000_000, us=5_000_000, dead="false"),
        HOST.format(name="works", at=micros, us=3_600_000_000, dead="false"),
    )

    async def beating() -> None:
        while True:
            await asyncio.to_thread(execute, url, BEAT)
            await asyncio.sleep(0.05)

    beats = asyncio.create_task(beating())
    with pytest.raises(NotReady, match="stop all of them"):
        async with opened(url, alone=False):
            pass
    beats.cancel()
    await asyncio.wait([beats])
    assert execute(url, "UPDATE alembic_version SET version_num = '0025' WHERE version_num = '0025'") == 1
    # Where they can go on, nobody is asked.
    with monkeypatch.context() as patched:
        patched.setattr(migrations, "_heartbeats", lambda _: pytest.fail("hosts were looked for"))
        patched.setattr(migrations, "ROLLING", migrations.ROLLING | {"0026"})
        async with opened(url, alone=False):
            pass
    indexes = ("deliveries_pending", "deliveries_running", "homes_host_id", "idempotency_keys_answer_bytes")
    dropped = [f"DROP INDEX ix_{name}" for name in indexes]
    columns = ("idempotency_keys.answer_bytes", "runs.invocation", "runs.code", "sessions.record_code")
    dropped += ["ALTER TABLE {} DROP COLUMN {}".format(*column.split(".")) for column in columns]
    execute(url, "DROP TABLE condemned", *dropped, "UPDATE alembic_version SET version_num = '0025'")
    # One that has just been killed.
    over = (time.time_ns() // 1000) + 1_500_000
    execute(url, f"UPDATE hosts SET heartbeat_at = {over} - lease_us WHERE id = 'works'")
    async with opened(url, alone=False):
        assert time.time_ns() // 1000 >= over


async def test_no_host_goes_on_that_was_overlooked_before_the_migration(
    empty_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that joins after the look is found in the transaction; one that hangs is dead to it, and joins anew."""
    url = empty_url
    make_at_revision(url, "0025")
    micros = time.time_ns() // 1000
    joins = HOST.format(name="joins", at=micros, us=3_600_000_000, dead="false")
    execute(url, HOST.format(name="hangs", at=micros - 3_600_000_000, us=5_000_000, dead="false"))
    with monkeypatch.context() as patched:
        patched.setattr(migrations, "_wait_for_hosts_that_are_gone", lambda _: execute(url, joins))
        with pytest.raises(NotReady, match="stop all of them"):
            async with opened(url, alone=False):
                pass
    assert execute(url, "DELETE FROM hosts WHERE id = 'joins'") == 1
    assert execute(url, "UPDATE alembic_version SET version_num = '0025' WHERE version_num = '0025'") == 1
    async with opened(url, alone=False) as store:
        homes = await store.homes()
        with pytest.raises(HostLost):
            await homes.beat(Host("hangs", ""))
        execute(url, "UPDATE alembic_version SET version_num = '9999'")
        with pytest.raises(Unavailable, match="9999"):
            await homes.join(Host("late", ""), 3600)
        assert execute(url, "UPDATE hosts SET url = '' WHERE id = 'late'") == 0


def test_each_revision_that_hosts_can_go_on_beside_exists() -> None:
    script = ScriptDirectory.from_config(migration_config())
    assert {each.revision for each in script.walk_revisions()} >= migrations.ROLLING


async def test_a_host_goes_on_beside_what_the_next_version_adds(empty_url: str) -> None:
    """Tables, and columns that may be left out: what a revision may add that others go on beside."""
    url = empty_url
    async with opened(url, alone=False) as store:
        homes = await store.homes()
        await homes.join(Host("a", "http://a"), 3600)
        columns = [
            f"ALTER TABLE {table.name} ADD COLUMN later VARCHAR(8) DEFAULT 'x'" for table in tables.sorted_tables
        ]
        later = "CREATE TABLE later (key BIGINT PRIMARY KEY)"
        execute(url, *columns, later, "UPDATE alembic_version SET version_num = '9999'")
        session = await store.create_session(new("a"))
        await store.begin_run(mine("a"), "r1")
        await store.end_run(ended(session, "r1"), data='{"n": 1}', snapshot=None)
        assert (await store.session(mine("a"))).version == 2
        assert [run.id for run in await store.runs(session.key, 9)] == ["r1"]
        assert list((await homes.beat(Host("a", "http://a"))).hosts) == ["a"]


OLD_ROWS = (
    """
INSERT INTO sessions (key, id, language, persistent, data, metadata, allow_internet, allow_public, default_timeout,
    version, snapshot_root, file_count, total_bytes, created_at, updated_at) VALUES
    (3, 'new', 'python', true, '{}', '{}', true, false, 30, 1, NULL, 0, 0, 5, 5),
    (4, 'ran', 'node', false, '{"n": 1}', '{"who": "me"}', true, true, 7, 9, 'ffff', 2, 8, 5, 6),
    (5, 'patched', 'python', true, '{}', '{}', true, true, 30, 2, NULL, 0, 0, 5, 7)""",
    "INSERT INTO session_pairs VALUES (4, 'pair')",
    """
INSERT INTO runs (id, session_key, status, started_at, stdout_bytes, stderr_bytes, stdout_truncated, stderr_truncated,
    committed, version, enforced) VALUES
    ('r1', 4, 'ok', 1, 0, 0, false, false, true, 8, '{}'), ('r2', 4, 'ok', 1, 0, 0, false, false, true, 9, '{}'),
    ('r3', 4, 'failed', 1, 0, 0, false, false, false, 9, '{}'),
    ('r4', 5, 'failed', 1, 0, 0, false, false, false, 2, '{}')""",
)
LAST_KEYS = {
    "sqlite": "UPDATE sqlite_sequence SET seq = 11 WHERE name = 'sessions'",
    "postgresql": "SELECT setval(pg_get_serial_sequence('sessions', 'key'), 11)",
}


async def test_the_rows_of_an_older_version_are_carried_over(empty_url: str) -> None:
    url = empty_url
    make_at_revision(url, "0001")
    execute(url, *OLD_ROWS, LAST_KEYS[url.partition(":")[0]])

    async with opened(url) as store:
        ran = await store.session(mine("ran"))
        assert (ran.key, ran.language, ran.persistent) == (4, "node", False)
        assert (ran.data, ran.metadata) == ('{"n": 1}', {"who": "me"})
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
        assert (await store.end_run(ended(ran, "r5"), data='{"n": 2}', snapshot=None)).version == 10
        await store.purge_session(mine("ran"))
        assert await store.runs(4, 10) == []
    assert execute(url, "DELETE FROM session_pairs") == 0
    if url.startswith("sqlite"):  # only there foreign keys were off
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
