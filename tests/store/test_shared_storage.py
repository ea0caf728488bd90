"""What is counted of storage that others change, too, or whose commit had no answer: quotas and the bound on all of it
let in all that there is room for, and no more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from era.core.models import DEFAULT_OWNER
from era.core.owners.quotas import Quotas
from era.core.storage import storage as counting
from era.core.storage.storage import ROW_BYTES, Item, Storage
from era.errors import QuotaReached, TooLarge, Unavailable
from era.store.blobs.blobs import LocalBlobs
from era.store.d1.d1_databases import D1Databases
from era.store.metadata import SqlStore
from tests.store.postgres_proxy import PostgresProxy, postgres_proxy
from tests.store.rows import opened

__all__ = ["postgres_proxy"]

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


EACH = SIZE + ROW_BYTES + len("k00")


@pytest.fixture
def counts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there may be counted as often as it is asked for."""
    monkeypatch.setattr(counting, "_RECOUNT_SECONDS", 0)
    monkeypatch.setattr(counting, "_COUNT_PART", 0)


async def without_quotas(of: Storage, most_bytes: int, *, is_shared: bool = True) -> Storage:
    storage = Storage(of.store, of.blobs, of.databases, most_bytes, is_shared=is_shared)
    await storage.open()
    return storage


@pytest.mark.usefixtures("counts_at_once")
async def test_what_comes_by_one_host_and_goes_by_another_shuts_nobody_out(hosts: list[Storage], url: str) -> None:
    one, other = [await without_quotas(host, 10 * EACH) for host in hosts[:2]]
    for number in range(25):
        assert await put(one, number)
        await other.of(DEFAULT_OWNER).delete("kv", "app", f"k{number:02}")
        assert other.used(DEFAULT_OWNER) == 0, "less than nothing"
    await one.of("neighbour").put("kv", "app", "k00", bytes(SIZE), None)
    await one.of("neighbour").delete("kv", "app", "k00")
    for number in range(10):
        assert await put(other, number)
    with pytest.raises(TooLarge, match="full"):
        await put(other, 10)
    await one.count_again(0)
    assert one.used(DEFAULT_OWNER) == other.used(DEFAULT_OWNER) == 10 * EACH
    with pytest.raises(TooLarge, match="full"):
        await put(one, 10)


async def test_it_is_not_counted_more_often_than_now_and_then(
    hosts: list[Storage], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = 0
    storage = await without_quotas(hosts[0], EACH)
    item_bytes = storage.store.item_bytes

    async def counted(owner: str | None = None) -> Mapping[str, int]:
        nonlocal counts
        counts += 1
        return await item_bytes(owner)

    monkeypatch.setattr(storage.store, "item_bytes", counted)
    assert await put(storage, 0)
    for _ in range(5):
        await storage.count_again()
        with pytest.raises(TooLarge):
            await put(storage, 1)
    assert counts == 0
    monkeypatch.setattr(counting, "_RECOUNT_SECONDS", 0)
    storage._counted_for = 10.0  # seconds
    with pytest.raises(TooLarge):
        await put(storage, 1)
    assert counts == 0


@pytest.mark.usefixtures("counts_at_once")
@pytest.mark.parametrize("is_stored", [False, True])
async def test_what_is_put_while_it_is_counted_counts_once(
    hosts: list[Storage], url: str, is_stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = await without_quotas(hosts[0], 10 * EACH)
    put_item, began, goes_on = storage.store.put_item, asyncio.Event(), asyncio.Event()

    async def paused(item: Item, most: int | None = None) -> int:
        freed = await put_item(item, most) if is_stored else None
        began.set()
        await goes_on.wait()
        return await put_item(item, most) if freed is None else freed

    monkeypatch.setattr(storage.store, "put_item", paused)
    putting = asyncio.create_task(put(storage, 0))
    await began.wait()
    count = asyncio.create_task(storage.count_again(0))
    await asyncio.sleep(0.2)
    assert storage.used(DEFAULT_OWNER) == EACH
    goes_on.set()
    assert await putting
    await count
    assert storage.used(DEFAULT_OWNER) == EACH


@pytest.mark.usefixtures("counts_at_once")
@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_what_had_no_answer_is_counted_again(
    postgres_url: str, postgres_proxy: PostgresProxy, tmp_path: Path, when: str, is_shared: bool
) -> None:
    async with opened(postgres_proxy.url(postgres_url), alone=not is_shared) as store:
        databases = D1Databases(tmp_path / "d1", 1 << 20)
        storage = Storage(
            store.storage_items, LocalBlobs(tmp_path / "blobs"), databases, 10 * EACH, is_shared=is_shared
        )
        await storage.open()
        assert await put(storage, 0)
        postgres_proxy.cut(when)
        with pytest.raises(Unavailable, match="whether it did is not known"):
            await put(storage, 1)
        assert storage.used(DEFAULT_OWNER) == 2 * EACH, "what may be stored isn't counted"
        assert await put(storage, 2)
        assert storage.used(DEFAULT_OWNER) == (3 if when == "after" else 2) * EACH
        postgres_proxy.cut(when)
        with pytest.raises(Unavailable, match="whether it did is not known"):
            await storage.of(DEFAULT_OWNER).delete("kv", "app", "k00")
        assert await put(storage, 3)
        there = (await store.storage_items.item_bytes())[DEFAULT_OWNER]
        assert storage.used(DEFAULT_OWNER) == there == 3 * EACH
        assert postgres_proxy.cuts == 2
