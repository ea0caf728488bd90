"""Garbage collections at any moment: nothing that a row needs goes, and all the rest does in the end."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from era.core.metadata import Retention
from era.core.models import EMPTY, NewSession, RunRecord, now
from era.core.trees.snapshots import Snapshots
from era.store.blobs.blobs import LocalBlobs
from era.store.blobs.s3_blobs import S3Blobs
from era.store.metadata import SqlStore
from tests.hostile.commits import Commits, FakeSandbox, fill, read
from tests.owners import mine
from tests.soaking import soak_the_rest
from tests.store.s3 import S3

NOTHING = "there was nothing to race with"
POOL = 12
"""How many contents sessions choose from, so that garbage of one is soon put by another."""


class Churn:
    """Sessions that commit, fail, are deleted and made anew, while garbage is collected without a grace period except
    for commits under way."""

    def __init__(self, store: SqlStore, blobs: LocalBlobs | S3Blobs, directory: Path) -> None:
        self.store, self.blobs, self.directory = store, blobs, directory
        self.snapshots = Snapshots(blobs, grace_seconds=0.0)
        self.commits_under_way: dict[str, float] = {}
        self.swept = 0
        self.committed = 0
        self.done = False

    async def session(self, name: str, count: int, chance: random.Random) -> None:
        """Make `count` changes to a session, each commit, failure, restore or deletion by chance."""
        place = FakeSandbox(self.directory / name)
        await self._create(name)
        for number in range(count):
            files = {f"f{i}": b"%d" % chance.randrange(POOL) * 50 for i in range(chance.randrange(5))}
            files |= {f"d/{chance.randrange(3)}": b"%d" % chance.randrange(POOL)} if chance.random() < 0.5 else {}
            action = chance.random()
            if action < 0.08:
                await self.store.delete_session(mine(name))
                self.snapshots.forget(place.id)
                await self._create(name)
                fill(place.workspace, {})
            elif action < 0.2:
                await self._restore(name, place)
            else:
                await self._commit(name, f"{name} {number}", place, files, fails=action < 0.35)
        await self._restore(name, place)

    async def _create(self, name: str) -> None:
        await self.store.create_session(
            NewSession(mine(name), "python", True, json.dumps({}), {}, False, False, default_timeout=1.0)
        )

    async def _commit(
        self, name: str, run_id: str, place: FakeSandbox, files: dict[str, bytes], *, fails: bool
    ) -> None:
        session = await self.store.begin_run(mine(name), run_id)
        fill(place.workspace, files)
        self.commits_under_way[name] = time.time()
        try:
            with self.blobs.naming():
                snapshot = await self.snapshots.take(place.sandbox, session.snapshot, session_id=mine("s"))
                if fails:
                    self.snapshots.forget(place.id)
                    return
                data = json.dumps({path: content.decode() for path, content in files.items()})
                record = RunRecord(run_id, session.key, "ok", started_at=now(), committed=True)
                await self.store.end_run(replace(record), data=data, snapshot=snapshot)
                self.committed += 1
        finally:
            del self.commits_under_way[name]

    async def _restore(self, name: str, place: FakeSandbox) -> None:
        """Check that the files of the snapshot are those that the row lists."""
        session = await self.store.session(mine(name))
        self.snapshots.forget(place.id)
        fill(place.workspace, {})
        for path in place.workspace.iterdir():
            path.rmdir()
        if session.snapshot != EMPTY:
            await self.snapshots.restore(session.snapshot, place.sandbox, session_id=mine("s"))
        expected = {path: text.encode() for path, text in json.loads(session.data).items()}
        assert read(place.workspace) == expected

    async def collector(self) -> None:
        """Collect garbage until the churn is over."""
        while not self.done:
            self.swept += await self.collect()

    async def collect(self) -> int:
        """Collect garbage but for that of commits under way; returns how many blobs went."""
        horizon = min([time.time(), *self.commits_under_way.values()])
        if isinstance(self.blobs, LocalBlobs):  # it knows that itself
            horizon = self.snapshots.sweepable_before()
        roots = await self.store.snapshot_roots()

        def job() -> int:
            return self.blobs.sweep(set(self.snapshots.sizes_of(roots)), horizon)

        try:
            return await asyncio.to_thread(job)
        except FileNotFoundError:
            # A snapshot that was replaced or deleted since the roots were read, swept by the other collector.
            assert set(roots) - set(await self.store.snapshot_roots())
            return 0


@asynccontextmanager
async def churning(blobs: LocalBlobs | S3Blobs, directory: Path) -> AsyncIterator[Churn]:
    """A `Churn` on these blobs, and a new database."""
    blobs.open()
    store = SqlStore(f"sqlite:///{directory / 'era.sqlite'}", Retention(versions=1))
    await store.open()
    churn = Churn(store, blobs, directory)
    try:
        yield churn
    finally:
        churn.done = True
        await churn.snapshots.close()
        blobs.close()
        await store.close()


async def churn_for(churn: Churn, count: int, seed: int) -> set[str]:
    """Run four sessions and two collectors; returns the digests that rows need in the end."""
    collectors = [asyncio.create_task(churn.collector()) for _ in range(2)]
    try:
        async with asyncio.TaskGroup() as sessions:
            for number in range(4):
                sessions.create_task(churn.session(f"s{number}", count, random.Random(f"{seed} {number}")))
    finally:
        churn.done = True
        await asyncio.gather(*collectors)
    assert churn.committed > count
    assert churn.swept > count // 4, NOTHING
    await churn.collect()
    return set(churn.snapshots.sizes_of(await churn.store.snapshot_roots()))


MANY = 20


@pytest.fixture(autouse=True)
def _exact_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scratch directory is in memory, where files' times are exact. Else nothing would be old enough to be swept in
    the seconds that these tests take."""
    monkeypatch.setattr("era.store.blobs.blobs._ROUGHNESS", 0.0)


@pytest.mark.parametrize("seed", soak_the_rest(range(20), 1))
async def test_collections_race_commits_on_the_disk(seed: int, scratch: Path) -> None:
    async with churning(LocalBlobs(scratch / "blobs"), scratch) as churn:
        needed = await churn_for(churn, 300, seed)
    assert {path.name for path in (scratch / "blobs").rglob("*") if path.is_file()} == needed


@pytest.mark.parametrize("seed", soak_the_rest(range(6), 1))
async def test_collections_race_commits_in_a_bucket(seed: int, s3: S3, bucket: str, scratch: Path) -> None:
    blobs = S3Blobs(s3.url(bucket), scratch / "cache", cache_bytes=100_000, owner="tests")
    async with churning(blobs, scratch) as churn:
        needed = await churn_for(churn, 40, seed)
    assert set(s3.names(bucket)) - {"owner"} == needed


async def test_a_put_that_does_not_protect_its_content_fails_these_tests(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a store whose puts don't renew the time of a blob that exists."""
    monkeypatch.setattr(LocalBlobs, "_reuse", lambda self, digest: True if os.path.exists(self._path(digest)) else None)
    monkeypatch.setattr("era.store.blobs.blobs._ROUGHNESS", -1e9)  # and whose batches under way protect nothing
    await fails(scratch)


async def test_a_store_that_is_not_told_what_is_to_be_named_fails_these_tests(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalBlobs, "naming", lambda self: nullcontext())
    await fails(scratch)


async def fails(scratch: Path) -> None:
    """Assert that something is lost."""

    async def churn_until_found() -> None:
        for seed in range(MANY):  # which interleaving loses is chance; most seeds do
            directory = scratch / str(seed)
            directory.mkdir()
            async with churning(LocalBlobs(directory / "blobs"), directory) as churn:
                await churn_for(churn, 300, seed)

    with pytest.raises((BaseExceptionGroup, AssertionError)) as found:
        await churn_until_found()
    assert NOTHING not in str(found.value)


@pytest.mark.parametrize("kills", soak_the_rest([3, 8], 1))
async def test_kill_9_in_a_collection_or_a_batch(kills: int, scratch: Path) -> None:
    """Of a process that commits and collects all the time."""
    chance = random.Random(7)
    data, version = scratch / "disk" / "data", 1
    (scratch / "disk").mkdir()
    for _ in range(kills):
        command = [sys.executable, "-m", "tests.hostile.workload", str(scratch / "disk"), "100000"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "created\n"
        said = "".join(process.stdout.readline() for _ in range(8))  # four commits, however slow the machine is
        time.sleep(chance.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        said += process.stdout.read()
        process.wait()
        process.stdout.close()
        assert "failed" not in said
        last = max([version, *(int(line.split()[1]) for line in said.split("\n")[:-1] if line.startswith("committed"))])

        blobs = LocalBlobs(data / "blobs")
        blobs.open()
        store = SqlStore(f"sqlite:///{data / 'era.sqlite'}", Retention(versions=1))
        await store.open()
        commits = Commits(store, blobs, scratch / "workspace")
        version = (await commits.check(scratch / "scratch")).version
        assert last <= version <= last + 1
        await commits.collect()
        assert {path.name for path in (data / "blobs").rglob("*") if path.is_file()} == await commits.reachable()
        await commits.snapshots.close()
        await store.close()
    assert version > 10


async def test_a_collection_sweeps_only_after_changes(scratch: Path) -> None:
    blobs = LocalBlobs(scratch / "blobs")
    blobs.open()
    store = SqlStore(f"sqlite:///{scratch / 'era.sqlite'}", Retention(versions=1))
    await store.open()
    commits = Commits(store, blobs, scratch / "workspace")
    swept: list[int] = []
    real = blobs.sweep

    def sweep(keep: set[str], older_than: float) -> int:
        swept.append(real(keep, older_than))
        return swept[-1]

    blobs.sweep = sweep  # type: ignore[method-assign]
    await commits.create()
    await commits.commit()
    await commits.commit()
    await commits.collect()
    for _ in range(3):
        assert await commits.collect() == 0
    assert swept == [5]
    await commits.commit()
    await commits.collect()
    await store.purge_session(mine("s"))
    assert await commits.collect() == 8
    assert len(swept) == 3
    await commits.snapshots.close()
    await store.close()
