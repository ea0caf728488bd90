"""A start that fails halfway, as where there are no descriptors left: it takes nothing along, and is told as what it
is."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest

from era.drivers import alternation, processes, templates
from era.drivers.alternation import Alternation
from era.drivers.cgroups import Group
from era.drivers.channel import Channel
from era.drivers.forking import Forker
from era.drivers.gvisor import sentry_status
from era.drivers.options import Plan
from era.drivers.process_supervisor import LazyProcessSupervisor
from era.drivers.templates import Template, hold
from era.errors import SandboxFailed
from tests.descriptors import all_taken
from tests.drivers.sandboxes import LIMITS, Sandboxes, Weakness

NOTHING = cast(Any, object())


def fails(*_: Any, **__: Any) -> Any:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def open_now() -> list[str]:
    return os.listdir("/proc/self/fd")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandboxes]:
    made = Sandboxes(tmp_path_factory.mktemp("started"), Weakness(template_forks=0))
    yield made
    made.stop()


@pytest.mark.parametrize(
    ("of", "name"), [(os, "memfd_create"), (socket, "socketpair"), (Group, "limits")], ids=["log", "socket", "look"]
)
def test_a_sandbox_that_can_not_be_made_leaves_nothing(
    started: Sandboxes, monkeypatch: pytest.MonkeyPatch, of: Any, name: str
) -> None:
    driver = started.driver
    if of is Group and driver.cgroups is None:
        pytest.skip("there are no control groups here")
    sandbox = started.make()
    uid = sandbox.uid
    started.close(sandbox)
    before = open_now()
    with monkeypatch.context() as patched:
        patched.setattr(of, name, fails)
        with pytest.raises(SandboxFailed, match="Too many open files"):
            started.make()
    assert driver._sandboxes == set()
    assert [path.name for path in driver.directory.glob("sb-*")] == []
    assert len(open_now()) == len(before)
    again = started.make()
    assert again.uid == uid, "it is free again"
    started.close(again)


def test_a_template_is_released() -> None:
    class Taken:
        released = 0

        def release(self) -> None:
            self.released += 1

    template = Taken()
    with all_taken(), pytest.raises(OSError, match="Too many open files"):
        hold(cast(Any, template), Plan({}, lambda _: [], []), NOTHING)
    assert template.released == 1


def test_entrances_to_groups_are_closed(tmp_path: Path) -> None:
    directories = {name: tmp_path / name for name in ("memory", "pids", "cpu", "cpuacct", "io")}
    for directory in directories.values():
        directory.mkdir()
        if directory.name != "io":
            (directory / "cgroup.procs").touch()
    before = open_now()
    with pytest.raises(FileNotFoundError):
        Group(1, directories).entrances()
    assert len(open_now()) == len(before)


def test_a_process_that_forks_supervisors() -> None:
    def start(config: Any, given: list[int], log: int) -> subprocess.Popen[bytes]:
        raise SandboxFailed("not today")

    before = open_now()
    with pytest.raises(SandboxFailed):
        Forker(start, (b"filter",))
    assert len(open_now()) == len(before)


def test_a_template_s_directory_is_removed(started: Sandboxes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(templates, "launch", fails)
    driver = started.driver
    with pytest.raises(OSError, match="Too many open files"):
        Template(driver.paths, LIMITS, driver.filters, driver.survivor)
    assert list(driver.directory.glob("template-*")) == []


def test_a_process_of_gvisor_s_that_has_ended_is_no_sentry(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    monkeypatch.setattr(processes, "below", lambda pid: [process.pid])
    with pytest.raises(SandboxFailed, match="not found"):
        sentry_status(process.pid)


async def test_a_process_supervisor_that_can_not_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socketpair", fails)
    lazy = LazyProcessSupervisor(NOTHING, {}, NOTHING, NOTHING, str, lambda: None, lambda: 0.0)
    with pytest.raises(SandboxFailed, match="Too many open files"):
        await lazy.get()


async def test_a_second_supervisor_of_runs_that_can_not_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socketpair", fails)
    turns = Alternation(NOTHING, NOTHING, NOTHING, {}, NOTHING, {}, lambda broker: None)
    await turns._make()
    assert turns._second is None
    assert not turns._may_make


@pytest.mark.parametrize("problem", [ValueError("no JSON"), KeyError("a mistake of ours")], ids=["said", "ours"])
async def test_a_second_supervisor_of_runs_that_does_not_speak_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    class Made:
        """In place of its broker and of its process."""

        calls: ClassVar[list[str]] = []

        def close(self) -> None:
            self.calls.append("close")

        def kill(self) -> None:
            self.calls.append("kill")

        async def ended(self) -> None:
            self.calls.append("ended")

    async def enter(_: int) -> Any:
        return Made()

    async def listeners(*_: object) -> Any:
        return {}, Made()

    async def ready(_: Channel) -> Any:
        raise problem

    monkeypatch.setattr(alternation, "receive_guest_listeners", listeners)
    monkeypatch.setattr(Channel, "ready", ready)
    group = cast(Any, SimpleNamespace(widen=lambda *_: None, limits=dict))
    turns = Alternation(NOTHING, NOTHING, group, {}, enter, {}, lambda broker: None)
    before = open_now()
    if isinstance(problem, ValueError):
        await turns._make()
    else:
        with pytest.raises(KeyError):
            await turns._make()
    assert Made.calls == ["close", "kill", "ended"]
    await asyncio.sleep(0)  # the event loop closes sockets in its next turn
    assert len(open_now()) == len(before)
    assert not turns._may_make
