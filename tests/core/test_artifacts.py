"""Which of a session's files are artifacts of a run, and what that costs."""

from __future__ import annotations

import asyncio
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from era.core.models import EMPTY
from era.core.trees import diffs
from era.core.trees.diffs import FileChange, written_files
from era.errors import CommitFailed
from tests.core.lab import Lab, described, mutate
from tests.owners import mine
from tests.soaking import soak_the_rest


@pytest.mark.parametrize("seed", soak_the_rest(range(5), 2))
def test_what_was_written_is_what_is_new_or_has_another_time_or_content(tmp_path: Path, seed: int) -> None:
    lab, chance = Lab(tmp_path), random.Random(seed)
    place, snapshot = lab.place(), EMPTY
    before: dict[bytes, tuple[Any, ...]] = {}
    for _ in range(40):
        for _ in range(chance.randrange(4)):
            mutate(place.workspace, chance)
        after = described(place.workspace)
        taken = lab.take(place, snapshot)
        expected = set()
        for path, (kind, *rest) in after.items():
            was = before.get(path, ("nothing",))
            if kind == "file" and (was[0] != "file" or (was[1], was[3]) != (rest[0], rest[2])):
                expected.add((os.fsdecode(path), len(rest[0])))
        found = list(written_files(lab.snapshots.read_tree, snapshot.root, taken.root))
        assert {(change.path, change.size) for change in found} == expected
        assert len(found) == len(expected)
        snapshot, before = taken, after


def test_a_run_that_changes_nothing_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(tmp_path)
    place = lab.place()
    (place.workspace / "a.png").write_bytes(b"1")
    first = lab.take(place)
    (place.workspace / "b.png").write_bytes(b"22")
    second = lab.take(place, first)
    expected = {"files": [{"type": "image/png", "path": "b.png", "size": 2}], "more": 0}
    assert asyncio.run(lab.snapshots.artifacts(first, second, mine("s"))) == expected

    def get(digest: str) -> bytes:
        raise OSError(5, "the disk fails")

    monkeypatch.setattr(lab.blobs, "get", get)
    assert asyncio.run(lab.snapshots.artifacts(second, lab.take(place, second), mine("s"))) == {}
    with pytest.raises(CommitFailed, match="the disk fails"):
        asyncio.run(lab.snapshots.artifacts(first, second, mine("s")))


def test_removed_directories_are_not_read(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    place = lab.place()
    (place.workspace / "gone").mkdir()
    (place.workspace / "gone" / "a.png").write_bytes(b"1")
    first = lab.take(place)
    lost = first.root and {entry[1]: entry for entry in lab.snapshots.read_tree(first.root)}["gone"][2]
    (place.workspace / "gone" / "a.png").unlink()
    (place.workspace / "gone").rmdir()
    (place.workspace / "gone").write_bytes(b"a file now")
    second = lab.take(place, first)

    def read(digest: str) -> list[Any]:
        assert digest != lost
        return lab.snapshots.read_tree(digest)

    assert [change.path for change in written_files(read, first.root, second.root)] == ["gone"]


def test_long_paths_are_bounded_together() -> None:
    deep = "/".join(["ü" * 100] * 10)
    found = diffs.list_artifacts(FileChange(f"{deep}/{n}.png", None, 0) for n in range(100))
    assert 0 < len(found["files"]) < 100
    assert len(found["files"]) + found["more"] == 100
    assert len(json.dumps(found)) < 64 << 10
