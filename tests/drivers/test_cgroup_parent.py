"""The control group that an operator names for those of sandboxes: what bounds it bounds them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from era.drivers import cgroups
from era.drivers.cgroups import Cgroups
from era.errors import NoIsolation
from tests.conftest import eventually
from tests.drivers.sandboxes import DRIVERS, LIMITS, Sandboxes, Weakness
from tests.drivers.test_delegated_groups import _removed, all_roots

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make control groups")

TAKE = "held = b'x' * (160 << 20); print('GOT')"


class Parent:
    """A control group of its own in each hierarchy that bounds something."""

    def __init__(self) -> None:
        self.roots = all_roots()
        if "memory" not in self.roots:
            pytest.skip("there is no control group for memory here")
        self.path = f"/era-parent-{secrets.token_hex(4)}"
        self.by_controller = {controller: root / self.path[1:] for controller, root in self.roots.items()}
        for directory in set(self.by_controller.values()):
            directory.mkdir()

    def bound_memory(self, size: int) -> None:
        directory = self.by_controller["memory"]
        name = "memory.max" if (directory / "memory.max").exists() else "memory.limit_in_bytes"
        (directory / name).write_text(str(size))

    def enter(self) -> list[Path]:
        """Move this process into it; where it was before."""
        before = [cgroups._own_group(root, each) or root for each, root in self.roots.items()]
        for directory in set(self.by_controller.values()):
            (directory / "cgroup.procs").write_text(str(os.getpid()))
        return before

    def leftovers(self) -> set[str]:
        """Groups below it."""
        directories = set(self.by_controller.values())
        return {child.name for each in directories if each.exists() for child in each.iterdir() if child.is_dir()}

    def remove(self) -> None:
        for directory in set(self.by_controller.values()):
            assert eventually(partial(_removed, directory)), f"{directory} is in use"


@pytest.fixture
def parent() -> Iterator[Parent]:
    made = Parent()
    yield made
    made.remove()


@pytest.fixture
def sandboxes(request: pytest.FixtureRequest, tmp_path: Path, parent: Parent) -> Iterator[Sandboxes]:
    """Those of a service whose setting is that parent."""
    with_parent = {"cgroup_parent": parent.path}
    made = Sandboxes(tmp_path / "s", Weakness(), request.param, self_tested=("python",), driver_settings=with_parent)
    yield made
    made.stop()
    assert parent.leftovers() == set()


@pytest.mark.parametrize("sandboxes", [name for name in DRIVERS if name != "fake"], indirect=True)
def test_what_bounds_the_parent_bounds_sandboxes(sandboxes: Sandboxes, parent: Parent) -> None:
    assert LIMITS.memory_bytes > 160 << 20, "its own bound wouldn't let it have as much either"
    sandbox = sandboxes.make()
    free = sandboxes.run(sandbox, TAKE)
    assert (free.stdout, free.ended.cause) == ("GOT\n", "exit"), free.stderr
    sandboxes.close(sandbox)
    sandbox = sandboxes.make()
    parent.bound_memory(120 << 20)
    bounded = sandboxes.run(sandbox, TAKE)
    assert (bounded.stdout, bounded.ended.exit_code) == ("", 137), bounded
    sandboxes.close(sandbox)


def test_a_parent_that_is_missing_somewhere_is_refused(parent: Parent, tmp_path: Path) -> None:
    missing = parent.by_controller["pids"]
    missing.rmdir()
    with pytest.raises(NoIsolation, match=rf"ERA_CGROUP_PARENT is {parent.path}, .*: {missing}") as refused:
        Cgroups.find("era-refused", tmp_path, parent.path)
    assert "leave ERA_CGROUP_PARENT out" in refused.value.hint
    assert not missing.exists(), "one that ERA made would have no bounds"
    assert parent.leftovers() == set()
    assert Cgroups.find("era-refused", tmp_path) is not None, "without the setting ERA chooses"
    for root in {*parent.roots.values(), Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup/freezer")}:
        _removed(root / "era-refused")


def test_self_is_the_group_that_the_service_is_in(parent: Parent, tmp_path: Path) -> None:
    before = parent.enter()
    try:
        found = [Cgroups.find(name, tmp_path, cgroups.SELF) for name in ("era-one", "era-other")]
    finally:
        for directory in before:
            (directory / "cgroup.procs").write_text(str(os.getpid()))
    for each in found:
        assert each is not None
        places = {controller: each._parents[controller].parent for controller in ("memory", "pids")}
        assert places == {controller: parent.by_controller[controller] for controller in ("memory", "pids")}
        each.close()
    if parent.leftovers():  # the service's own in version 2
        for directory in set(parent.by_controller.values()):
            _removed(directory / cgroups._SERVICE)
