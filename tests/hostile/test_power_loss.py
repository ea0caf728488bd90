"""Power cuts: whatever was acknowledged is there afterwards, data and files together, and the service starts.

What was really made durable is derived from a record of a process's system calls; see power.py. The same record with
some of its syncs left out must fail, or these tests would prove nothing.
"""

from __future__ import annotations

import asyncio
import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from era.core.metadata import Retention
from era.errors import EraError, NotFound
from era.store.blobs.blobs import LocalBlobs, make_directory
from era.store.metadata import SqlStore
from tests.hostile.commits import Commits
from tests.hostile.power import Disk, Event, record, workload

_PARTS = 16
VARIANTS: tuple[Literal["synced", "all", "some"], ...] = ("synced", "some", "some", "all")


@dataclass
class Recorded:
    """The record of a process that commits."""

    events: Sequence[Event]

    def without_syncs(self, path: str) -> Recorded:
        """The record of a process that doesn't sync the paths that `path` matches."""
        left_out = re.compile(path)
        kept = [event for event in self.events if not (event.kind == "sync" and left_out.fullmatch(event.path))]
        assert len(kept) < len(self.events)
        return Recorded(kept)

    def cuts(self, how_many: int, chance: random.Random) -> list[int]:
        """Moments for a power cut: mostly around syncs, renames and output, where it matters."""
        matter = [at for at, event in enumerate(self.events) if event.kind in ("sync", "sync all", "said", "rename")]
        around = sorted({at + 1 for at in matter} | set(matter))
        begun = next(at for at, event in enumerate(self.events) if event.kind == "said")
        early = [at for at in around if at < begun]
        late = [at for at in around if at >= begun]
        if how_many >= len(around):
            return around
        return sorted(chance.sample(early, min(len(early), how_many // 8)) + chance.sample(late, how_many * 7 // 8))


@pytest.fixture(scope="module")
def recorded(strace: None, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    directory = tmp_path_factory.mktemp("recorded") / "disk"
    directory.mkdir()
    return Recorded(record(directory, workload(directory, 14), directory.parent / "trace"))


async def look(data: Path, acknowledged: int | None, begun: int) -> None:
    """Open the stores as the service does at its start, and check that nothing acknowledged is missing."""
    make_directory(data)
    blobs = LocalBlobs(data / "blobs")
    blobs.open()
    store = SqlStore(f"sqlite:///{data / 'era.sqlite'}", Retention(versions=1))
    try:
        await store.open()
        await store.mark_lost()
        commits = Commits(store, blobs, data.parent / "workspace")
        try:
            session = await commits.check(data.parent / "scratch")
        except NotFound:
            assert acknowledged is None, "the session is gone"
            await commits.create()
        else:
            assert acknowledged is None or acknowledged <= session.version <= begun
        await commits.commit()
        await commits.check(data.parent / "scratch")
        await commits.collect()
        assert {path.name for path in (data / "blobs").rglob("*") if path.is_file()} == await commits.reachable()
        await commits.snapshots.close()
    finally:
        await store.close()


def cut(recorded: Recorded, cuts: Sequence[int], seed: int, scratch: Path, variants: Sequence[str] = VARIANTS) -> int:
    """Cut the power before these events and check each possible disk; returns how many were checked. Fails where one is
    wrong."""
    chance = random.Random(seed)
    disk = Disk()
    moments = set(cuts)
    acknowledged, begun, looked_at = None, 1, 0
    for at, event in enumerate(recorded.events):
        if at in moments:
            for variant in variants:
                target = scratch / f"disk{at}"
                target.mkdir()
                disk.rebuild(target / "root", variant, chance)  # type: ignore[arg-type]
                try:
                    asyncio.run(look(target / "root" / "data", acknowledged, begun))
                except (EraError, OSError, AssertionError) as error:
                    raise AssertionError(f"power cut before event {at}, {event}, disk {variant!r}") from error
                shutil.rmtree(target)
                looked_at += 1
        if event.kind != "said":
            disk.carry_out(event)
        elif event.path == "created":
            acknowledged = 1
        elif event.path == "begin":
            begun = (acknowledged or 1) + 1
        else:
            assert event.path.startswith("committed ")
            acknowledged = int(event.path.split()[1])
    return looked_at


def test_the_record_is_complete(recorded: Recorded) -> None:
    said = [event.path for event in recorded.events if event.kind == "said"]
    assert said[0] == "created"
    assert said[-1] == "committed 15"
    kinds = {event.kind for event in recorded.events}
    assert kinds >= {"make", "write", "truncate", "sync", "sync all", "rename", "unlink", "mkdir"}
    checkpoints = [event for event in recorded.events if event.kind == "sync" and event.path == "data/era.sqlite"]
    assert len(checkpoints) > 2


def test_a_power_cut_loses_nothing_acknowledged(recorded: Recorded, scratch: Path) -> None:
    assert cut(recorded, recorded.cuts(8, random.Random(1)), 1, scratch, ("synced", "some", "all")) > 20


@pytest.mark.soak
@pytest.mark.parametrize("part", range(_PARTS))
def test_a_power_cut_at_any_moment_loses_nothing_acknowledged(part: int, recorded: Recorded, scratch: Path) -> None:
    assert cut(recorded, recorded.cuts(10**9, random.Random())[part::_PARTS], part, scratch) > 100


@pytest.mark.parametrize(
    "careless",
    [
        pytest.param("data/blobs/incoming/.*", id="of content"),
        pytest.param("data/blobs/[0-9a-f]{2}", id="of names"),
        pytest.param("data/blobs", id="of directories of names"),
        pytest.param("data/era.sqlite-wal", id="of rows"),
        pytest.param("data", id="of the blobs' directory", marks=pytest.mark.soak),
        pytest.param("", id="of the data directory", marks=pytest.mark.soak),
    ],
)
def test_a_process_without_some_syncs_fails_these_tests(careless: str, recorded: Recorded, scratch: Path) -> None:
    careless_one = recorded.without_syncs(careless)
    with pytest.raises(AssertionError, match="power cut before event"):
        cut(careless_one, careless_one.cuts(60, random.Random(3)), 3, scratch, ("synced",))


def test_a_run_that_nobody_has_heard_of_is_recorded_without_a_sync(recorded: Recorded) -> None:
    """Every second run, from the first on: its log is written to before its files are, and synced only after."""
    syncs, counts = 0, []
    for event in recorded.events:
        if event.kind == "said" and event.path == "begin":
            syncs = 0
        elif event.kind == "said" and event.path.startswith("committed"):
            counts.append(syncs)
        elif event.kind == "sync" and event.path == "data/era.sqlite-wal":
            syncs += 1
    without, with_one = counts[2::2], counts[1::2]
    assert min(without) < min(with_one)
