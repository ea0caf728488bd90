"""Collections of garbage by several hosts of a cluster in the bucket that they share, at any moment of each other's
commits: nothing that a row needs goes, and all the rest does in the end."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from era.core.cluster.homes import Host
from era.core.metadata import Retention
from era.store.blobs import s3_blobs
from era.store.blobs.condemned import Condemned
from era.store.blobs.s3_blobs import S3Blobs
from era.store.blobs.s3_client import Bucket, Listed
from era.store.homes import HomeRows
from era.store.metadata import SqlStore
from tests.hostile.test_garbage import Churn
from tests.owners import mine
from tests.soaking import soak_the_rest
from tests.store.s3 import S3

HOSTS = 3
LONG = 3600.0


class HostChurn(Churn):
    """The sessions of one host, which takes each before it runs, as for a call."""

    homes: HomeRows

    async def _create(self, name: str) -> None:
        await super()._create(name)
        await self.homes.take((await self.store.session(mine(name))).key)


@pytest.fixture(params=soak_the_rest(["sqlite", "postgresql"], ["postgresql"]))
def url(request: pytest.FixtureRequest, scratch: Path) -> str:
    """The URL of a database that hosts share."""
    if request.param == "sqlite":
        return f"sqlite:///{scratch / 'era.sqlite'}"
    return str(request.getfixturevalue("postgres_url"))


@asynccontextmanager
async def hosts(url: str, bucket_url: str, directory: Path) -> AsyncIterator[list[HostChurn]]:
    """Hosts with a store each on the same rows and the same bucket. What is older than every commit under way, of
    whatever host, may go."""
    async with AsyncExitStack() as stack:
        churns: list[HostChurn] = []
        under_way: dict[str, float] = {}
        for number in range(HOSTS):
            own = directory / f"host{number}"
            own.mkdir()
            store = SqlStore(url, Retention(versions=1), alone=False)
            stack.push_async_callback(store.close)
            await store.open()
            homes = await store.homes()
            await homes.join(Host(f"host{number}", "http://host"), LONG)
            blobs = S3Blobs(bucket_url, own / "cache", cache_bytes=100_000, owner="tests")
            blobs.open()
            stack.callback(blobs.close)
            blobs.share(store.condemned())
            churn = HostChurn(store, blobs, own)
            churn.homes = homes
            stack.push_async_callback(churn.snapshots.close)
            churn.commits_under_way = under_way
            churns.append(churn)
        yield churns


async def churn_for(churns: list[HostChurn], count: int, seed: int) -> set[str]:
    """Run two sessions and a collector at each host; returns the digests that rows need in the end."""
    collectors = [asyncio.create_task(churn.collector()) for churn in churns]
    try:
        async with asyncio.TaskGroup() as sessions:
            for at, churn in enumerate(churns):
                for number in range(2):
                    chance = random.Random(f"{seed} {at} {number}")
                    sessions.create_task(churn.session(f"s{at}{number}", count, chance))
    finally:
        for churn in churns:
            churn.done = True
        await asyncio.gather(*collectors)
    assert sum(churn.committed for churn in churns) > count
    assert sum(churn.swept for churn in churns) > count // 4, "there was something to race with"
    await churns[0].collect()
    return set(churns[0].snapshots.sizes_of(await churns[0].store.snapshot_roots()))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing counts as put lately, since what was put a second ago is old to these collections."""
    monkeypatch.setattr(s3_blobs, "_FRESH_SECONDS", 0.0)


@pytest.mark.parametrize("seed", soak_the_rest(range(6), 1))
@pytest.mark.usefixtures("impatient")
async def test_collections_of_hosts_race_commits(seed: int, url: str, s3: S3, bucket: str, scratch: Path) -> None:
    async with hosts(url, s3.url(bucket), scratch) as churns:
        needed = await churn_for(churns, 30, seed)
    assert set(s3.names(bucket)) - {"owner"} == needed


def look_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have collections see again what they saw first."""
    page, condemn = Bucket.page, Condemned.condemn
    last: dict[Bucket, tuple[str, Sequence[Listed]]] = {}

    def same_page(self: Bucket, after: str) -> Sequence[Listed]:
        if self in last and last[self][0] == after and last[self][1]:
            return last.pop(self)[1]
        last[self] = after, page(self, after)
        return last[self][1]

    def slowly(self: Condemned, *arguments: Any) -> Sequence[str]:
        time.sleep(0.1)
        return condemn(self, *arguments)

    monkeypatch.setattr(Bucket, "page", same_page)
    monkeypatch.setattr(Condemned, "condemn", slowly)


@pytest.mark.soak
@pytest.mark.parametrize("weak", ["puts don't look", "collections look once"])
@pytest.mark.usefixtures("impatient")
async def test_without_a_look_content_is_lost(
    weak: str, s3: S3, bucket: str, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if weak == "puts don't look":
        monkeypatch.setattr(s3_blobs, "confirm", lambda *_: None)
    else:
        look_once(monkeypatch)

    async def churn_until_found() -> None:
        for seed in range(20):  # which interleaving loses is chance
            directory = scratch / str(seed)
            directory.mkdir()
            place = s3.url(bucket, prefix=str(seed))
            async with hosts(f"sqlite:///{directory / 'era.sqlite'}", place, directory) as churns:
                needed = await churn_for(churns, 30, seed)
            assert set(s3.names(bucket, str(seed))) >= needed

    with pytest.raises((BaseExceptionGroup, AssertionError)):
        await churn_until_found()
