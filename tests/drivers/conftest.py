from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import assert_nothing_left, descendants, mounts
from tests.drivers.sandboxes import Sandboxes, Weakness

FEW = {
    "test_processes": (),
    "test_contexts": (),
    "test_invocations": (),
    "test_connections": (),
    "test_languages": (),
    "test_sandboxes": ("test_out_of_memory", "test_there_is_no_network", "test_system_files", "test_nothing_is_left"),
    "test_memory": ("test_a_process_does_not_take_more_with_each_run_beside_it",),
}
"""By module: tests that run with gVisor as an ordinary user in each case. Where they run as root, too, the others of
the module are left to `make soak` with that: the walls of an ordinary user, and gVisor, are each tried anyway, and both
together by all tests of the module that isn't here (test_programs)."""

SAME: dict[str, tuple[str, ...]] = {
    "test_connections": ("bubblewrap as a user",),
    "test_invocations": ("bubblewrap as a user",),
    "test_how_it_is_called": ("gvisor",),
    "test_the_deadline": ("fake", "bubblewrap as a user"),
    "test_a_run_that_is_killed_after_its_deadline_was_out_of_time": ("fake", "bubblewrap as a user"),
    "test_a_fork_bomb_in_a_process": ("gvisor",),
    "test_many_processes": ("bubblewrap as a user", "gvisor"),
    "test_files_in_memory_are_bounded_beside_processes": ("bubblewrap as a user",),
    "test_no_snapshot_shows_counters_reversed": ("bubblewrap as a user", "gvisor"),
    "test_too_much_memory": ("bubblewrap as a user",),
    "test_a_run_after_one_that_took_too_much": ("bubblewrap as a user",),
    "test_small_writes_are_gathered": ("gvisor",),
}
"""By module or test: drivers, or cases with one, with which it is left to `make soak`. It takes long, and most of what
it tries is the same code that another driver has in `make test`. What is these drivers' own is tried there by others:
gVisor's bounds by test_too_many_processes, test_gvisor_attacks and test_gvisor_memory, how it stands still by
test_everything_can_stand_still, an ordinary user's walls by test_sandboxes, test_processes and test_memory, and his
languages by test_languages and test_contexts."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() != 0:
        return
    for item in items:
        if "[gvisor as a user" in item.name:
            named = FEW.get(item.path.stem, (item.name,))
            if not any(item.name.startswith(name) for name in named):
                item.add_marker(pytest.mark.soak)
        name, _, case = item.name.partition("[")
        same = (*SAME.get(item.path.stem, ()), *SAME.get(name, ()))
        if any(case.startswith((f"{driver}-", f"{driver}]")) for driver in same):
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
