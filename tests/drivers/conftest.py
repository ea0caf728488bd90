from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import assert_nothing_left, descendants, mounts
from tests.drivers.sandboxes import Sandboxes, Weakness

FEW = {
    "test_processes": ("test_what_a_process_says_and_how_it_ends",),
    "test_contexts": (),
    "test_invocations": (),
    "test_connections": (),
    "test_languages": ("test_a_language[gvisor as a user-python]",),
    "test_memory": ("test_a_process_does_not_take_more_with_each_run_beside_it",),
}
"""By module: tests that run with gVisor as an ordinary user in each case. Where they run as root, too, the others of
the module are left to `make soak` with that: the walls of an ordinary user, and gVisor, are each tried anyway, and both
together by all tests of the modules that aren't here (test_sandboxes, test_programs)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "[gvisor as a user" in item.name and os.geteuid() == 0:
            named = FEW.get(item.path.stem, (item.name,))
            if not any(item.name.startswith(name) for name in named):
                item.add_marker(pytest.mark.soak)


@pytest.fixture(scope="module")
def sandboxes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandboxes]:
    """Sound sandboxes, of the `Weakness.template_forks` that a module asks for by parameters. At the end of the module
    nothing of them may be left."""
    before, processes = mounts(), set(descendants(os.getpid()))
    directory = tmp_path_factory.mktemp("sandboxes")
    made = Sandboxes(directory, Weakness(template_forks=getattr(request, "param", Weakness.template_forks)))
    yield made
    processes = processes.union(*(other.processes() for other in Sandboxes.all - {made}))
    running = [pid for pid in descendants(os.getpid()) if pid not in processes and _is_of(made, pid)]
    made.stop()
    assert_nothing_left(before, running, directory, made.cgroup_name)


def _is_of(made: Sandboxes, pid: int) -> bool:
    """Whether a process belongs to these sandboxes, and not to others that a module has besides. Where there are no
    control groups, each in a sandbox is taken to, and each bubblewrap."""
    if made.driver.cgroups is None:
        try:
            inside = Path(f"/proc/{pid}/ns/user").readlink() != Path("/proc/self/ns/user").readlink()
            return inside or Path(f"/proc/{pid}/comm").read_text() == "bwrap\n"
        except PermissionError:
            return True  # the processes of a sandbox let nobody look at their namespaces
        except (FileNotFoundError, ProcessLookupError):
            return False
    if made.driver.templates and pid == made.driver.templates._current.pid:
        return True
    with contextlib.suppress(OSError):
        return made.cgroup_name in Path(f"/proc/{pid}/cgroup").read_text()
    return False


BOTH_WAYS = pytest.mark.parametrize("sandboxes", [64, 0], ids=["forked", "started"], indirect=True, scope="module")
"""Marks tests of sound sandboxes whose supervisors are forked from a template, and ones that start by themselves."""


@pytest.fixture
def weak_sandboxes(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Sandboxes]:
    made = Sandboxes(tmp_path / "weak", request.param)
    yield made
    made.stop()
