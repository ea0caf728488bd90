"""Owners: no call to the store finds another owner's rows, and finding one's own takes an index."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from era.core.metadata import SessionChange, SessionFilter
from era.core.models import Claim, NewCopy, NewSession, OwnedId, StoredCode
from era.core.owners.api_keys import ApiKey
from era.errors import Conflict, NotFound
from era.store import session_lookup
from era.store.metadata import SqlStore
from era.store.session_pages import page_query

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
