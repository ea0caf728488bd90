"""The control group that an operator names for those of sandboxes: what bounds it bounds them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from era.drivers import cgroups
from era.drivers.cgroups import Cgroups
from era.errors import NoIsolation
from tests.drivers.parent_group import ParentGroup, all_roots, removed
from tests.drivers.sandboxes import DRIVERS, LIMITS, Sandboxes, Weakness

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make control groups")

TAKE = "held = b'x' * (160 << 20); print('GOT')"


@pytest.fixture
def parent() -> Iterator[ParentGroup]:
    if "memory" not in all_roots():
        pytest.skip("there is no control group for memory here")
    made = ParentGroup()
    yield made
    made.remove()


@pytest.fixture
def sandboxes(request: pytest.FixtureRequest, tmp_path: Path, parent: ParentGroup) -> Iterator[Sandboxes]:
    """Those of a service whose setting is that parent."""
    with_parent = {"cgroup_parent": parent.path}
    made = Sandboxes(tmp_path / "s", Weakness(), request.param, self_tested=("python",), driver_settings=with_parent)
    yield made
    made.stop()
    assert parent.leftovers() == set()


@pytest.mark.parametrize("sandboxes", [name for name in DRIVERS if name != "fake"], indirect=True)
def test_what_bounds_the_parent_bounds_sandboxes(sandboxes: Sandboxes, parent: ParentGroup) -> None:
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


def test_a_sandbox_has_no_more_processors_than_the_parent(parent: ParentGroup, tmp_path: Path) -> None:
    if "cpu" not in parent.by_controller:
        pytest.skip("there is no control group for processors here")
    parent.bound_processors(0.25)
    found = Cgroups.find("era-small", tmp_path, parent.path)
    assert found is not None
    group = found.create("sb-small", LIMITS)
    in_force = group.limits()["cpus"]
    group.remove()
    found.close()
    assert in_force == (0.25 if found.version == 1 else LIMITS.cpus), "version 2 allows more, and bounds all the same"


def test_of_a_group_that_the_system_refuses_nothing_is_left(tmp_path: Path) -> None:
    found = Cgroups.find("era-refused", tmp_path)
    if found is None or "cpu" not in all_roots():
        pytest.skip("there is no control group for processors here")
    try:
        with pytest.raises(OSError, match="Invalid argument"):  # it is less than the least quota
            found.create("sb-refused", replace(LIMITS, cpus=0.001))
    finally:
        left = found.remove_leftovers()
        found.close()
    assert left == 0


def test_a_parent_that_is_missing_somewhere_is_refused(parent: ParentGroup, tmp_path: Path) -> None:
    missing = parent.by_controller["pids"]
    missing.rmdir()
    with pytest.raises(NoIsolation, match=rf"ERA_CGROUP_PARENT is {parent.path}, .*: {missing}") as refused:
        Cgroups.find("era-refused", tmp_path, parent.path)
    assert "leave ERA_CGROUP_PARENT out" in refused.value.hint
    assert not missing.exists(), "one that ERA made would have no bounds"
    assert parent.leftovers() == set()
    assert Cgroups.find("era-refused", tmp_path) is not None, "without the setting ERA chooses"
    for root in {*parent.roots.values(), Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup/freezer")}:
        removed(root / "era-refused")


def test_self_is_the_group_that_the_service_is_in(parent: ParentGroup, tmp_path: Path) -> None:
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
