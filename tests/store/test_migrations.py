"""The schema: made by its migrations, and older databases carried over."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from era.core.models import Snapshot
from era.errors import Conflict, Unavailable
from era.store import migrations
from era.store.tables import metadata as tables
from tests.owners import mine
from tests.store.rows import ended, make_at_revision, migration_config, new, opened


async def test_the_migrations_make_the_tables(url: str) -> None:
    async with opened(url):
        engine = create_engine(url)
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            assert compare_metadata(context, tables) == []
        engine.dispose()
    assert ScriptDirectory.from_config(migration_config()).get_current_head() == migrations.HEAD


async def test_a_database_of_a_newer_version_is_left_alone(url: str, tmp_path: Path) -> None:
    async with opened(url):
        pass
    with closing(sqlite3.connect(tmp_path / "era.db", isolation_level=None)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(Unavailable, match="9999"):
        async with opened(url):
            pass


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


async def test_the_rows_of_an_older_version_are_carried_over(tmp_path: Path, url: str) -> None:
    make_at_revision(url, "0001")
    with closing(sqlite3.connect(tmp_path / "era.db")) as connection:
        connection.executescript(OLD_ROWS)

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
    with closing(sqlite3.connect(tmp_path / "era.db")) as connection:
        assert connection.execute("SELECT count(*) FROM session_pairs").fetchone() == (0,)
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
