"""Sandboxes while the service has no descriptors left: nothing counts as ended or gone for that."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from era.drivers import memory, processes
from era.drivers.cgroups import Group
from era.drivers.freezer import Freezer
from tests.descriptors import all_taken
from tests.unit.core import until

OWN = [os.getpid()]


@pytest.fixture
def group(tmp_path: Path) -> Group:
    """What looks like a control group of version 2 that stands still as soon as it is told to."""
    (tmp_path / "cgroup.freeze").write_text("0")
    (tmp_path / "cgroup.events").write_text("populated 1\nfrozen 1\n")
    (tmp_path / "cpu.stat").write_text("usage_usec 2500000\n")
    return Group(2, {"cpu": tmp_path, "freezer": tmp_path})


def is_frozen(group: Group) -> bool:
    return (group.directories["freezer"] / "cgroup.freeze").read_text() == "1"


@pytest.mark.parametrize(
    "look",
    [
        lambda: processes.below(os.getpid()),
        lambda: processes.unnamed(OWN, 0),
        lambda: processes.mapped_ends(OWN, 0),
        lambda: processes.hide_files(OWN, 0),
        lambda: processes.held(OWN, 0),
        lambda: processes.mapped(OWN),
        lambda: processes.cpu_seconds(OWN),
        lambda: processes.want_processor(OWN),
        lambda: processes.memory_bytes(OWN),
        lambda: memory.of_processes(OWN, 1 << 40),
        lambda: memory.used(OWN),
    ],
    ids=[
        "below",
        "unnamed",
        "mapped_ends",
        "hide_files",
        "held",
        "mapped",
        "cpu_seconds",
        "want_processor",
        "memory",
        "of_processes",
        "used",
    ],
)
def test_a_look_at_processes_fails(look: Callable[[], object]) -> None:
    with pytest.raises(OSError, match="Too many open files"), all_taken():
        look()
    look()


def test_a_group_s_processor_time_is_not_unknown(group: Group) -> None:
    with pytest.raises(OSError, match="Too many open files"), all_taken():
        group.cpu_seconds()
    assert group.cpu_seconds() == 2.5
    (group.directories["cpu"] / "cpu.stat").unlink()
    assert group.cpu_seconds() is None, "the group is gone"


async def test_what_could_not_be_thawed_is_thawed_later(group: Group) -> None:
    freezer = Freezer(group)
    with ExitStack() as descriptors:
        async with freezer.frozen() as still:
            assert still
            descriptors.enter_context(all_taken())
    assert is_frozen(group)
    with ExitStack() as descriptors:
        async with freezer.frozen() as still:
            assert still
            await asyncio.sleep(0.3)
            assert is_frozen(group), "the later try is none amid the next block"
            descriptors.enter_context(all_taken())
    await until(lambda: not is_frozen(group))


async def test_what_does_not_come_to_a_stand_is_no_sandbox_that_can_t_be_frozen(group: Group) -> None:
    (group.directories["freezer"] / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    async with Freezer(group).frozen() as still:
        assert still is False
    async with Freezer(Group(2, {})).frozen() as still:
        assert still is None
    async with Freezer(None).frozen() as still:
        assert still is None


async def test_what_can_t_be_frozen_for_now_is_no_sandbox_that_can_t_be_frozen(group: Group) -> None:
    with pytest.raises(OSError, match="Too many open files"), all_taken():
        async with Freezer(group).frozen():
            pass
    (group.directories["freezer"] / "cgroup.events").unlink()
    async with Freezer(group).frozen() as still:
        assert still is False, "it is gone"
