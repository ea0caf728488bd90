"""Moving a server's rows from its data directory to PostgreSQL."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, Engine, select

from era.core.models import DEFAULT_OWNER, Answered, Claim, KeptOutputs, Snapshot
from era.core.owners.api_keys import ApiKey
from era.core.owners.audit import AuditEntry
from era.core.owners.webhooks import EVENTS, Webhook
from era.core.public.inbox import Content
from era.core.storage.storage import Item
from era.errors import BadRequest, Conflict, NotReady, Unavailable
from era.operation import rows
from era.operation.backup import back_up, restore
from era.operation.rows import migrate
from era.operation.server_data import ServerData
from era.store import place
from era.store.engine.tables import metadata
from tests.client.command import era
from tests.operation.under_load import quiet
from tests.owners import mine
from tests.store.postgres_proxy import PostgresProxy, postgres_proxy
from tests.store.rows import ended, engine_of, execute, new, opened

__all__ = ["postgres_proxy"]

ENTRY = AuditEntry(1, DEFAULT_OWNER, "operator", "key.create", "key_1", "req_1")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A data directory with rows of every kind, of which the newest session is gone."""
    asyncio.run(_fill(f"sqlite:///{tmp_path}/era.sqlite"))
    return tmp_path


async def _fill(url: str) -> None:
    async with opened(url) as store:
        await store.webhooks.add_webhook(Webhook("wh_1", DEFAULT_OWNER, "https://example.com/", EVENTS, "", 1))
        await store.audit.add_audit_entries([ENTRY], 10)
        session = await store.create_session(new("a", data='{"n": "\\u0000 é"}', metadata={"team": "x"}, ttl=1000))
        claim = Claim("run", "key", "h" * 64, "mark")
        await store.begin_run(mine("a"), "r1", claim)
        outputs = KeptOutputs(b"\0\xff\\x", None, None, "d" * 64)
        answered = Answered(claim, "{}", outputs)
        record = ended(session, "r1", enforced={"network": "none"})
        snapshot = Snapshot("f" * 64, 3, 9)
        await store.end_run(record, data='{"n": 1}', snapshot=snapshot, outputs=outputs, answered=answered)
        await store.name_version(mine("a"), 2, "good", named=())
        await store.inboxes.put_inbox(mine("a"), None, 3)
        content = Content("POST", "/p", "q=1", [("a", "b")], b"\0body", "http://x")
        await store.inboxes.add_delivery(session.key, "dlv_1", "sender", content)
        await store.storage_items.put_item(Item(DEFAULT_OWNER, "kv", "app", "k\\", 2, 6, 7, {"n": 1}, None, b"\0\\"))
        await store.api_keys.add_api_key(ApiKey("key_1", "ada", "what\tfor\n", 5), "digest")
        await store.note_context(session.key, "main")
        await store.create_session(new("gone"))
        await store.purge_session(mine("gone"))


def all_rows(engine: Engine) -> dict[str, list[Any]]:
    """All rows, by table."""
    with engine.connect() as connection:
        return {
            table.name: sorted((tuple(row) for row in connection.execute(select(table))), key=repr)
            for table in metadata.sorted_tables
        }


def rows_of(url: str) -> dict[str, list[Any]]:
    engine = engine_of(url)
    try:
        return all_rows(engine)
    finally:
        engine.dispose()


def test_all_rows_are_moved_and_the_server_goes_on_there(source: Path, empty_postgres_url: str) -> None:
    before = rows_of(f"sqlite:///{source}/era.sqlite")
    assert sum(map(bool, before.values())) >= 12, "hardly any table has rows"

    done = era(None, "migrate", source, "--json", code=0, env={"ERA_DATABASE_URL": empty_postgres_url})
    told = json.loads(done.stdout)
    assert told["rows"] == {name: len(some) for name, some in before.items()}
    assert rows_of(empty_postgres_url) == before
    assert not [*source.glob("era.sqlite"), *source.glob("era.sqlite-*")]
    assert rows_of(f"sqlite:///{source}/era.sqlite.moved") == before
    assert place.rows_url(source, empty_postgres_url) == empty_postgres_url

    async def goes_on() -> int:
        async with opened(empty_postgres_url) as store:
            assert (await store.session(mine("a"))).data == '{"n": 1}'
            await store.audit.add_audit_entries([ENTRY], 10)
            later = await store.create_session(new("later"))
            assert len(await store.webhooks.notices(DEFAULT_OWNER, "wh_1")) == 3
            return later.key

    with psycopg.connect(empty_postgres_url) as connection:
        believed = connection.execute("SELECT reltuples FROM pg_class WHERE relname = 'sessions'").fetchone()
    assert believed == (len(before["sessions"]),), "PostgreSQL knows nothing of its new rows"
    assert asyncio.run(goes_on()) == before["sessions"][0][0] + 2, "a key was given twice"
    with pytest.raises(NotReady, match="set ERA_DATABASE_URL to that"):
        place.rows_url(source, None)


def test_what_can_not_be_moved_changes_nothing(source: Path, empty_postgres_url: str) -> None:
    before = rows_of(f"sqlite:///{source}/era.sqlite")
    execute(f"sqlite:///{source}/era.sqlite", "UPDATE api_keys SET description = 'a' || char(0) || 'b'")
    with pytest.raises(BadRequest, match=r"api_keys \(key_1\) has text with a NUL"):
        migrate(source, empty_postgres_url)
    assert not any(rows_of(empty_postgres_url).values())
    execute(f"sqlite:///{source}/era.sqlite", "UPDATE api_keys SET description = 'what\tfor\n'")
    assert rows_of(f"sqlite:///{source}/era.sqlite") == before
    assert not (source / place.NOTE).exists()

    async def used() -> None:
        async with opened(empty_postgres_url) as store:
            await store.create_session(new("theirs"))

    asyncio.run(used())
    with pytest.raises(Conflict, match="has rows already"):
        migrate(source, empty_postgres_url)
    assert [row[1] for row in rows_of(empty_postgres_url)["sessions"]] == ["theirs"]
    assert rows_of(f"sqlite:///{source}/era.sqlite") == before


@pytest.mark.parametrize("step", ["note", "_put_aside"])
def test_what_was_interrupted_is_finished_when_it_is_repeated(
    source: Path, empty_postgres_url: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rows_of(f"sqlite:///{source}/era.sqlite")
    with monkeypatch.context() as interrupted:

        def fail(*_: object) -> None:
            raise OSError("interrupted")

        interrupted.setattr(place if step == "note" else rows, step, fail)
        with pytest.raises(OSError, match="interrupted"):
            migrate(source, empty_postgres_url)
    assert rows_of(empty_postgres_url) == before, "this isn't the case in question"
    execute(empty_postgres_url, "UPDATE api_keys SET description = 'another'")
    with pytest.raises(Conflict, match="has rows already"):
        migrate(source, empty_postgres_url)
    assert (source / "era.sqlite").exists()
    execute(empty_postgres_url, "UPDATE api_keys SET description = 'what\tfor\n'")
    moved = migrate(source, empty_postgres_url)
    assert moved.rows == {name: len(some) for name, some in before.items()}
    assert place.rows_url(source, empty_postgres_url) == empty_postgres_url
    assert not (source / "era.sqlite").exists()


@pytest.mark.parametrize(
    ("command", "when"),
    [
        ("migrate", "after"),
        ("restore", "before"),
        pytest.param("migrate", "before", marks=pytest.mark.soak),
        pytest.param("restore", "after", marks=pytest.mark.soak),
    ],
)
def test_where_the_commit_had_no_answer_it_can_be_repeated(
    source: Path,
    empty_postgres_url: str,
    postgres_proxy: PostgresProxy,
    command: str,
    when: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = rows_of(f"sqlite:///{source}/era.sqlite")
    elsewhere, copy = tmp_path_factory.mktemp("elsewhere"), rows.copy
    back_up(ServerData(source), elsewhere / "backup", quiet)

    def bring(url: str) -> None:
        if command == "migrate":
            migrate(source, url)
        else:
            restore(elsewhere / "backup", ServerData(elsewhere / "data", url), quiet)

    def copy_and_cut(found: Connection, target: Connection) -> dict[str, int]:
        counts = copy(found, target)
        if target.dialect.name != "sqlite":
            postgres_proxy.cut(when)
        return counts

    with monkeypatch.context() as cut:
        cut.setattr(rows, "copy", copy_and_cut)
        with pytest.raises(Unavailable) as caught:
            bring(postgres_proxy.url(empty_postgres_url))
    assert postgres_proxy.cuts == 1
    assert "It isn't known whether rows were stored" in str(caught.value.hint)
    if (command, when) == ("migrate", "after"):
        assert rows_of(empty_postgres_url) == before
    else:
        assert not any(rows_of(empty_postgres_url).values())
    bring(empty_postgres_url)
    assert rows_of(empty_postgres_url) == before
