"""Control groups that were delegated to an ordinary user, as systemd does it (`Delegate=`): they bound sandboxes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from era.drivers import cgroups
from tests.conftest import eventually
from tests.drivers.as_user import UID, opened
from tests.drivers.parent_group import all_roots, removed
from tests.drivers.test_memory import HELD, TAKES

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can delegate control groups")


class Delegated:
    """Groups of the user UID, one in each hierarchy."""

    def __init__(self, roots: dict[str, Path]) -> None:
        """`roots` are those of the hierarchies, by controller."""
        name = f"era-delegated-{os.getpid()}"
        self.groups = {root / name for root in roots.values()}
        self._before = [cgroups._own_group(root, each) or root for each, root in roots.items()]
        for group in self.groups:
            group.mkdir()
            for path in (group, *(group / file for file in ("cgroup.procs", "tasks", "cgroup.subtree_control"))):
                if path.exists():
                    os.chown(path, UID, UID)

    def enter(self) -> None:
        """Move this process into them, for what it starts next."""
        for group in self.groups:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    def leave(self) -> None:
        for before in self._before:
            (before / "cgroup.procs").write_text(str(os.getpid()))

    def remove(self) -> None:
        for group in self.groups:
            for below in (group / "service", group):
                assert eventually(partial(removed, below)), f"{below} is in use"


@pytest.fixture(scope="module", params=["bubblewrap as a user", "gvisor as a user"])
def sandboxes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Those of a service of an ordinary user's that is in such groups."""
    roots = all_roots()
    if "memory" not in roots:
        pytest.skip("there is no control group for memory here")
    delegated = Delegated(roots)
    with ExitStack() as stack:
        stack.callback(delegated.remove)
        delegated.enter()
        try:
            made = stack.enter_context(opened(request.param, tmp_path_factory.mktemp("sandboxes")))
        finally:
            delegated.leave()
        yield made


def test_they_bound_memory_that_is_shared(sandboxes: Any) -> None:
    sandbox = sandboxes.make()
    in_force = sandbox.enforced["cgroup"]
    assert in_force["memory_bytes"] >= 256 << 20
    assert in_force["pids"] > 0
    assert sandbox.enforced.get("memory") != "watched"
    result = sandboxes.run(sandbox, HELD + TAKES["a shared map"], env={"SECONDS": "60"}, timeout=120)
    assert (result.ended.cause, result.ended.exit_code) == ("oom", 137), result.stderr
    sandboxes.close(sandbox)


VACATE = """
import os, sys
from pathlib import Path
from era.drivers import cgroups
group, controller, vacate, uid = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "vacate", int(sys.argv[4])
(group / "cgroup.procs").write_text("0")
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
try:
    if vacate:
        cgroups._vacate(group)
    cgroups._delegate(group, {controller: group})
    print((group / "cgroup.subtree_control").read_text().strip(), cgroups._own_group(group.parent, "").name)
except OSError as error:
    print(os.strerror(error.errno))
"""


@pytest.fixture
def group() -> Iterator[tuple[Path, str]]:
    """A group of version 2 for UID, and a controller that it has."""
    root = next((directory for directory, _ in cgroups._mounts("cgroup2")), None)
    controllers = (root / "cgroup.controllers").read_text().split() if root else []
    if root is None or not controllers:
        pytest.skip("there is no control group of version 2 with a controller here")
    cgroups._delegate(root, {controllers[0]: root})
    delegated = Delegated({controllers[0]: root})
    yield next(iter(delegated.groups)), controllers[0]
    delegated.remove()


type Try = Callable[[str], str]


@pytest.fixture
def tried(group: tuple[Path, str]) -> Try:
    """Has a process of UID in that group give the groups below it a controller; what came of it."""
    directory, controller = group

    def tried(how: str) -> str:
        python = [sys.executable, "-c", VACATE, str(directory), controller, how, str(UID)]
        source = str(Path(cgroups.__file__).parents[2])
        return subprocess.run(
            python, env={"PYTHONPATH": source}, capture_output=True, text=True, timeout=60, check=True
        ).stdout.strip()

    return tried


def test_a_service_makes_room_in_its_own_group(tried: Try, group: tuple[Path, str]) -> None:
    assert tried("vacate") == f"{group[1]} service"


def test_without_making_room_the_kernel_refuses(tried: Try) -> None:
    assert tried("stay") == "Device or resource busy"


def test_a_group_with_others_in_it_is_left_alone(tried: Try, group: tuple[Path, str]) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:
        (group[0] / "cgroup.procs").write_text(str(other.pid))
        assert tried("vacate") == "Operation not permitted"
        assert not (group[0] / "service").exists()
        assert other.stdin is not None
        other.stdin.close()
