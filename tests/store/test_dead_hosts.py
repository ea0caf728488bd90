"""What a host that was declared dead still writes of what all share: nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from era.core.cluster.homes import Host
from era.core.models import DEFAULT_OWNER
from era.core.storage.storage import Item
from era.errors import HostLost, SqlUnknown
from era.store.d1.d1_databases import D1Databases
from era.store.d1.d1_replicas import DatabaseReplicas
from era.store.engine.database import DatabaseAway
from era.store.metadata import SqlStore
from tests.store.d1 import run
from tests.store.rows import execute, opened

NAME = (DEFAULT_OWNER, "n")
ITEM = Item(DEFAULT_OWNER, "kv", "app", "k", 1, 0, 0, None, None, b"v")


@pytest.fixture
async def host(url: str) -> AsyncIterator[SqlStore]:
    async with opened(url, alone=False) as store:
        await (await store.homes()).join(Host("a", "http://a"), 3600)
        yield store


WRITES: dict[str, Callable[[SqlStore], Awaitable[object]]] = {
    "put": lambda store: store.storage_items.put_item(ITEM),
    "delete": lambda store: store.storage_items.delete_item(DEFAULT_OWNER, "kv", "app", "k"),
    "delete all": lambda store: store.storage_items.delete_items(DEFAULT_OWNER, "kv", "app", 10),
}


@pytest.mark.parametrize("write", WRITES)
async def test_items(host: SqlStore, url: str, write: str) -> None:
    await host.storage_items.put_item(ITEM)
    await WRITES[write](host)
    await host.storage_items.put_item(ITEM)
    execute(url, "UPDATE hosts SET dead = TRUE")
    with pytest.raises(HostLost):
        await WRITES[write](host)
    assert await host.storage_items.item(DEFAULT_OWNER, "kv", "app", "k") == ITEM


async def test_databases(host: SqlStore, url: str, tmp_path: Path) -> None:
    kept: DatabaseReplicas = await host.d1_databases()
    databases = D1Databases(tmp_path / "copies", 64 << 20, kept=kept)
    databases.open()
    await run(databases, *NAME, "CREATE TABLE t (n)", (), many=False, room=1 << 30)
    sizes = await kept.sizes()
    execute(url, "UPDATE hosts SET dead = TRUE")
    with pytest.raises(HostLost):
        await run(databases, *NAME, "INSERT INTO t VALUES (1)", (), many=False, room=1 << 30)
    with pytest.raises(HostLost):
        await kept.drop(NAME)
    assert await kept.sizes() == sizes
    await databases.close()


@pytest.mark.parametrize("was_stored", [True, False])
async def test_sql_that_may_be_stored_is_not_told_as_if_it_had_not_begun(
    host: SqlStore, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, was_stored: bool
) -> None:
    """Or clients send it again by themselves. The host is declared dead before it knows what its COMMIT came to."""
    kept = await host.d1_databases()
    databases = D1Databases(tmp_path / "copies", 64 << 20, kept=kept)
    databases.open()
    call = partial(run, databases, *NAME, params=(), many=False, room=1 << 30)
    await call("CREATE TABLE t (n)")
    write = kept._database._in_writer

    def cut_off(*args: Any, **how: Any) -> Any:
        if how["again"]:
            return write(*args, **how)
        if was_stored:
            write(*args, **how)
        execute(url, "UPDATE hosts SET dead = TRUE")
        raise DatabaseAway(may_have_committed=True)

    monkeypatch.setattr(kept._database, "_in_writer", cut_off)
    with nullcontext() if was_stored else pytest.raises(SqlUnknown):
        await call("INSERT INTO t VALUES (1)")
    assert (await call("SELECT n FROM t"))["results"] == ([{"n": 1}] if was_stored else [])
    await databases.close()
