"""Owners: no call to the store finds another owner's rows, and finding one's own takes an index."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from era.core.api_keys import ApiKey
from era.core.metadata import SessionChange, SessionFilter
from era.core.models import DEFAULT_OWNER, Claim, NewCopy, NewSession, OwnedId, StoredCode
from era.core.storage import Item
from era.errors import Conflict, NotFound
from era.store import session_lookup
from era.store.d1_databases import D1Databases
from era.store.metadata import SqlStore
from era.store.session_pages import page_query
from tests.owners import mine
from tests.store.rows import execute, make_at_revision, opened

HERS, HIS = OwnedId("ada", "s"), OwnedId("mallory", "s")


def new(session_id: OwnedId) -> NewSession:
    return NewSession(session_id, "python", True, "{}", {"team": "x"}, True, True, 30.0)


async def test_every_call_to_a_session_checks_its_owner(store: SqlStore) -> None:
    made = await store.create_session(new(HERS))
    await store.begin_run(HERS, "r")
    await store.inboxes.put_inbox(HERS, None, 0)
    run = Claim("run", "k", "hash", "mark")

    def calls(session_id: OwnedId) -> dict[str, Any]:
        return {
            "session": store.session(session_id),
            "change_session": store.change_session(session_id, SessionChange(storage=False)),
            "commit": store.commit(session_id, "data", data="[]", snapshot=None),
            "rollback": store.rollback(session_id, 1),
            "versions": store.versions(session_id, limit=1, before=None),
            "version": store.version(session_id, 1),
            "store_code": store.store_code(session_id, StoredCode("1", None, 1)),
            "duplicate": store.duplicate(NewCopy(session_id, "copy")),
            "begin_run": store.begin_run(session_id, "r2"),
            "run": store.run(session_id, "r"),
            "find_claim": store.find_claim(session_id, run),
            "restart_setup": store.restart_setup(session_id),
            "dump": store.dump(session_id, history=True, take=lambda *_: None),
            "put_inbox": store.inboxes.put_inbox(session_id, None, 1),
            "inbox": store.inboxes.inbox(session_id),
            "deliveries": store.inboxes.deliveries(session_id, status=None, limit=1, before=None),
            "delivery": store.inboxes.delivery(session_id, "d"),
            "replay_delivery": store.inboxes.replay_delivery(session_id, "d"),
            "delete_inbox": store.inboxes.delete_inbox(session_id),
            "delete_session": store.delete_session(session_id),
            "restore_session": store.restore_session(session_id),
            "purge_session": store.purge_session(session_id),
        }

    for name, call in calls(HIS).items():
        with pytest.raises(NotFound) as refused:
            await call
        assert refused.value.message == "There is no session 's'.", name
        assert refused.value.hint == NotFound.hint, name
    assert await store.session(HERS) == made
    # While it is removed he learns no more of it, and when its id is his, he gets none of it.
    await store.delete_session(HERS)
    for call in (store.session(HIS), store.restore_session(HIS), store.purge_session(HIS)):
        with pytest.raises(NotFound) as refused:
            await call
        assert refused.value.hint == NotFound.hint
    await store.create_session(new(HIS))
    with pytest.raises(Conflict):
        await store.restore_session(HERS)
    assert (await store.public_session("s")).owner == "mallory"
    assert list(await store.purge_session(HIS)) == [made.key + 1]
    assert await store.restore_session(HERS) == made
    assert [session.owner for session in await store.sessions(SessionFilter("ada"))] == ["ada"]
    assert await store.sessions(SessionFilter("mallory", metadata={"team": "x"})) == []


async def test_finding_ones_own_sessions_takes_an_index(sqlite_store: SqlStore, tmp_path: Path) -> None:
    """However many sessions others have, no table is scanned and nothing is sorted."""

    def plan(query: Any) -> str:
        with closing(sqlite3.connect(tmp_path / "era.db")) as database:
            compiled = query.compile(dialect=sqlite_store.database.engines.reader.dialect)
            rows = database.execute(f"EXPLAIN QUERY PLAN {compiled}", [None] * len(compiled.positiontup)).fetchall()
        return "; ".join(row[3] for row in rows)

    listed = plan(page_query(SessionFilter("ada", limit=10, before_key=7), 0))
    assert listed.startswith("SEARCH sessions USING INDEX ix_sessions_owner (owner=? AND key<?)"), listed
    assert "TEMP B-TREE" not in listed
    for query, index in (
        (session_lookup._BY_OWNED_ID, "uq_sessions_id"),
        (session_lookup._LAST_REMOVED, "ix_sessions_gone_id"),
    ):
        assert f"SEARCH sessions USING INDEX {index} (id=?" in plan(query)


async def test_api_keys_are_added_listed_and_dropped(store: SqlStore) -> None:
    keys = [ApiKey(f"key_{n}", "ada", "what for", n) for n in (2, 1)]
    for key in keys:
        await store.api_keys.add_api_key(key, f"digest {key.id}")
    assert await store.api_keys.api_keys() == [(keys[1], "digest key_1"), (keys[0], "digest key_2")]
    assert [await store.api_keys.drop_api_key("key_1") for _ in range(2)] == [True, False]
    assert await store.api_keys.api_keys() == [(keys[0], "digest key_2")]


OLD_ROWS = (
    """
INSERT INTO sessions (key, id, language, persistent, metadata, allow_internet, allow_public, default_timeout, version,
    created_at, updated_at) VALUES (3, 'old', 'python', true, '{}', true, true, 30, 1, 5, 5)""",
    """
INSERT INTO versions (session_key, n, created_at, cause, file_count, total_bytes, data)
    VALUES (3, 1, 5, 'create', 0, 0, '{}')""",
    """
INSERT INTO idempotency_keys (scope, key, request_hash, env_mark, created_at)
    VALUES ('create', 'k', 'hash', 'mark', 9000000000000000), ('run:3', 'k', 'other', 'mark', 9000000000000000)""",
    """
INSERT INTO storage_items (kind, namespace, key, size, created_at, updated_at, metadata, digest, value) VALUES
    ('kv', 'app', CAST('k' AS BYTES), 5, 6, 7, '{"n": 1}', NULL, CAST('value' AS BYTES)),
    ('r2', 'app', CAST('k' AS BYTES), 9, 6, 7, NULL, 'ffff', NULL)""",
)


async def test_rows_from_before_owners_belong_to_the_owner_default(empty_url: str) -> None:
    url = empty_url
    make_at_revision(url, "0010")
    bytes_type = "BLOB" if url.startswith("sqlite") else "bytea"
    execute(url, *(statement.replace("BYTES", bytes_type) for statement in OLD_ROWS))

    async with opened(url) as store:
        session = await store.session(mine("old"))
        assert (session.owner, session.storage) == (DEFAULT_OWNER, True)
        for claim, of, request_hash in (
            (Claim("create", "k", "hash", "mark"), mine(""), "hash"),
            (Claim("run", "k", "other", "mark"), mine("old"), "other"),
        ):
            claimed = await store.find_claim(of, claim)
            assert claimed is not None
            assert claimed.request_hash == request_hash
        assert await store.find_claim(OwnedId("ada", ""), Claim("create", "k", "hash", "mark")) is None
        items, count = await store.storage_items.all_items(DEFAULT_OWNER, None, None, prefix="", limit=9, offset=0)
        assert (count, items[0]) == (2, Item(DEFAULT_OWNER, "kv", "app", "k", 5, 6, 7, {"n": 1}))
        assert await store.output_digests() == ["ffff"]


async def test_databases_from_before_owners_are_moved_with_their_journals(tmp_path: Path) -> None:
    """With the journal of what was cut short, which undoes it; and with nothing of it undone by a second start."""
    before, directory = tmp_path / "d1", tmp_path / "sql"
    before.mkdir()
    with closing(sqlite3.connect(before / "app.sqlite")) as database:
        database.executescript("PRAGMA journal_mode = TRUNCATE; PRAGMA cache_size = 1; CREATE TABLE t (n, filling)")
        database.executemany("INSERT INTO t VALUES (1, zeroblob(1000))", [()] * 100)
        database.commit()
        database.execute("UPDATE t SET n = 2")
        torn = {path.name: path.read_bytes() for path in before.iterdir()}  # as a crash leaves it
        database.rollback()
    for name, content in torn.items():
        (before / name).write_bytes(content)
    assert torn["app.sqlite-journal"]
    for _ in range(2):
        databases = D1Databases(directory, 1 << 30, before=before)
        databases.open()
        assert not before.exists()
        assert list(databases.sizes(DEFAULT_OWNER)) == ["app"]
        assert databases.sizes("ada") == {}
        found = await databases.run(DEFAULT_OWNER, "app", "SELECT DISTINCT n FROM t", many=False, room=0)
        assert found["results"] == [{"n": 1}]
        await databases.run("ada", "app", "CREATE TABLE u (n)", many=False, room=1 << 20)
        await databases.drop("ada", "app")
        await databases.close()
