"""core.files.memory: what is remembered of working directories, together, and what is found where it was forgotten."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from era.core.models import EMPTY, Snapshot
from era.core.totals import Bounds
from era.core.trees.edits import Changes, PutFile
from tests.conftest import eventually, opened
from tests.core.lab import SETTLE, Lab, Place
from tests.owners import mine

UNBOUND = 1 << 40


def filled(lab: Lab, entries: int) -> tuple[Place, Snapshot]:
    """A place with so many files, as it was taken."""
    place = lab.place()
    for number in range(entries):
        (place.workspace / f"f{number}").write_text(str(number))
    return place, lab.take(place)


def sizes(lab: Lab, *places: Place) -> list[int]:
    return [lab.snapshots.memories.size(place.id) for place in places]


def test_the_largest_is_forgotten_first_and_small_ones_never(lab: Lab) -> None:
    lab.snapshots.memories.most = 200
    small = [filled(lab, 20) for _ in range(3)]
    first, second = filled(lab, 80), filled(lab, 50)
    assert sizes(lab, first[0], second[0]) == [80, 50]
    third = filled(lab, 60)
    assert sizes(lab, first[0], second[0], third[0]) == [0, 50, 60]
    assert sizes(lab, *(place for place, _ in small)) == [20, 20, 20]
    assert lab.snapshots.memories.entries == 170
    for place, snapshot in [*small, first, second, third]:
        (place.workspace / "f7").write_text("changed")
        (place.workspace / "f8").unlink()
        assert lab.take(place, snapshot) == lab.from_scratch(place) != snapshot


@pytest.mark.parametrize("is_bounded", [True, False])
def test_what_is_remembered_stays_below_the_bound(lab: Lab, is_bounded: bool) -> None:
    lab.snapshots.memories.most = 300 if is_bounded else UNBOUND
    inotify = "anon_inode:inotify"
    before = opened(inotify)
    for _ in range(10):
        filled(lab, 100)
    assert lab.snapshots.memories.entries == (300 if is_bounded else 1000)
    assert eventually(lambda: opened(inotify) == before + (3 if is_bounded else 10)), "and so do watches"


@contextmanager
def stopped(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """The next batch waits: the first event says that it does, the second one lets it go on."""
    waits, goes_on = threading.Event(), threading.Event()
    real: Callable[[], Any] = lab.blobs.batch

    def batch() -> Any:
        monkeypatch.setattr(lab.blobs, "batch", real)
        waits.set()
        assert goes_on.wait(60)
        return real()

    monkeypatch.setattr(lab.blobs, "batch", batch)
    yield waits, goes_on
    goes_on.set()


def test_what_is_in_use_is_not_forgotten(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    memories = lab.snapshots.memories
    memories.most = 200
    place, snapshot = filled(lab, 150)
    known = memories.get(place.id)
    assert known is not None
    assert known.watch is not None
    (place.workspace / "f7").write_text("changed")
    others = [lab.place() for _ in range(4)]
    for other in others:
        for number in range(60):
            (other.workspace / f"f{number}").write_text("x")

    async def main() -> Snapshot:
        with stopped(lab, monkeypatch) as (waits, goes_on):
            taking = asyncio.create_task(lab.snapshots.take(place.sandbox, snapshot, session_id=mine("s")))
            await asyncio.to_thread(waits.wait, 60)
            for other in others:
                await lab.snapshots.take(other.sandbox, EMPTY, session_id=mine("s"))
                assert memories.get(place.id) is known
                assert memories.size(other.id) == 0, "all that isn't in use goes"
            goes_on.set()
            return await taking

    taken = asyncio.run(main())
    assert memories.size(place.id) == 150
    assert known.watch.works
    assert known.watch._fd >= 0
    (place.workspace / "f9").write_text("changed as well")
    assert lab.take(place, taken) == lab.from_scratch(place) != taken


def test_more_than_the_bound_goes_once_it_is_not_in_use(lab: Lab) -> None:
    memories = lab.snapshots.memories
    memories.most = 100
    with memories.in_use("sandbox1"), memories.in_use("sandbox2"):
        places = [filled(lab, 80)[0] for _ in range(2)]
        assert sizes(lab, *places) == [80, 80]
    assert sorted(sizes(lab, *places)) == [0, 80]


def uploaded(lab: Lab, name: str) -> Changes:
    """The change that a client makes who puts a file."""
    with lab.blobs.batch() as batch:
        digest = batch.put(b"put by a client")
    changes = Changes()
    changes.add((name,), PutFile(digest, 15, time.time_ns(), 0o644))
    return changes


@pytest.mark.parametrize("entries", [5, 80])
def test_a_forgotten_tree_in_which_nothing_has_changed_is_the_same(lab: Lab, entries: int) -> None:
    """Whom a file is from isn't seen on the disk."""
    place, snapshot = filled(lab, entries)
    (place.workspace / "d").mkdir()
    os.symlink("f1", place.workspace / "d" / "link")
    snapshot = lab.take(place, snapshot)
    snapshot = asyncio.run(lab.snapshots.edit(snapshot, uploaded(lab, "put"), lambda _: None, Bounds(), mine("s")))
    asyncio.run(lab.snapshots.restore(snapshot, place.sandbox, session_id=mine("s")))
    lab.snapshots.forget(place.id)

    time.sleep(SETTLE)
    assert lab.take(place, snapshot) == snapshot != lab.from_scratch(place)
    lab.snapshots.forget(place.id)
    written = (place.workspace / "put").stat()
    (place.workspace / "put").write_bytes(b"put by A client")
    os.utime(place.workspace / "put", ns=(written.st_mtime_ns, written.st_mtime_ns))
    assert lab.take(place, snapshot) == lab.from_scratch(place)


def test_where_the_snapshot_cant_be_read_all_files_are_kept_anyway(lab: Lab) -> None:
    place, snapshot = filled(lab, 40)
    assert snapshot.root is not None
    lab.snapshots.forget(place.id)
    Path(lab.blobs._path(snapshot.root)).write_bytes(b"damaged")
    (place.workspace / "new").write_text("new")
    taken = lab.take(place, snapshot)
    assert taken.file_count == 41
