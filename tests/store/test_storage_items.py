"""Storage by key, on a real database and real blobs."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import socket
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Coroutine
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from era.api.guest_api import MAX_HEAVY, MAX_REQUESTS, GuestStorage
from era.core.models import DEFAULT_OWNER
from era.core.storage import storage as storage_module
from era.core.storage.storage import INLINE_BYTES, ROW_BYTES, Kind, Namespaces, Storage
from era.core.trees.snapshots import Snapshots
from era.errors import CommitFailed, NotFound, TooLarge
from era.store.blobs.blobs import LocalBlobs
from era.store.d1.d1_databases import D1Databases
from era.store.metadata import SqlStore

KINDS: tuple[Kind, ...] = ("kv", "r2")
LONG = b"0123456789abcdef" * (INLINE_BYTES // 16 + 1)


class Lab:
    def __init__(self, directory: Path) -> None:
        self.store = SqlStore(f"sqlite:///{directory}/era.sqlite")
        self.blobs = LocalBlobs(directory / "blobs")
        self.databases = D1Databases(directory / "d1", 1 << 20)

    async def open(self, most_bytes: int = 1 << 30, owner: str = DEFAULT_OWNER) -> Namespaces:
        storage = Storage(self.store.storage_items, self.blobs, self.databases, most_bytes)
        await storage.open()
        return storage.of(owner)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without rows: to make one takes longer than most tests."""
    directory = tmp_path_factory.mktemp("empty")

    async def make() -> None:
        store = Lab(directory).store
        await store.open()
        await store.close()

    asyncio.run(make())
    return directory / "era.sqlite"


@pytest.fixture
async def lab(tmp_path: Path, empty: Path) -> AsyncIterator[Lab]:
    made = Lab(tmp_path)
    shutil.copy(empty, tmp_path)
    made.blobs.open()
    made.databases.open()
    await made.store.open()
    yield made
    await made.databases.close()
    await made.store.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [b"", b"short", LONG], ids=["empty", "short", "long"])
async def test_a_value_can_be_read_in_pieces(lab: Lab, kind: Kind, value: bytes) -> None:
    storage = await lab.open()
    await storage.put(kind, "a", "k", value, {"n": 1})
    item, found = await storage.open(kind, "a", "k")
    with closing(found):
        assert (item.size, item.metadata, found.size) == (len(value), {"n": 1}, len(value))
        await storage.delete(kind, "a", "k")
        lab.blobs.sweep(set(), time.time() + 1)
        assert await found.whole() == value
    with pytest.raises(NotFound):
        await storage.open(kind, "a", "k")


@pytest.mark.parametrize("is_sound", [True, False], ids=["", "weakened"])
async def test_values_that_are_open_are_no_memory(lab: Lab, is_sound: bool) -> None:
    storage = await lab.open()
    await storage.put("r2", "a", "k", bytes(4 << 20), None)
    tracemalloc.start()
    try:
        read = storage.open if is_sound else storage.get
        values = [await read("r2", "a", "k") for _ in range(4)]
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (held < 1 << 20) is is_sound
    assert len(values) == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [b"", b"short", LONG], ids=["empty", "short", "long"])
async def test_a_value_is_kept_replaced_and_deleted(lab: Lab, kind: Kind, value: bytes) -> None:
    storage = await lab.open()
    await storage.put(kind, "a", "k", value, {"n": 1})
    item, found = await storage.get(kind, "a", "k")
    assert (found, item.size, item.metadata) == (value, len(value), {"n": 1})
    await storage.put(kind, "a", "k", b"another", None)
    again, found = await storage.get(kind, "a", "k")
    assert (found, again.metadata, again.created_at) == (b"another", None, item.created_at)
    for elsewhere in (("kv" if kind == "r2" else "r2", "a", "k"), (kind, "b", "k"), (kind, "a", "K")):
        with pytest.raises(NotFound):
            await storage.get(*elsewhere)
    await storage.delete(kind, "a", "k")
    await storage.delete(kind, "a", "k")
    with pytest.raises(NotFound):
        await storage.get(kind, "a", "k")


async def test_keys_are_bytes_in_the_order_of_bytes(lab: Lab) -> None:
    storage = await lab.open()
    keys = ["a", "a/", "a/../b", "a/b", "aB", "ab", "a\n", "á", "€", "😀", ".", "..", "/", "%2F", "\x7f", "a\U0010ffff"]
    for key in keys:
        await storage.put("kv", "n", key, key.encode(), None)
    expected = sorted(keys, key=str.encode)
    found: list[str] = []
    after = None
    while True:
        page = await storage.page("kv", "n", prefix="", after=after, limit=3)
        found += [item.key for item in page.items]
        if not page.more:
            break
        after = found[-1]
    assert found == expected
    for prefix in ("a", "a/", "á", "\U0010ffff", "zz"):
        page = await storage.page("kv", "n", prefix=prefix, after=None, limit=100)
        assert [item.key for item in page.items] == [key for key in expected if key.startswith(prefix)]


async def test_the_bound_on_all_storage_outlives_a_restart(lab: Lab) -> None:
    storage = await lab.open(3 * (1000 + ROW_BYTES + 1))
    for key in "abc":
        await storage.put("kv", "n", key, bytes(1000), None)
    for one in (storage, await lab.open(3 * (1000 + ROW_BYTES + 1))):
        with pytest.raises(TooLarge) as caught:
            await one.put("r2", "n", "d", b"", None)
        assert caught.value.code == "storage_full"
        with pytest.raises(TooLarge):
            await one.sql("n", "CREATE TABLE t (x)", [], many=True)
    await storage.delete("kv", "n", "a")
    await storage.put("kv", "n", "d", bytes(1000), None)
    assert await storage.clear("kv", "n") == 3
    await storage.sql("n", "SELECT 1", [], many=False)
    assert (await storage.stats())["total"] == 0


async def test_a_put_that_fails_takes_no_room(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = await lab.open(INLINE_BYTES * 2)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("era.store.blobs.blobs._write", fail)
        for _ in range(5):
            with pytest.raises(CommitFailed):
                await storage.put("kv", "a", "k", LONG, None)
    with pytest.raises(NotFound):
        await storage.get("kv", "a", "k")
    await storage.put("kv", "a", "k", LONG, None)


@pytest.mark.parametrize("kind", KINDS)
async def test_long_values_survive_a_collection_of_garbage(lab: Lab, kind: Kind) -> None:
    storage = await lab.open()
    await storage.put(kind, "a", "kept", LONG, None)
    await storage.put(kind, "a", "gone", LONG + b"!", None)
    await storage.delete(kind, "a", "gone")
    old = time.time() - 10_000
    files = list(Path(lab.blobs._directory).glob("??/*"))
    assert len(files) == 2
    for path in files:
        os.utime(path, (old, old))
    snapshots = Snapshots(lab.blobs)
    assert await snapshots.collect_garbage(await lab.store.snapshot_roots(), await lab.store.output_digests()) == 1
    assert (await storage.get(kind, "a", "kept"))[1] == LONG
    # And were the rows not asked, this one would go too.
    assert await snapshots.collect_garbage([], []) == 1
    await snapshots.close()


async def test_resources_are_listed_page_by_page(lab: Lab) -> None:
    storage = await lab.open()
    await storage.sql("b", "CREATE TABLE two (x); CREATE TABLE one (x)", [], many=True)
    for kind in KINDS:
        for key in ("x1", "x2", "y"):
            await storage.put(kind, "a", key, b"123", None)
    every = [("d1", "b", "one"), ("d1", "b", "two")] + [(kind, "a", key) for kind in KINDS for key in ("x1", "x2", "y")]
    for limit in (1, 3, 100):
        found = []
        for offset in range(0, 9, limit):
            page, total = await storage.resources(None, None, prefix="", limit=limit, offset=offset)
            assert total == 8
            found += [(one["type"], one["namespace"], one["key"]) for one in page]
        assert found == every
    page, total = await storage.resources("kv", "a", prefix="x", limit=100, offset=1)
    assert (total, [one["key"] for one in page]) == (2, ["x2"])
    stats = await storage.stats()
    assert stats["by_type"] == {"kv": 3, "d1": 2, "r2": 3}
    assert stats["by_namespace"] == {"a": 6, "b": 2}


async def test_a_put_whose_caller_was_cancelled_is_counted(lab: Lab) -> None:
    storage = await lab.open()
    for _ in range(5):
        put = asyncio.create_task(storage.put("kv", "a", "k", b"v" * 1000, None))
        await asyncio.sleep(0)
        put.cancel()
        with pytest.raises(asyncio.CancelledError):
            await put
    await storage.put("kv", "a", "k", b"v" * 1000, None)  # the last of one writer's
    again = await lab.open()
    assert storage._storage.used(DEFAULT_OWNER) == again._storage.used(DEFAULT_OWNER) == 1000 + 1 + ROW_BYTES


async def shielded[T](work: Coroutine[Any, Any, T]) -> T:
    """The weakness: it goes on after its caller has gone, which gives back what was taken for it."""
    return await asyncio.shield(asyncio.create_task(work))


@pytest.mark.parametrize(
    ("size", "most"),
    [(1, MAX_REQUESTS), (700_000, MAX_REQUESTS), (1_500_000, MAX_HEAVY)],
    ids=["small", "large", "heavy"],
)
@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
async def test_a_program_that_hangs_up_keeps_its_slot_until_what_it_puts_is_there(
    lab: Lab, size: int, most: int, weakened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it could have any number of values put at a time, all of them in memory."""
    begun, began, goes_on = 0, asyncio.Semaphore(0), asyncio.Event()

    async def held(*_: object) -> None:
        nonlocal begun
        begun += 1
        began.release()
        await goes_on.wait()

    monkeypatch.setattr(Namespaces, "_put", held)
    if weakened:
        monkeypatch.setattr(storage_module, "to_its_end", shielded)
    storage = (await lab.open())._storage
    connect = GuestStorage(storage).for_run(DEFAULT_OWNER, "sandbox")
    body = json.dumps({"content": base64.b64encode(bytes(size)).decode()})
    headers = f"host: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    call = f"PUT /api/storage/r2/a/k HTTP/1.1\r\n{headers}\r\n\r\n{body}".encode()
    loop = asyncio.get_running_loop()
    ended = asyncio.Semaphore(0)
    for _ in range(20):
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        await loop.connect_accepted_socket(lambda: connect(ended.release), theirs)
        with closing(ours), suppress(TimeoutError):
            async with asyncio.timeout(0.3):  # what has no slot isn't read
                await loop.sock_sendall(ours, call)
                await began.acquire()
        with suppress(TimeoutError):
            await asyncio.wait_for(ended.acquire(), 0.3)  # nor is it noticed that it has gone
    goes_on.set()
    assert (begun > most) if weakened else (begun == most)
    await storage.close()


async def test_a_bucket_that_does_not_answer_keeps_only_a_few_of_one_owner_waiting(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = await lab.open()
    other = storage._storage.of("other")
    await storage.put("r2", "a", "k", LONG, None)
    await other.put("r2", "a", "k", LONG + b"!", None)
    answers, asked, began, loop = threading.Event(), [], asyncio.Semaphore(0), asyncio.get_running_loop()
    item, read = await lab.store.storage_items.item(DEFAULT_OWNER, "r2", "a", "k"), lab.blobs.get
    assert item is not None

    def stuck(name: str) -> bytes:
        asked.append(name)
        loop.call_soon_threadsafe(began.release)
        if name == item.digest:
            answers.wait(30)
        return read(name)

    monkeypatch.setattr(lab.blobs, "get", stuck)
    calls = [asyncio.create_task(storage.get("r2", "a", "k")) for _ in range(40)]
    try:
        for _ in range(4):
            await began.acquire()
        for call in calls[:2]:  # whose callers have gone: their threads aren't free yet
            call.cancel()
        async with asyncio.timeout(5):
            await asyncio.to_thread(int)
            assert (await other.get("r2", "a", "k"))[1] == LONG + b"!"
        assert len(asked) == 5
    finally:
        answers.set()
    assert [value for _, value in await asyncio.gather(*calls[2:])] == [LONG] * 38
    await storage._storage.close()
