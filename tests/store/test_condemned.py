"""Hosts that remove content from a bucket which they share: nothing that another one puts or names goes."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from inspect import unwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
from obstore import exceptions
from sqlalchemy import Connection, Delete, Update, bindparam, delete

from era.core import limits
from era.core.capsules.service import Capsules
from era.core.cluster.homes import Host
from era.core.metadata import MetadataStore, SetupJob
from era.core.models import DEFAULT_OWNER, EMPTY, NewCopy, Snapshot, Version, VersionContent, now
from era.core.operation.garbage import collect_unneeded
from era.core.setup.package_sets import InstalledPackageSets
from era.core.storage.storage import Item
from era.core.totals import Bounds
from era.core.trees import snapshots
from era.core.trees.edits import Changes, PutFile
from era.core.trees.pins import Pins
from era.core.trees.snapshots import Snapshots
from era.core.trees.spool import Slots
from era.errors import Fenced, HostLost, NotFound, Unavailable
from era.store import sessions
from era.store.blobs import condemned as rows
from era.store.blobs import s3_blobs, s3_client, s3_shared
from era.store.blobs.condemned import Condemned
from era.store.blobs.s3_blobs import S3Blobs
from era.store.blobs.s3_client import Bucket
from era.store.engine import tables
from era.store.homes import HomeRows
from era.store.metadata import SqlStore
from tests.conftest import eventually
from tests.core.lab import LIMITS
from tests.owners import mine
from tests.soaking import soak_the_rest
from tests.store.rows import ended, execute, new, opened
from tests.store.s3 import S3
from tests.store.test_homes import LONG, age

FUTURE = 3600.0


@pytest.fixture(params=soak_the_rest(["sqlite_url", "postgres_url"], ["postgres_url"]))
def url(request: pytest.FixtureRequest) -> str:
    """As elsewhere, but mostly with the database that clusters have: SQLite's rows are tried by other files."""
    return str(request.getfixturevalue(request.param))


@dataclass
class OneHost:
    """A host that shares the rows and the bucket with others."""

    store: SqlStore
    homes: HomeRows
    host: Host
    condemned: Condemned
    blobs: S3Blobs

    async def put(self, *contents: bytes) -> list[str]:
        return await asyncio.to_thread(put, self.blobs, *contents)

    async def sweep(self, keep: set[str] | None = None, older_than: float | None = None) -> int:
        """A collection for which all is old, unless it says otherwise."""
        before = time.time() + 60 if older_than is None else older_than
        return await asyncio.to_thread(self.blobs.sweep, keep or set(), before)


def put(blobs: S3Blobs, *contents: bytes) -> list[str]:
    with blobs.batch() as batch:
        return [batch.put(content) for content in contents]


type Join = Callable[[str], Awaitable[OneHost]]


@pytest.fixture
async def join(url: str, s3: S3, bucket: str, tmp_path: Path) -> AsyncIterator[Join]:
    """Makes a host of this name."""
    async with AsyncExitStack() as stack:

        async def joined(name: str) -> OneHost:
            store = await stack.enter_async_context(opened(url, alone=False))
            homes, host = await store.homes(), Host(name, f"http://{name}")
            await homes.join(host, LONG)
            blobs = S3Blobs(s3.url(bucket), tmp_path / name, cache_bytes=1 << 20, owner="tests")
            blobs.open()
            stack.callback(blobs.close)
            condemned = store.condemned()
            blobs.share(condemned)
            return OneHost(store, homes, host, condemned, blobs)

        yield joined


async def present(one: OneHost, digest: str) -> bool:
    return digest in await asyncio.to_thread(one.blobs.sizes)


async def test_what_nothing_needs_goes_and_the_rest_stays(join: Join) -> None:
    a, b = await join("a"), await join("b")
    garbage, kept = await b.put(b"garbage", b"kept")
    assert await a.sweep({kept}, time.time() - FUTURE) == 0, "it is young"
    assert await a.sweep({kept}) == 1
    assert (await present(a, garbage), await present(a, kept)) == (False, True)
    assert await a.sweep({kept}) == 0


async def test_large_content_goes_with_its_parts(
    join: Join, s3: S3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("era.store.blobs.s3_blobs.PART", 1 << 16)
    a = await join("a")
    (tmp_path / "large").write_bytes(os.urandom(300_000))

    def put_file() -> None:
        with (tmp_path / "large").open("rb", buffering=0) as file, a.blobs.batch() as batch:
            batch.put_file(file.fileno(), 300_000)

    await asyncio.to_thread(put_file)
    assert len(s3.names(bucket)) > 5
    assert await a.sweep() == 1
    assert s3.names(bucket) == ["owner"]


async def test_what_is_put_while_it_is_condemned_stays(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector has found it old, and is about to remove it."""
    a, b = await join("a"), await join("b")
    (digest,) = await a.put(b"content")
    begin, found = a.condemned.begin_removal, asyncio.Event()
    loop = asyncio.get_running_loop()

    def begin_late(*arguments: object) -> object:
        loop.call_soon_threadsafe(found.set)
        asyncio.run_coroutine_threadsafe(b.put(b"content"), loop).result()
        return begin(*arguments)  # type: ignore[arg-type]  # whatever it is given

    monkeypatch.setattr(a.condemned, "begin_removal", begin_late)
    assert await a.sweep() == 0
    assert found.is_set()
    assert await present(b, digest)


async def test_what_is_put_before_it_is_condemned_is_found_young(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = await join("a"), await join("b")
    (digest,) = await a.put(b"content")
    await asyncio.sleep(1.1)
    old, condemn = time.time() - 0.5, a.condemned.condemn
    loop = asyncio.get_running_loop()

    def condemn_late(*arguments: object) -> object:
        asyncio.run_coroutine_threadsafe(b.put(b"content"), loop).result()
        return condemn(*arguments)  # type: ignore[arg-type]  # whatever it is given

    monkeypatch.setattr(a.condemned, "condemn", condemn_late)
    assert await a.sweep(older_than=old) == 0
    assert await present(b, digest)


async def test_what_is_put_while_it_is_removed_is_put_again(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = await join("a"), await join("b")
    (digest,) = await a.put(b"content")
    signed, putting = a.blobs._bucket.signed_removals, []
    loop = asyncio.get_running_loop()

    def remove_late(remove: Callable[[], bool]) -> bool:
        putting.append(asyncio.run_coroutine_threadsafe(b.put(b"content"), loop))
        time.sleep(1.0)  # it was uploaded, and waits for the end of this
        return remove()

    monkeypatch.setattr(
        a.blobs._bucket,
        "signed_removals",
        lambda names, seconds: [lambda each=each: remove_late(each) for each in signed(names, seconds)],
    )
    assert await a.sweep() == 1
    assert await asyncio.wrap_future(putting[0]) == [digest]
    assert await present(b, digest)


async def test_what_a_lost_request_removes_late_is_put_again(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    """It got no answer, the next one did."""
    a, b = await join("a"), await join("b")
    (digest,) = await a.put(b"content")
    remove, lost = s3_client._delete, list[str]()

    def lose_first(url: str, seconds: float) -> None:
        if not lost:
            lost.append(url)
            raise exceptions.GenericError("error sending request")
        remove(url, seconds)

    monkeypatch.setattr(s3_client, "_delete", lose_first)
    monkeypatch.setattr(s3_shared, "_REMOVAL_SECONDS", 15.0)
    assert await a.sweep() == 1
    putting = asyncio.create_task(b.put(b"content"))
    assert await asyncio.to_thread(eventually, lambda: digest in a.blobs.sizes())
    await asyncio.to_thread(remove, lost[0], 9.0)
    assert await putting == [digest]
    assert await present(a, digest)


async def test_parts_stay_where_their_blob_could_not_be_removed(
    join: Join, s3: S3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would seem to be there (`renew`)."""
    a = await join("a")
    digest = "0" * 64
    for name in (digest, *(f"{digest}.{number}" for number in range(5))):
        await asyncio.to_thread(a.blobs._bucket.put, name, b"era parts 5")
    remove = s3_client._delete

    def refuse(url: str, seconds: float) -> None:
        if urlsplit(url).path.endswith(digest):
            raise exceptions.PermissionDeniedError("status: 403")
        remove(url, seconds)

    monkeypatch.setattr(s3_client, "_delete", refuse)
    with pytest.raises(OSError, match="403"):
        await a.sweep()
    assert len(s3.names(bucket)) == 1 + 6


async def test_what_was_put_lately_and_removed_since_is_put_again(join: Join) -> None:
    """This host wouldn't upload it again."""
    a, b = await join("a"), await join("b")
    (digest,) = await b.put(b"content")
    assert await a.sweep() == 1
    assert await b.put(b"content") == [digest]
    assert await present(a, digest)


async def test_what_is_in_no_cache_has_to_be_put_anew(join: Join) -> None:
    a, b = await join("a"), await join("b")
    (digest,) = await b.put(b"content")
    assert await a.sweep() == 1
    b.blobs._cache.clear()
    with pytest.raises(OSError, match="try again"):
        await b.put(b"content")
    assert await b.put(b"content") == [digest]
    assert await present(a, digest)


async def test_a_long_batch_keeps_what_it_put_first(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its end that is old, and no row names it yet."""
    a, b = await join("a"), await join("b")
    monkeypatch.setattr(s3_shared, "LONG_AGO_US", -1_000_000)
    (digest,) = await b.put(b"content")
    assert await a.sweep() == 0
    assert await present(a, digest)


async def test_a_killed_collection_holds_up_nobody_for_long(
    join: Join, monkeypatch: pytest.MonkeyPatch, s3: S3, bucket: str
) -> None:
    a, b = await join("a"), await join("b")
    contents = [b"content %d" % number for number in range(20)]
    digests = await a.put(*contents)
    monkeypatch.setattr(s3_shared, "_REMOVAL_SECONDS", 3.0)
    signed = a.blobs._bucket.signed_removals

    def die(remove: Callable[[], bool], digest: str) -> bool:
        if digest in digests[10:]:
            raise KeyError("as if it were killed")
        return remove()

    with monkeypatch.context() as patch:
        patch.setattr(
            a.blobs._bucket,
            "signed_removals",
            lambda names, seconds: [lambda each=each: die(each, names[0]) for each in signed(names, seconds)],
        )
        with pytest.raises(KeyError):
            await a.sweep()
    assert await b.put(contents[0], contents[19]) == [digests[0], digests[19]]
    assert await b.sweep({digests[0], digests[19]}) >= 1
    assert set(s3.names(bucket)) == {"owner", digests[0], digests[19]}


async def test_another_collection_takes_over_what_one_has_condemned(join: Join) -> None:
    a, b = await join("a"), await join("b")
    digests = await a.put(b"content")
    first = await asyncio.to_thread(a.condemned.begin_collection)
    assert await asyncio.to_thread(a.condemned.condemn, first, digests) == digests
    other = await asyncio.to_thread(b.condemned.begin_collection)
    assert await asyncio.to_thread(b.condemned.condemn, other, digests) == digests
    assert (await asyncio.to_thread(a.condemned.begin_removal, first, digests, 9.0))[0] == []
    assert (await asyncio.to_thread(b.condemned.begin_removal, other, digests, 9.0))[0] == digests
    assert await asyncio.to_thread(a.condemned.condemn, first, digests) == [], "it is being removed"


async def test_rows_of_what_is_gone_go_after_a_day(join: Join, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a = await join("a")
    await a.put(b"content")
    assert await a.sweep() == 1
    await a.sweep()
    assert execute(url, "UPDATE condemned SET gone_at = gone_at") == 1
    monkeypatch.setattr(rows, "_REMEMBERED_US", -1_000_000)
    await a.sweep()
    assert execute(url, "UPDATE condemned SET gone_at = gone_at") == 0


async def test_a_request_to_delete_is_good_for_a_while_only(join: Join, s3: S3, bucket: str) -> None:
    """What a paused collector still sends."""
    a = await join("a")
    (digest,) = await a.put(b"content")
    (late,) = a.blobs._bucket.signed_removals([digest], 1.0)
    await asyncio.sleep(2.5)
    with pytest.raises(OSError, match="403"):
        late()
    assert await present(a, digest)
    (in_time,) = a.blobs._bucket.signed_removals([digest], 60.0)
    in_time()
    assert not await present(a, digest)
    in_time()  # it is gone, as is wanted


async def test_nothing_goes_where_clocks_are_apart(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    a = await join("a")
    await a.put(b"content")
    monkeypatch.setattr(Bucket, "seconds_ahead", lambda *_: 200.0)
    with pytest.raises(OSError, match="200 seconds apart"):
        await a.sweep()


async def test_nothing_goes_once_a_clock_was_set(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests would be good for longer than puts wait."""
    a = await join("a")
    (digest,) = await a.put(b"content")
    ahead = iter([0.0, 200.0])
    monkeypatch.setattr(Bucket, "seconds_ahead", lambda *_: next(ahead))
    with pytest.raises(OSError, match="200 seconds apart"):
        await a.sweep()
    assert await present(a, digest)


def later(seconds: float) -> SimpleNamespace:
    """The module `time` of somebody who was paused for so long."""
    return SimpleNamespace(time=lambda: time.time() + seconds, monotonic=time.monotonic, sleep=time.sleep)


async def test_a_collection_that_was_paused_before_it_began_removes_nothing(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was kept when it read rows may not be any more."""
    a = await join("a")
    (digest,) = await a.put(b"content")
    begin = a.condemned.begin_collection

    def paused() -> rows.GarbageCollection:
        monkeypatch.setattr(s3_shared, "time", later(5 * 3600.0))
        return begin()

    monkeypatch.setattr(a.condemned, "begin_collection", paused)
    with pytest.raises(OSError, match="too long"):
        await a.sweep()
    assert await present(a, digest)


async def test_a_collection_that_was_paused_while_it_read_rows_leaves_what_was_put_before(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another host may have been paused, too, and names that content now."""
    a, b = await join("a"), await join("b")
    (digest,) = await b.put(b"content")

    class Paused(Pins):
        async def needed(self, store: MetadataStore) -> tuple[Sequence[str], Sequence[str]]:
            found = await super().needed(store)
            monkeypatch.setattr(a.blobs, "time", later(2 * 3600.0).time)
            return found

    assert await collect_unneeded(Snapshots(a.blobs), a.store, Paused()) == 0
    assert await present(a, digest)


async def test_content_that_is_held_stays(join: Join) -> None:
    a, b = await join("a"), await join("b")
    exported, garbage = await a.put(b"exported", b"garbage")
    hold = b.blobs.hold()
    await asyncio.to_thread(hold.everything)
    with pytest.raises(BlockingIOError):
        await a.sweep()
    await asyncio.to_thread(hold.only, [exported])
    assert await a.sweep() == 1
    assert (await present(a, exported), await present(a, garbage)) == (True, False)
    await asyncio.to_thread(hold.release)
    assert await a.sweep() == 1


async def test_what_another_host_exports_stays(join: Join, tmp_path: Path) -> None:
    """Its session is purged meanwhile."""
    a, b = await join("a"), await join("b")
    trees, content = Snapshots(a.blobs), os.urandom(50_000)
    changes = Changes()
    changes.add(("f",), PutFile(hashlib.sha256(content).hexdigest(), len(content), 0, None))
    snapshot = await trees.edit(
        EMPTY, changes, lambda batch: (batch.put(content), None)[1], limits.bounds(LIMITS), mine("s")
    )
    await a.store.create_session(new("s"))
    await a.store.commit(mine("s"), "files", data=None, snapshot=snapshot)
    no_packages = InstalledPackageSets(a.store, cast(Any, None))
    capsules = Capsules(a.store, trees, a.blobs, Pins(shared=True), no_packages, tmp_path, Slots(1), 9.0, Bounds())
    export = await capsules.open(mine("s"), history=True)
    try:
        await b.store.purge_session(mine("s"))
        assert await b.store.snapshot_roots() == []
        assert await b.sweep() == 0
        a.blobs._cache.clear()
        assert content in b"".join([chunk async for chunk in export.chunks()])
    finally:
        export.close()
        await capsules.close()
        await trees.close()
    assert await b.sweep() == 2


async def test_a_setup_keeps_the_package_set_that_it_found(join: Join) -> None:
    a, b = await join("a"), await join("b")
    (digest,) = await a.put(b"packages")
    session = await b.store.create_session(new("s", setup="{}"))
    await b.homes.take(session.key)
    collection = await asyncio.to_thread(a.condemned.begin_collection)
    await asyncio.to_thread(a.condemned.condemn, collection, [digest])
    job = SetupJob(session.key, mine("s"), "{}", None)
    assert await b.store.end_setup(job, status="completed", result="{}", package_set=digest)
    assert (await asyncio.to_thread(a.condemned.begin_removal, collection, [digest], 9.0))[0] == []
    assert await asyncio.to_thread(a.condemned.condemn, collection, [digest]) == [], "named since that collection began"


async def test_a_package_set_is_found_only_where_it_stays(join: Join) -> None:
    a, b = await join("a"), await join("b")
    found, removed = await a.put(b"found", b"removed")
    assert await asyncio.to_thread(b.blobs.renew, found)
    assert await a.sweep() == 1
    assert (await present(a, found), await present(a, removed)) == (True, False)
    assert not await asyncio.to_thread(b.blobs.renew, removed)


@asynccontextmanager
async def under_way(one: OneHost, job: Callable[[Connection], object]) -> AsyncIterator[None]:
    """Within the block a transaction of a host has done this, and isn't committed yet."""
    done, over = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(connection: Connection) -> None:
        job(connection)
        loop.call_soon_threadsafe(done.set)
        asyncio.run_coroutine_threadsafe(over.wait(), loop).result()

    writing = asyncio.create_task(one.store.database.write(slow))
    await done.wait()
    try:
        yield
    finally:
        over.set()
        await writing


async def test_a_copy_under_way_is_named_by_one_row_or_the_other(join: Join, url: str) -> None:
    """A collection that reads rows just then keeps what both sessions have."""
    if not url.startswith("postgresql"):
        pytest.skip("SQLite has one transaction at a time")
    a, b = await join("a"), await join("b")
    root = "0" * 64
    await a.store.create_session(new("s"))
    await a.store.commit(mine("s"), "files", data=None, snapshot=Snapshot(root, 1, 1))
    job = unwrap(SqlStore._copy)
    async with under_way(b, lambda connection: job(b.store, connection, NewCopy(mine("s"), "copy"), None)):
        purging = asyncio.create_task(a.store.purge_session(mine("s")))
        await asyncio.wait([purging], timeout=1.0)
        assert await a.store.snapshot_roots() == [root]
    await purging
    assert await a.store.snapshot_roots() == [root]


async def test_an_import_whose_purge_has_begun_is_not_completed(
    join: Join, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its host was paused, and whoever purged it was killed."""
    a, b = await join("a"), await join("b")
    session = await b.store.create_session(new("s"))
    monkeypatch.setattr("era.store.capsules._BATCH_ROWS", 3)
    inserted, over = threading.Event(), threading.Event()

    def versions() -> Iterator[VersionContent]:
        for n in range(1, 4):
            yield VersionContent(Version(n, now(), "create", None, EMPTY), "{}")
        inserted.set()
        over.wait()

    importing = asyncio.create_task(b.store.load(replace(session, id="copy", version=3), versions(), iter(())))
    await asyncio.to_thread(inserted.wait)
    age(url, "b", 1.1)
    await a.homes.beat(a.host)
    execute_one = sessions._execute

    def killed(connection: Connection, statement: Delete | Update, key: int) -> int:
        if statement is sessions._PURGE_KEY:
            raise KeyError("as if it were killed")
        return execute_one(connection, statement, key)

    with monkeypatch.context() as patch:
        first = delete(tables.versions).where(tables.versions.c.session_key == bindparam("session"))
        patch.setattr(sessions, "_PURGE_SOME", (first.where(tables.versions.c.n == 1),))
        patch.setattr(sessions, "_execute", killed)
        with pytest.raises(KeyError):
            await a.store.purge(now())
    over.set()
    with pytest.raises(Fenced):
        await importing
    with pytest.raises(NotFound):
        await a.store.session(mine("copy"))


async def test_a_dead_host_names_nothing_any_more(join: Join, url: str) -> None:
    """It was paused, and nobody has taken its sessions."""
    a, b = await join("a"), await join("b")
    session = await b.store.create_session(new("s"))
    await b.store.begin_run(mine("s"), "r1")
    at = now()
    item = Item(DEFAULT_OWNER, "kv", "n", "k", 9, at, at, None, "0" * 64, None)
    await b.store.storage_items.put_item(item)
    assert await a.store.fence_dead_hosts()
    age(url, "b", 1.1)
    assert not await a.store.fence_dead_hosts(), "nobody has declared it dead"
    with pytest.raises(Unavailable, match="hangs"):
        await no_patience(a)
    await a.homes.beat(a.host)
    assert await a.store.fence_dead_hosts()
    execute(url, "UPDATE runs SET status = 'running'")  # so that it is not for that that it is refused
    with pytest.raises(Fenced):
        await b.store.end_run(ended(session, "r1"), data="{}", snapshot=Snapshot("0" * 64, 1, 1))
    with pytest.raises(HostLost):
        await b.store.storage_items.put_item(item)
    assert (await a.homes.take(session.key)).host == a.host


async def no_patience(one: OneHost) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("era.core.operation.garbage._FENCE_PAUSE_SECONDS", 0.0)
        return await collect_unneeded(Snapshots(one.blobs), one.store, Pins())


async def test_a_dead_hosts_transaction_under_way_is_waited_for(
    join: Join, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it isn't cut off, as when PostgreSQL takes its time for that."""
    monkeypatch.setattr("era.store.homes.cut_off", lambda *_: None)
    if not url.startswith("postgresql"):
        pytest.skip("SQLite has one transaction at a time")
    a, b = await join("a"), await join("b")
    session = await b.store.create_session(new("s"))
    await b.homes.take(session.key)
    async with under_way(b, rows.check_alive):
        age(url, "b", 1.1)
        await a.homes.beat(a.host)
        assert not await a.store.fence_dead_hosts()
    assert await a.store.fence_dead_hosts()


async def test_a_transaction_that_hangs_is_waited_for(join: Join, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its host lives, and what it names was put before."""
    if not url.startswith("postgresql"):
        pytest.skip("SQLite has one transaction at a time")
    a, b = await join("a"), await join("b")
    async with under_way(b, rows.check_alive):
        assert await a.store.fence_dead_hosts()
        monkeypatch.setattr(rows, "_HANGS_SECONDS", 0.0)
        assert not await a.store.fence_dead_hosts()
    assert await a.store.fence_dead_hosts()


def test_times_leave_room() -> None:
    minute = 60 * 1_000_000
    assert s3_blobs._FRESH_SECONDS * 1e6 < rows.LONG_AGO_US
    assert rows.LONG_AGO_US + 20 * minute <= snapshots._GRACE_SECONDS * 1e6, "a commit has 20 minutes at least"
    assert s3_shared._LONGEST_SECONDS * 1e6 + 60 * minute < rows._KEPT_US < rows.RELY_US < rows._REMEMBERED_US
    assert s3_shared._SIGNED_SECONDS + s3_shared._APART_SECONDS < s3_shared._REMOVAL_SECONDS
