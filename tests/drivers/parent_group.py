"""Control groups of a test's own, in each hierarchy that bounds something."""

from __future__ import annotations

import os
import secrets
from functools import partial
from pathlib import Path

from era.drivers import cgroups
from tests.conftest import eventually

_PERIOD_US = 100_000


def all_roots() -> dict[str, Path]:
    """Those of the hierarchies by which memory can be bounded here, by controller."""
    roots = cgroups._version_1()
    if "memory" not in roots:
        roots = cgroups._version_2()
        for root in set(roots.values()):
            cgroups._delegate(root, roots)
    return roots


class ParentGroup:
    """A group to name in ERA_CGROUP_PARENT."""

    def __init__(self) -> None:
        self.roots = all_roots()
        self.path = f"/era-parent-{secrets.token_hex(4)}"
        self.by_controller = {controller: root / self.path[1:] for controller, root in self.roots.items()}
        self.directories = set(self.by_controller.values())
        for directory in self.directories:
            directory.mkdir()

    def bound_memory(self, size: int) -> None:
        directory = self.by_controller["memory"]
        name = "memory.max" if (directory / "memory.max").exists() else "memory.limit_in_bytes"
        (directory / name).write_text(str(size))

    def bound_processors(self, processors: float) -> None:
        """It has so many, also when others want them, and no more."""
        directory, quota = self.by_controller["cpu"], int(processors * _PERIOD_US)
        if (directory / "cpu.max").exists():
            (directory / "cpu.max").write_text(f"{quota} {_PERIOD_US}")
            (directory / "cpu.weight").write_text("10000")
        else:
            (directory / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (directory / "cpu.cfs_quota_us").write_text(str(quota))
            (directory / "cpu.shares").write_text("262144")

    def enter(self) -> list[Path]:
        """Move this process into it; where it was before."""
        before = [cgroups._own_group(root, each) or root for each, root in self.roots.items()]
        for directory in self.directories:
            (directory / "cgroup.procs").write_text(str(os.getpid()))
        return before

    def leftovers(self) -> set[str]:
        """Groups below it."""
        return {child.name for each in self.directories if each.exists() for child in each.iterdir() if child.is_dir()}

    def remove(self) -> None:
        """Remove it, with what is left below it by a service that was killed."""
        for directory in self.directories:
            for each in (*directory.glob("*/*/"), *directory.glob("*/"), directory):
                assert eventually(partial(removed, each)), f"{each} is in use"


def removed(directory: Path) -> bool:
    """Remove a group; whether it is gone."""
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
