"""Pages of sessions by labels: they hold what the filter lets pass, and cost no more where there is much else."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
from sqlalchemy import Connection, NullPool, Select, create_engine, select, text

from era.core.metadata import SessionFilter
from era.core.models import OwnedId
from era.store.engine.tables import sessions
from era.store.metadata import SqlStore
from era.store.session_pages import _all_conditions, page_query, pair
from tests.soaking import soak_the_rest
from tests.store.rows import new

SESSIONS, MIDDLE, PAGE = 20_000, 10_000, 20
COMMON, OLD = pair("common", "1"), pair("old", "1")
ROWS = (
    f"""
INSERT INTO sessions (key, id, owner, language, persistent, metadata, allow_internet, allow_public, default_timeout,
    version, created_at, updated_at)
    SELECT i, 's' || i, CASE WHEN i % 2 = 0 THEN 'ada' ELSE 'mallory' END, 'python', true, '{{}}', true, true, 30,
        1, 5, 5
    FROM generate_series(1, {SESSIONS}) i""",
    f"INSERT INTO session_pairs (session_key, pair) SELECT key, '{COMMON}' FROM sessions",
    f"INSERT INTO session_pairs (session_key, pair) SELECT key, '{OLD}' FROM sessions WHERE key <= {4 * PAGE}",
)
"""Sessions of two owners in turn, all with one label, the oldest with another."""

LANGUAGES = ("python", "node")
OWNERS = ("ada", "mallory")
LABELS: list[dict[str, Any]] = [{}, {"a": "1"}, {"b": "1"}, {"a": "1", "b": "1"}, {"c": 2, "a": "1", "b": "1"}]


async def test_a_page_of_large_sessions_holds_fewer(store: SqlStore) -> None:
    keys = []
    for number in range(5):
        owned, data = OwnedId("ada", f"s{number}"), json.dumps({"text": "x" * 1000})
        keys.append((await store.create_session(new("s", id=owned, data=data))).key)
    for limit, most, expected in ((5, 1, 1), (5, 2000, 2), (4, 1 << 20, 4), (5, 1 << 20, 5), (9, 1 << 20, 5)):
        before, found, sizes, more = None, [], [], True
        while more:
            page, more = await store.session_page(SessionFilter("ada", limit=limit, before_key=before), most)
            sizes.append(len(page))
            found += [each.key for each in page]
            before = found[-1]
        assert (found, sizes[0]) == (keys[::-1], expected), "all of them, so many of them in memory at a time"
    assert await store.session_page(SessionFilter("mallory", limit=5), 1 << 20) == ([], False)


@pytest.mark.parametrize("url", ["sqlite_url", "postgres_url"], indirect=True)
async def test_pages_with_and_without_ids(store: SqlStore) -> None:
    for number in range(8):
        owned = OwnedId(OWNERS[number % 2], f"s{number}")
        await store.create_session(new("s", id=owned, metadata={"a": "1"} if number < 6 else {}))
    await store.delete_session(OwnedId("ada", "s2"))

    async def found(limit: int, **fields: Any) -> tuple[list[str], bool]:
        page, more = await store.session_page(SessionFilter("ada", limit=limit, **fields), 1 << 20)
        return [each.id for each in page], more

    ids = ["s0", "s1", "s2", "s6"]  # s1 is another owner's, s2 is deleted
    assert await found(1, ids=ids) == (["s6"], True)
    assert await found(2, ids=ids) == (["s6", "s0"], False)
    assert await found(2, ids=ids, metadata={"a": "1"}) == (["s0"], False)
    assert await found(2, ids=[]) == ([], False)
    assert await found(1, without_ids=["s6", "s1"]) == (["s4"], True)
    assert await found(2, without_ids=["s6"], metadata={"a": "1"}) == (["s4", "s0"], False)


@pytest.mark.parametrize("url", soak_the_rest(["sqlite_url", "postgres_url"], 1), indirect=True)
async def test_pages_hold_what_passes_in_order(store: SqlStore) -> None:
    chance = random.Random(7)
    for number in range(60):
        owned = OwnedId(chance.choice(OWNERS), f"s{number}")
        language = chance.choice(LANGUAGES)
        await store.create_session(new("s", id=owned, metadata=chance.choice(LABELS), language=language))
        if chance.random() < 0.2:
            await store.delete_session(owned)
    for owner in OWNERS:
        everything = await store.sessions(SessionFilter(owner))
        for wanted in LABELS[1:]:
            for only in (*LANGUAGES, None):
                passing = [
                    each.id
                    for each in everything
                    if wanted.items() <= each.metadata.items() and only in (None, each.language)
                ]
                found: list[str] = []
                before = None
                asked = {name: str(value) for name, value in wanted.items()}
                for limit in (1, 2, 3, 100):
                    which = SessionFilter(owner, only, asked, limit=limit, before_key=before)
                    page = await store.sessions(which)
                    assert len(page) <= limit
                    found += [each.id for each in page]
                    before = page[-1].key if page else before
                assert found == passing, (owner, wanted, only)


def test_a_page_of_many_sessions_reads_few_blocks(postgres_url: str) -> None:
    """Right after the rows were written, too, when PostgreSQL knows nothing about them yet."""
    engine = create_engine(postgres_url.replace("postgresql:", "postgresql+psycopg:"), poolclass=NullPool)
    plainly = 0
    with engine.connect() as connection:
        # Rows of tests before may be gone and leave their blocks: where it has looked at such a table on its own, it
        # takes the next rows for none until it looks again.
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(
            text("VACUUM ANALYZE sessions, session_pairs")
        )
    with engine.connect() as connection:  # which rolls back
        for statement in ROWS:
            connection.execute(text(statement))
        for is_known in (False, True):
            if is_known:
                connection.execute(text("ANALYZE sessions, session_pairs"))
            for labels, before in itertools.product((["common"], ["old"], ["common", "old"], ["none"]), (None, MIDDLE)):
                which = SessionFilter("ada", metadata=dict.fromkeys(labels, "1"), limit=PAGE, before_key=before)
                found, blocks = _asked(connection, page_query(which, 0))
                assert found == (0 if labels == ["none"] else PAGE)
                assert blocks < 30 * PAGE, (is_known, labels, before)
                plain = select(sessions.c.key).where(*_all_conditions(which, 0)).order_by(sessions.c.key.desc())
                plainly = max(plainly, _asked(connection, plain.limit(PAGE))[1])
    assert plainly > SESSIONS / 2, "a plain query does as well"


def _asked(connection: Connection, query: Select[Any]) -> tuple[int, int]:
    """How many rows a query finds, and how many blocks of the database it looks at."""
    told = query.compile(connection, compile_kwargs={"literal_binds": True})
    explained = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {told}")
    plan = explained.scalar_one()[0]["Plan"]
    return plan["Actual Rows"], plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
