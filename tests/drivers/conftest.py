from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import assert_nothing_left, descendants, mounts
from tests.drivers.sandboxes import Sandboxes, Weakness


@pytest.fixture(scope="module")
def sandboxes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandboxes]:
    """Sound sandboxes. At the end of the module nothing of them may be left."""
    before, processes = mounts(), set(descendants(os.getpid()))
    directory = tmp_path_factory.mktemp("sandboxes")
    made = Sandboxes(directory, Weakness())
    yield made
    running = [pid for pid in descendants(os.getpid()) if pid not in processes]
    made.stop()
    assert_nothing_left(before, running, directory, made.cgroup_name)


@pytest.fixture
def weak_sandboxes(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Sandboxes]:
    made = Sandboxes(tmp_path / "weak", request.param)
    yield made
    made.stop()
