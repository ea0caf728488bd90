"""The schema: made by its migrations, and databases of other versions refused."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect

from era.core.cluster.homes import Host
from era.errors import NotReady, Unavailable
from era.store import migrations
from era.store.engine.tables import metadata as tables
from tests.owners import mine
from tests.store.rows import ended, engine_of, execute, new, opened

OLD = ("CREATE TABLE alembic_version (version_num VARCHAR(32))", "INSERT INTO alembic_version VALUES ('0030')")
"""What tells a database of an older checkout from others."""


async def test_the_migrations_make_the_tables(empty_url: str) -> None:
    async with opened(empty_url):
        engine = engine_of(empty_url)
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            assert compare_metadata(context, tables) == []
        engine.dispose()
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    assert ScriptDirectory.from_config(config).get_current_head() == migrations.HEAD


async def test_the_migrations_make_what_sqlalchemy_makes(tmp_path: Path) -> None:
    """To the letter in SQLite: conditions of indexes and actions of foreign keys too, which alembic doesn't compare."""
    async with opened(f"sqlite:///{tmp_path}/migrated.db"):
        pass
    engine = create_engine(f"sqlite:///{tmp_path}/made.db")
    tables.create_all(engine)
    engine.dispose()

    def schema(name: str) -> set[tuple[str, str]]:
        with closing(sqlite3.connect(tmp_path / name)) as connection:
            found = connection.execute("SELECT name, sql FROM sqlite_schema WHERE tbl_name <> 'alembic_version'")
            return set(found)

    assert schema("migrated.db") == schema("made.db")


async def test_a_database_of_an_older_checkout_is_refused_and_left_alone(empty_url: str) -> None:
    execute(empty_url, *OLD)
    with pytest.raises(NotReady, match="`scripts/move-data OLD_CHECKOUT OLD_DATA NEW_DATA`"):
        async with opened(empty_url):
            pass
    engine = engine_of(empty_url)
    assert inspect(engine).get_table_names() == ["alembic_version"]
    engine.dispose()


async def test_a_database_of_a_newer_version_is_left_alone(empty_url: str) -> None:
    async with opened(empty_url):
        pass
    execute(empty_url, "UPDATE alembic_version SET version_num = 'v999'")
    with pytest.raises(Unavailable, match="v999"):
        async with opened(empty_url):
            pass


async def test_host_is_refused_when_database_was_migrated_meanwhile(empty_url: str) -> None:
    async with opened(empty_url, alone=False) as store:
        homes = await store.homes()
        execute(empty_url, "UPDATE alembic_version SET version_num = 'v999'")
        with pytest.raises(Unavailable, match="v999"):
            await homes.join(Host("late", ""), 3600)
        assert execute(empty_url, "UPDATE hosts SET url = '' WHERE id = 'late'") == 0


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
        execute(url, *columns, later, "UPDATE alembic_version SET version_num = 'v999'")
        session = await store.create_session(new("a"))
        await store.begin_run(mine("a"), "r1")
        await store.end_run(ended(session, "r1"), data='{"n": 1}', snapshot=None)
        assert (await store.session(mine("a"))).version == 2
        assert [run.id for run in await store.runs(session.key, 9)] == ["r1"]
        assert list((await homes.beat(Host("a", "http://a"))).hosts) == ["a"]
