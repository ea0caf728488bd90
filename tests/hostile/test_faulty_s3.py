"""Commits to an S3 blob store that fails: each request of a commit once, in every way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from era.core.metadata import Retention
from era.errors import CommitFailed, SandboxFailed, Unavailable
from era.store.blobs import s3_blobs
from era.store.blobs.s3_blobs import S3Blobs
from era.store.blobs.s3_client import Patience
from era.store.metadata import SqlStore
from tests.hostile.commits import Commits
from tests.owners import mine
from tests.soaking import soak_the_rest
from tests.store.s3 import S3, Fault, FaultyS3

ONCE = Patience(total=0.0, attempts=1, pause=0.02, requests=0, silence=20.0)
TWICE = replace(ONCE, total=20.0, attempts=2)
"""Time enough for a second attempt, however long a busy machine takes for the first."""

NERVOUS = replace(ONCE, silence=4.0)


class Stores:
    """Commits through the faulty server, and a direct view of the bucket."""

    def __init__(self, s3: S3, bucket: str, faulty: FaultyS3, directory: Path, patience: Patience) -> None:
        self.s3, self.bucket, self.directory = s3, bucket, directory
        self.blobs = self._blobs(faulty.endpoint, "cache", patience)
        self.plain = self._blobs(s3.endpoint, "plain", s3_blobs._PATIENCE)
        self.store = SqlStore(f"sqlite:///{directory / 'era.sqlite'}", Retention(versions=1))
        self.commits = Commits(self.store, self.blobs, directory / "workspace")

    def _blobs(self, endpoint: str, cache: str, patience: Patience) -> S3Blobs:
        url = self.s3.url(self.bucket, endpoint=endpoint)
        return S3Blobs(url, self.directory / cache, cache_bytes=64 << 20, owner="tests", patience=patience)

    async def __aenter__(self) -> Stores:
        self.blobs.open()
        self.plain.open()
        await self.store.open()
        await self.commits.create()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.blobs.close()
        self.plain.close()
        await self.commits.snapshots.close()
        await self.store.close()

    async def check(self) -> int:
        """Check the current version as a service with an empty cache finds it; returns its number."""
        self.plain._cache.clear()
        onlooker = Commits(self.store, self.plain, self.directory / "onlooker")
        version = (await onlooker.check(self.directory / "scratch")).version
        await onlooker.snapshots.close()
        return version

    async def check_no_orphans(self) -> None:
        """Check that after a collection no object is left that no row needs."""
        await self.commits.collect()
        names = {name.partition(".")[0] for name in self.s3.names(self.bucket)} - {"owner"}
        assert names == await self.commits.reachable()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files be uploaded in small parts, so that commits have many requests."""
    monkeypatch.setattr(s3_blobs, "PART", 400_000)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    "fault",
    soak_the_rest(["error", "error after", "half", "hang"], ["error after"]),
)
async def test_a_commit_that_fails_leaves_the_old_state(
    fault: Fault, s3: S3, bucket: str, faulty: FaultyS3, tmp_path: Path
) -> None:
    faulty.patience = NERVOUS.silence + 2
    async with Stores(s3, bucket, faulty, tmp_path, NERVOUS if fault == "hang" else ONCE) as stores:
        failures = 0
        for kind in (2, 5):  # the first commit, and one with a large file
            faulty.fail(None)
            while await stores.check() < kind - 1:
                await stores.commits.commit()
            n = 1
            while True:
                faulty.fail(fault, n)
                try:
                    await stores.commits.commit()
                except CommitFailed:
                    assert faulty.failed
                    failures += 1
                else:
                    break
                assert await stores.check() == kind - 1
                stores.blobs._uploaded.clear()  # Otherwise later attempts would skip what failed ones had uploaded.
                n += 1
            assert not faulty.failed
            assert await stores.check() == kind
            assert n > 5
        faulty.fail(None)
        assert failures > 12
        await stores.commits.commit()
        assert await stores.check() == 6
        await stores.check_no_orphans()


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("step", soak_the_rest([2, 1], 1))
@pytest.mark.parametrize("fault", soak_the_rest(["error", "half"], ["half"]))
async def test_a_single_failure_is_retried(
    fault: Fault, step: int, s3: S3, bucket: str, faulty: FaultyS3, tmp_path: Path
) -> None:
    """One failure at every request, or every second one, of commits, restores and collections in turn."""
    async with Stores(s3, bucket, faulty, tmp_path, TWICE) as stores:
        for n in range(1, 9, step):
            faulty.fail(fault, n)
            version = await stores.commits.commit()
            stores.blobs._cache.clear()
            await stores.commits.check(tmp_path / "again")
            assert await stores.commits.collect() > 0 or version == 2
            assert await stores.check() == version
        await stores.check_no_orphans()


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("fault", soak_the_rest(["error", "half"], ["half"]))
async def test_what_cannot_be_read_is_an_error_and_nothing_else(
    fault: Fault, s3: S3, bucket: str, faulty: FaultyS3, tmp_path: Path
) -> None:
    async with Stores(s3, bucket, faulty, tmp_path, ONCE) as stores:
        for _ in range(4):
            await stores.commits.commit()
        session = await stores.store.session(mine("s"))
        n, passed = 1, 0
        while passed < 3:  # What was fetched beside the one that failed may come into the cache after it was cleared.
            stores.blobs._cache.clear()
            faulty.fail(fault, n)
            try:
                await stores.commits.check(tmp_path / "again")
            except SandboxFailed:
                assert faulty.failed
                n, passed = n + 1, 0
            else:
                passed += 1
        assert n > 8
        faulty.fail(fault, 1)
        stores.blobs._cache.clear()
        with pytest.raises(Unavailable):
            await stores.commits.snapshots.entries(session.snapshot, mine("s"))
        faulty.fail(fault, 1)
        stores.blobs._cache.clear()
        with pytest.raises(Unavailable):
            await stores.commits.collect()
        assert await stores.check() == 5
