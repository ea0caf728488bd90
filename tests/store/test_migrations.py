"""The schema: made by its migrations, and older databases carried over."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from era.core.models import Snapshot
from era.errors import Conflict, Unavailable
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
