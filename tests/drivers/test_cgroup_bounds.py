"""What is written to a control group's files. What the kernel makes of it is in test_resources.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from era.drivers import cgroups
from era.drivers.cgroups import Cgroups, Group
from tests.drivers.sandboxes import LIMITS


@pytest.fixture
def group(tmp_path: Path) -> Group:
    """One of version 1, on a kernel without swap accounting."""
    for name in ("memory.limit_in_bytes", "memory.swappiness"):
        (tmp_path / name).write_text("60")
    return Group(1, {"memory": tmp_path})


def test_without_swap_accounting_nothing_is_swapped(group: Group) -> None:
    Cgroups(1, {}, None)._set(group, LIMITS)
    assert (group.directories["memory"] / "memory.swappiness").read_text() == "00"  # a file of the kernel's has no end


@pytest.mark.parametrize(("version", "name"), [(1, "memory.memsw.limit_in_bytes"), (2, "memory.swap.max")])
def test_a_bound_that_cannot_be_set_is_no_bound(group: Group, version: int, name: str) -> None:
    directory = group.directories["memory"]
    (directory / "memory.max").touch()
    (directory / name).mkdir()  # to write to it fails
    with pytest.raises(IsADirectoryError):
        Cgroups(version, {}, None)._set(Group(version, {"memory": directory}), LIMITS)


def test_a_directory_that_can_not_be_removed_does_not_keep_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "_REMOVAL_SECONDS", 0.05)
    directories = {name: tmp_path / name for name in ("memory", "pids", "cpu", "cpuacct", "io")}
    for directory in directories.values():
        directory.mkdir()
    (directories["pids"] / "below").mkdir()
    with pytest.raises(OSError, match="not empty"):
        Group(1, directories).remove()
    assert [path.name for path in tmp_path.iterdir()] == ["pids"]
