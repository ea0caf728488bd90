"""What the directory of packages counts while a program runs: nothing as long as there are only directories in it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from era.core.trees import trees
from era.core.trees.allowance import Full, _Usage
from tests.drivers.sandboxes import LIMITS


def measured(workspace: Path) -> int:
    """How many entries there are, for a session that may have 5."""
    with trees.closing(os.open(workspace, trees.DIRECTORY)) as root:
        usage = _Usage(root, replace(LIMITS, files=5))
        usage.add_packages(root)
    return usage.entries


def test_directories_alone_count_for_nothing(tmp_path: Path) -> None:
    """A sandbox has some there from the beginning, and they aren't kept."""
    workspace, packages = tmp_path / "workspace", tmp_path / "packages"
    for each in (workspace, packages / "etc" / "below"):
        each.mkdir(parents=True)
    for number in range(5):
        (workspace / f"{number}").touch()
    assert measured(workspace) == 5
    (packages / "etc" / "file").touch()
    with pytest.raises(Full, match="5 files"):
        measured(workspace)
    for number in range(3):
        (workspace / f"{number}").unlink()
    assert measured(workspace) == 2 + 3, "with a file there they are kept, and so count"


def test_not_even_very_many_directories_are_free(tmp_path: Path) -> None:
    workspace, packages = tmp_path / "workspace", tmp_path / "packages"
    workspace.mkdir()
    for number in range(6):
        (packages / f"{number}").mkdir(parents=True)
    with pytest.raises(Full, match="5 files"):
        measured(workspace)
