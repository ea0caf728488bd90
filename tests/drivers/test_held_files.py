"""Which files processes have mapped to share, as the kernel says it."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from era.drivers import processes


@pytest.mark.parametrize("kernel_can_be_asked", [True, False])
def test_shared_maps_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel_can_be_asked: bool) -> None:
    if not kernel_can_be_asked:
        monkeypatch.setattr(processes, "_PROCMAP_QUERY", 0x66FF)  # as before Linux 6.11: ENOTTY
    inodes: list[int] = []
    maps: list[mmap.mmap] = []
    for name, flags in (("one", mmap.MAP_SHARED), ("two", mmap.MAP_SHARED), ("private", mmap.MAP_PRIVATE)):
        with (tmp_path / name).open("w+b") as file:
            file.write(b"content")
            file.flush()
            maps.append(mmap.mmap(file.fileno(), 0, flags=flags))
            inodes.append(os.fstat(file.fileno()).st_ino)
    found = processes.mapped([os.getpid(), 1 << 22])  # the other one has ended
    assert found is not None
    assert found & set(inodes) == set(inodes[:2])
    for each in maps:
        each.close()
    assert not (processes.mapped([os.getpid()]) or set()) & set(inodes)
