from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import assert_nothing_left, descendants, mounts
from tests.drivers.sandboxes import Sandboxes, Weakness


@pytest.fixture(scope="module")
def sandboxes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandboxes]:
    """Sound sandboxes, of the `Weakness.template_forks` that a module asks for by parameters. At the end of the module
    nothing of them may be left."""
    before, processes = mounts(), set(descendants(os.getpid()))
    directory = tmp_path_factory.mktemp("sandboxes")
    made = Sandboxes(directory, Weakness(template_forks=getattr(request, "param", Weakness.template_forks)))
    yield made
    running = [pid for pid in descendants(os.getpid()) if pid not in processes and _is_of(made, pid)]
    made.stop()
    assert_nothing_left(before, running, directory, made.cgroup_name)


def _is_of(made: Sandboxes, pid: int) -> bool:
    """Whether a process belongs to these sandboxes, and not to others that a module has besides. Where there are no
    control groups, each is taken to."""
    if made.driver.cgroups is None or (made.driver.templates and pid == made.driver.templates._current.pid):
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
