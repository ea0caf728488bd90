"""Runs that have used their slice of processor time stand back behind all others; those that only wait don't."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, cast

import pytest

from era.drivers import cgroups
from era.drivers.bubblewrap import BubblewrapSandbox
from era.drivers.watching import TimeSlice
from tests.conftest import eventually
from tests.drivers import process_steps as steps
from tests.drivers.process_steps import shell
from tests.drivers.sandboxes import Sandboxes
from tests.unit.core import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only in a control group can a run stand back")


class Group:
    """A control group, as far as it matters here."""

    idle = False

    def set_idle_priority(self, *, idle: bool) -> None:
        self.idle = idle


async def test_a_run_that_can_t_be_looked_at_stands_back_later() -> None:
    group, looks = Group(), list[float]()

    def cpu_seconds() -> float:
        looks.append(10.0 * len(looks))
        if len(looks) < 4:
            raise OSError(errno.EMFILE, "Too many open files")
        return looks[-1]

    slice_of_time = TimeSlice(cast(cgroups.Group, group), cpu_seconds)
    slice_of_time.begin()
    await until(lambda: group.idle)
    slice_of_time.end()
    assert not group.idle


async def test_a_run_that_can_t_come_forward_when_it_is_to_end_does_so_soon() -> None:
    class Full(Group):
        failures = 1

        def set_idle_priority(self, *, idle: bool) -> None:
            if not idle and self.failures:
                self.failures -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            super().set_idle_priority(idle=idle)

    group, looks = Full(), iter(range(0, 1000, 10))
    slice_of_time = TimeSlice(cast(cgroups.Group, group), lambda: float(next(looks)))
    slice_of_time.begin()
    await until(lambda: group.idle)
    slice_of_time.end()
    assert group.idle
    await until(lambda: not group.idle)
    assert slice_of_time._timer is None


def _idle_file(sandbox: BubblewrapSandbox) -> Path:
    assert sandbox._group is not None
    file = sandbox._group.directories["cpu"] / "cpu.idle"
    if not file.exists():
        pytest.skip("this kernel has no cpu.idle")
    return file


@pytest.mark.parametrize(
    ("code", "stands_back"),
    [
        ("import time\nwhile time.process_time() < 1: pass", True),
        ("import time\ntime.sleep(1.5)", False),
        ("import os, time\nif os.fork() == 0:\n  while time.process_time() < 1: pass\nelse: os.wait()", True),
    ],
    ids=["works", "waits", "has a child that works"],
)
def test_by_processor_time(sandboxes: Sandboxes, code: str, stands_back: bool) -> None:
    sandbox = sandboxes.make()
    idle, seen, over = _idle_file(sandbox), set(), threading.Event()

    def look() -> None:
        while not over.is_set():
            seen.add(idle.read_text().strip())
            time.sleep(0.01)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        assert sandboxes.run(sandbox, code, timeout=60).ended.exit_code == 0
    finally:
        over.set()
        looking.join()
    assert seen == ({"0", "1"} if stands_back else {"0"})
    assert eventually(lambda: idle.read_text().strip() == "0"), "the next run begins as any other"


@pytest.mark.soak  # the end of any other run, and test_watchdog.py, have it each time
def test_from_the_deadline_on_nothing_stands_back(sandboxes: Sandboxes) -> None:
    """Or the supervisor, which is in the same group, might get no processor to end the run with."""
    sandbox = sandboxes.make()
    idle, seen, over = _idle_file(sandbox), list[tuple[float, str]](), threading.Event()

    def look() -> None:
        while not over.is_set():
            seen.append((time.monotonic(), idle.read_text().strip()))
            time.sleep(0.01)

    code = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass"
    looking = threading.Thread(target=look)
    looking.start()
    try:
        assert sandboxes.run(sandbox, code, timeout=10).ended.cause == "timeout"
    finally:
        over.set()
        looking.join()
    stood_back = [at for at, value in seen if value == "1"]
    assert stood_back, "it never stood back"
    assert seen[-1][0] - stood_back[-1] > 1, "it came forward a second at least before it was killed"


def test_processor_time_is_that_of_all_processes(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make()
    before = sandbox.cpu_seconds()
    code = """
import os, signal, time
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them, so no parent is told of their time
for _ in range(5):
    if os.fork() == 0:
        while time.process_time() < 0.1: pass
        os._exit(0)
while True:
    try: os.wait()
    except ChildProcessError: break
"""
    assert sandboxes.run(sandbox, code, timeout=60).ended.exit_code == 0
    assert sandbox.cpu_seconds() - before > 0.45


@pytest.mark.parametrize(("code", "wants"), [("sum(range(10**8))", True), ("__import__('time').sleep(5)", False)])
def test_who_wants_a_processor(sandboxes: Sandboxes, code: str, wants: bool) -> None:
    """However little it gets."""
    sandbox, seen = sandboxes.make(), list[bool]()

    def look() -> None:
        assert eventually((sandbox.workspace / "begun").exists)
        while len(seen) < 100:
            seen.append(sandbox.wants_processor())
            time.sleep(0.01)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        assert sandboxes.run(sandbox, f"open('begun', 'w').close()\n{code}", timeout=60).ended.exit_code == 0
    finally:
        looking.join()
    assert seen.count(wants) > len(seen) / 2


async def stands_back(idle: Path) -> None:
    """Wait until it does."""
    async with asyncio.timeout(60):
        while idle.read_text().strip() == "0":  # noqa: ASYNC110  the kernel tells nobody
            await asyncio.sleep(0.02)


async def at_the_end(sandbox: Any, idle: Path, end: str) -> tuple[str, object]:
    """The priority of a run that has stood back and is told to end, and what is to look at it again."""
    running = asyncio.create_task(steps.run(sandbox, "while True: pass"))
    await stands_back(idle)
    await getattr(sandbox, end)()
    seen = idle.read_text().strip(), sandbox._watching.slice._timer
    await running
    return seen


@pytest.mark.parametrize("end", ["stop_run", "kill_run"])
def test_a_run_that_is_told_to_end_does_not_stand_back(sandboxes: Sandboxes, end: str) -> None:
    """Or its supervisor, which is in the same group, might get no processor to end it with."""
    sandbox = sandboxes.make()
    assert sandboxes.do(sandbox, at_the_end, _idle_file(sandbox), end) == ("0", None)


async def comes_forward(sandbox: Any, idle: Path, wanted: Any) -> bool:
    """Whether a process that has used up its slice gets another one by what `wanted` does."""
    process = await steps.started(sandbox, shell("while :; do :; done", stdin=True, channel=True))
    await stands_back(idle)
    await wanted(sandbox, process)
    came_forward = idle.read_text().strip() == "0"
    await process.kill()
    return came_forward


async def types(_: Any, process: Any) -> None:
    await process.write(b"x")


async def asks(_: Any, process: Any) -> None:
    await process.send(b"x")


async def signals(_: Any, process: Any) -> None:
    await process.signal(signal.SIGWINCH)


async def starts_another(sandbox: Any, _: Any) -> None:
    await steps.started(sandbox, shell("exec sleep 1000"))


async def stops_no_run(sandbox: Any, _: Any) -> None:
    await sandbox.stop_run()


async def looks(sandbox: Any, _: Any) -> None:
    await sandbox.process_supervisor()


@pytest.mark.parametrize(
    ("wanted", "comes"),
    [(types, True), (asks, True), (signals, True), (starts_another, True), (looks, False), (stops_no_run, False)],
)
def test_processes_come_forward_for_whoever_waits_for_them(sandboxes: Sandboxes, wanted: Any, comes: bool) -> None:
    sandbox = sandboxes.make()
    assert sandboxes.do(sandbox, comes_forward, _idle_file(sandbox), wanted) is comes
