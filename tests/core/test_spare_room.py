"""Room on the disk that files and directories take without showing it: it counts, as does the work that it makes."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from era.core.limits import bounds
from era.core.models import EMPTY
from era.core.trees import trees
from era.core.trees.tree_objects import TreeNotSmall
from era.core.trees.trees import Scan, SnapshotRefused
from tests.core.lab import LIMITS, Lab

_libc = ctypes.CDLL(None, use_errno=True)
_KEEP_SIZE = 1
LIMIT = 256 << 10


def behind_the_end(workspace: Path) -> None:
    """A file that is empty, with 512 KiB."""
    fd = os.open(workspace / "d/f0", os.O_RDWR)
    try:
        if _libc.fallocate(fd, _KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(2 * LIMIT)):
            pytest.skip(f"this file system can't: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(fd)
    assert (workspace / "d/f0").stat().st_size == 0


def a_list_of_what_is_gone(workspace: Path) -> None:
    """A directory that had 2,000 long names."""
    directory = os.open(workspace / "d", os.O_DIRECTORY)
    names = [f"{number:05}" + "x" * 240 for number in range(2000)]
    for name in names:
        os.link("f0", name, src_dir_fd=directory, dst_dir_fd=directory)
    for name in names:
        os.unlink(name, dir_fd=directory)
    blocks = os.fstat(directory).st_blocks
    os.close(directory)
    if blocks * 512 <= LIMIT:
        pytest.skip("this file system's directories shrink")


WAYS = [behind_the_end, a_list_of_what_is_gone]


@pytest.mark.parametrize("is_watched", [False, True])
@pytest.mark.parametrize("is_counted", [True, False])
@pytest.mark.parametrize("take", WAYS)
def test_it_counts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    take: Callable[[Path], None],
    is_counted: bool,
    is_watched: bool,
) -> None:
    lab = Lab(tmp_path, limits=replace(LIMITS, disk_bytes=LIMIT))
    place = lab.place()
    (place.workspace / "d").mkdir()
    for number in range(40 if is_watched else 1):
        (place.workspace / f"d/f{number}").touch()
    snapshot = lab.take(place)
    assert lab.take(place, snapshot) == snapshot
    take(place.workspace)
    if is_counted:
        with pytest.raises(SnapshotRefused, match=f"has allocated more than {LIMIT} bytes"):
            lab.take(place, snapshot)
    else:
        monkeypatch.setattr(trees, "spare_bytes", lambda _: 0)
        assert lab.take(place, snapshot).total_bytes == 0, "this attack is none"


@pytest.mark.parametrize("is_counted", [True, False])
def test_a_long_list_of_nothing_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_counted: bool
) -> None:
    """It isn't read on the event loop, though hardly anything is in it."""
    lab = Lab(tmp_path)
    place = lab.place()
    (place.workspace / "d").mkdir()
    (place.workspace / "d/f0").touch()
    a_list_of_what_is_gone(place.workspace)
    if not is_counted:
        monkeypatch.setattr(trees, "work_of_listing", lambda _: 0)

    def scan(root: Path) -> Any:
        with trees.opened_root(root) as fd:
            return Scan(bounds(LIMITS), small=32).full(fd, None)

    for root in (place.workspace, place.workspace / "d"):
        if is_counted:
            with pytest.raises(TreeNotSmall):
                scan(root)
        else:
            assert scan(root).totals.files == 1, "this attack is none"
    assert lab.take(place, EMPTY).file_count == 1
