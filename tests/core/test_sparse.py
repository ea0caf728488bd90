"""Holes of files: found, kept, and neither read nor written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from era.core.trees import copies
from era.core.trees.copies import extents
from era.store.blobs import blobs
from tests.core.lab import Lab

MIB = 1 << 20


def sparse_file(path: Path, size: int, *pieces: tuple[int, bytes]) -> None:
    """A file of `size` bytes with these pieces at their offsets and holes between."""
    with path.open("wb") as file:
        for offset, content in pieces:
            file.seek(offset)
            file.write(content)
        file.truncate(size)


@pytest.mark.parametrize(
    ("size", "pieces", "shape"),
    [
        (0, [], []),
        (8 * MIB, [], [False]),
        (8 * MIB, [(0, b"a" * MIB)], [True, False]),
        (8 * MIB, [(4 * MIB, b"a" * MIB)], [False, True, False]),
        (8 * MIB, [(0, b"a" * MIB), (7 * MIB, b"b" * MIB)], [True, False, True]),
    ],
)
def test_extents_are_all_of_a_file_in_order(
    tmp_path: Path, size: int, pieces: list[tuple[int, bytes]], shape: list[bool]
) -> None:
    sparse_file(tmp_path / "file", size, *pieces)
    with (tmp_path / "file").open("rb") as file:
        found = list(extents(file.fileno(), 0, size))
        assert [is_data for _, _, is_data in found] == shape
        assert sum(length for _, length, _ in found) == size
        assert all(before[0] + before[1] == after[0] for before, after in pairwise(found))
        part = list(extents(file.fileno(), size // 2, 2 * size))
        assert sum(length for _, length, _ in part) == size - size // 2


@pytest.mark.parametrize("pieces", [[], [(0, b"a")], [(16 * MIB - 1, b"z")], [(9 * MIB + 5, os.urandom(3 * MIB))]])
def test_a_sparse_file_is_kept_and_restored_as_one(lab: Lab, pieces: list[tuple[int, bytes]]) -> None:
    place = lab.place()
    sparse_file(place.workspace / "file", 16 * MIB, *pieces)
    content = (place.workspace / "file").read_bytes()
    snapshot = lab.take(place)
    assert snapshot.total_bytes == 16 * MIB
    blob = lab.blobs._path(hashlib.sha256(content).hexdigest())
    restored = lab.restore(snapshot).workspace / "file"
    for path in (blob, restored):
        assert Path(path).read_bytes() == content
        assert os.stat(path).st_blocks * 512 < 8 * MIB


def bytes_moved() -> int:
    """How many bytes this process has read and written so far, by any call (proc_pid_io(5))."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"]) + int(counts["wchar"])


def one_extent(fd: int, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """The weakness: the whole file is data."""
    yield start, min(end, os.fstat(fd).st_size) - start, True


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="this kernel doesn't count what a process reads")
@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
def test_holes_are_neither_read_nor_written(lab: Lab, monkeypatch: pytest.MonkeyPatch, weakened: bool) -> None:
    """When a file is stored, restored, and put aside."""
    size, most = 128 * MIB, 8 * MIB
    if weakened:
        monkeypatch.setattr(copies, "extents", one_extent)
        monkeypatch.setattr(blobs, "extents", one_extent)
    monkeypatch.setattr(copies, "_shared", lambda *_: False)  # as where files can't share blocks
    place = lab.place()
    file = place.workspace / "file"
    sparse_file(file, size, (0, b"a"), (64 * MIB, b"b"))

    def put_aside(copy: Callable[[int, int, Any], None], last: Any) -> None:
        with file.open("rb") as content, (lab.directory / "copy").open("wb") as target:
            copy(content.fileno(), target.fileno(), last)

    moved = [bytes_moved()]
    snapshot = lab.take(place)
    moved.append(bytes_moved())
    restored = lab.restore(snapshot)
    moved.append(bytes_moved())
    put_aside(copies.copy, size)
    moved.append(bytes_moved())
    put_aside(copies.copy_changing, file.stat())
    moved.append(bytes_moved())
    assert [after - before > (size if weakened else most) for before, after in pairwise(moved)] == [weakened] * 4
    for each in (restored.workspace / "file", lab.directory / "copy"):
        assert each.stat().st_size == size
        with file.open("rb") as one, each.open("rb") as other:
            assert all(os.pread(one.fileno(), MIB, at) == os.pread(other.fileno(), MIB, at) for at in (0, 64 * MIB))
