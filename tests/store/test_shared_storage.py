"""The quota of an owner's storage in a cluster: puts at several hosts at once get all that there is, and no more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from era.core.models import DEFAULT_OWNER
from era.core.quotas import Quotas
from era.core.storage import ROW_BYTES, Storage
from era.errors import QuotaReached
from era.store.blobs import LocalBlobs
from era.store.d1_databases import D1Databases
from era.store.metadata import SqlStore
from tests.store.rows import opened

HOSTS, PUTS, SIZE = 3, 90, 15_000
FIT = (1 << 20) // (SIZE + ROW_BYTES + len("k00"))


@pytest.fixture
async def hosts(url: str, tmp_path: Path) -> AsyncIterator[list[Storage]]:
    """Storages with a quota of 1 MiB for each owner."""
    async with AsyncExitStack() as stack:
        made = []
        for n in range(HOSTS):
            store: SqlStore = await stack.enter_async_context(opened(url, alone=False))
            quotas = Quotas(store.usage, {"storage_mb": 1}, lambda _: {})
            databases = D1Databases(tmp_path / f"d1-{n}", 1 << 20)
            blobs = LocalBlobs(tmp_path / "blobs")
            made.append(Storage(store.storage_items, blobs, databases, 1 << 30, quotas, is_shared=True))
        for storage in made:
            await storage.open()
        yield made


async def put(storage: Storage, number: int) -> bool:
    """Whether there was room."""
    try:
        await storage.of(DEFAULT_OWNER).put("kv", "app", f"k{number:02}", bytes(SIZE), None)
    except QuotaReached:
        return False
    return True


async def test_many_puts_at_once(hosts: list[Storage], url: str) -> None:
    assert FIT < PUTS
    done = await asyncio.gather(*(put(hosts[number % HOSTS], number) for number in range(PUTS)))
    assert sum(done) == FIT
    assert (await hosts[0].store.item_bytes())[DEFAULT_OWNER] <= 1 << 20


async def test_what_another_host_deletes_is_room(hosts: list[Storage], url: str) -> None:
    one, other, _ = hosts
    assert all([await put(one, number) for number in range(FIT)])
    assert not await put(one, PUTS)
    assert not await put(other, PUTS)
    await other.of(DEFAULT_OWNER).delete("kv", "app", "k00")
    assert await put(one, PUTS)
    assert not await put(other, PUTS + 1)
