"""Memory where no control group bounds it: a run that takes too much, in whatever way, is ended."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest

from era.core.process import ProcessEnded
from era.drivers import processes
from era.drivers.cgroups import Cgroups
from era.drivers.memory import MemoryWatch
from tests.drivers import process_steps as steps
from tests.drivers.as_user import opened
from tests.soaking import soak_the_rest
from tests.unit.core import until

DRIVERS = ["bubblewrap", "bubblewrap as a user", "gvisor as a user"]
"""The first runs as root, without a control group."""

HELD = """
import mmap, os, sys, time
MIB = 1 << 20
PART = int(os.environ.get('PART', '100')) * MIB
def hold():
    print('GOT', flush=True)
    time.sleep(float(os.environ['SECONDS']))
"""
TAKES = {
    "a shared map": "m = mmap.mmap(-1, 4 * PART)\nfor at in range(0, 4 * PART, 4096): m[at] = 1\nhold()",
    "files in memory": """
fds = [os.memfd_create('m') for _ in range(4)]
for fd in fds:
    for _ in range(PART // MIB): os.write(fd, b'x' * MIB)
hold()
""",
    "a file in memory that is only mapped": """
maps = []
for _ in range(4):
    fd = os.memfd_create('m')
    os.truncate(fd, PART)
    maps.append(mmap.mmap(fd, PART))
    os.closerange(fd, 100)  # and what mmap has made of it
    for at in range(0, PART, 4096): maps[-1][at] = 1
hold()
""",
    "many processes": """
for _ in range(4):
    if os.fork() == 0:
        kept = bytearray(b'x') * PART
        time.sleep(float(os.environ['SECONDS']))
        os._exit(0)
hold()
""",
    "page tables": """
m = mmap.mmap(-1, 200 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_NORESERVE, prot=mmap.PROT_READ)
for at in range(0, 200 << 30, 2 * MIB): m[at]
hold()
""",
}
"""Programs that take four PARTs where sandboxes have 256 MiB, each process and each file less than that."""

PARTS = {"bubblewrap": "100", "gvisor": "140"}
"""In MiB: gVisor is measured as a whole, and has 256 MiB more."""


MIB = 1 << 20


@pytest.mark.parametrize(
    ("measured", "late", "exceeded"),
    [
        ([900, 500, 100, 100], True, False),  # what the run before has left goes away
        ([900, 963, 900, 300], True, False),
        ([900, 965], True, True),
        ([900, 100, 257], True, True),  # and doesn't count any more once it's gone
        ([100, 257], True, True),
        ([257], False, True),
        ([256, 256], False, False),
    ],
)
async def test_memory_of_the_run_before(measured: list[int], late: bool, exceeded: bool) -> None:
    """In MiB, of a sandbox that may take 256."""
    values, ended, loop = iter(measured), asyncio.Event(), asyncio.get_running_loop()

    def measure() -> int:
        value = next(values, None)
        if value is None:
            loop.call_soon_threadsafe(ended.set)
        return (value or 0) * MIB

    async def kill() -> bool:
        ended.set()
        return True

    watch = MemoryWatch(256 * MIB, measure, kill, first=0, gives_back_late=lambda: late)
    watch.interval = 0.001
    watch.start()
    await ended.wait()
    await asyncio.sleep(0)
    watch.stop()
    assert watch.exceeded == exceeded


@pytest.mark.parametrize(("number", "goes_on"), [(errno.EMFILE, True), (errno.ENOENT, False), (errno.ENODEV, False)])
async def test_only_a_sandbox_that_is_gone_is_not_watched_any_more(number: int, goes_on: bool) -> None:
    measured = list[int]()

    def measure() -> int:
        measured.append(len(measured))
        if len(measured) < 3:
            raise OSError(number, os.strerror(number))
        return 257 * MIB

    async def kill() -> bool:
        return True

    watch = MemoryWatch(256 * MIB, measure, kill, first=0)
    watch.interval = 0.001
    watch.start()
    await until(lambda: watch._task is not None and watch._task.done())
    watch.stop()
    assert (watch.exceeded, len(measured)) == ((True, 3) if goes_on else (False, 1))


@pytest.fixture(scope="module", params=DRIVERS)
def sandboxes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    directory = tmp_path_factory.mktemp("sandboxes")
    with patch.object(Cgroups, "find", lambda *_: None), opened(request.param, directory) as made:
        yield made


@pytest.mark.parametrize("code", TAKES.values(), ids=TAKES)
def test_too_much_memory(sandboxes: Any, code: str) -> None:
    if sandboxes.name.startswith("gvisor") and code == TAKES["page tables"]:
        pytest.skip("gVisor ends a program that reads here and there in so large a map")
    sandbox = sandboxes.make()
    assert (sandbox.enforced["cgroup"], sandbox.enforced["memory"]) == (None, "watched")
    part = PARTS[sandboxes.name.partition(" ")[0]]
    result = sandboxes.run(sandbox, HELD + code, env={"SECONDS": "60", "PART": part}, timeout=120)
    assert (result.ended.cause, result.ended.exit_code) == ("oom", 137), result.stderr
    sandboxes.close(sandbox)
    with sandboxes.unwatched() if sandboxes.far else patch.object(MemoryWatch, "start", lambda _: None):
        unwatched = sandboxes.make()
        result = sandboxes.run(unwatched, HELD + code, env={"SECONDS": "0", "PART": part}, timeout=120)
        assert (result.stdout, result.ended.cause) == ("GOT\n", "exit"), "unwatched it goes through"
        sandboxes.close(unwatched)


def test_what_processes_share_counts_once(sandboxes: Any) -> None:
    code = """
kept = bytearray(b'x' * (120 * MIB))
shared = mmap.mmap(-1, 60 * MIB)
for at in range(0, 60 * MIB, 4096): shared[at] = 1
pids = []
for _ in range(4):
    pid = os.fork()
    if pid == 0:
        assert not any(shared[at] != 1 for at in range(0, 60 * MIB, 4096))
        time.sleep(1)
        os._exit(0)
    pids.append(pid)
for pid in pids: os.waitpid(pid, 0)
hold()
"""
    sandbox = sandboxes.make()
    result = sandboxes.run(sandbox, HELD + code, env={"SECONDS": "0"}, timeout=60)
    assert (result.stdout, result.ended.cause) == ("GOT\n", "exit"), result.stderr
    sandboxes.close(sandbox)


@pytest.mark.parametrize("times", soak_the_rest([1, 3], 1))
def test_a_run_after_one_that_took_too_much(sandboxes: Any, times: int) -> None:
    """gVisor gives memory back late, which isn't the next run's fault."""
    sandbox = sandboxes.make()
    env = {"SECONDS": "60", "PART": PARTS[sandboxes.name.partition(" ")[0]]}
    for _ in range(times):
        result = sandboxes.run(sandbox, HELD + TAKES["many processes"], env=env, timeout=120)
        assert (result.ended.cause, result.ended.sandbox_alive) == ("oom", True), result.stderr
        result = sandboxes.run(sandbox, "import time\nfor _ in range(10): time.sleep(0.05)\nprint('well')", timeout=60)
        assert (result.stdout, result.ended.cause) == ("well\n", "exit"), result.ended
    sandboxes.close(sandbox)


GROWS = """
import mmap, os
kept = []
while input():
    if KIND == 'files':
        held = os.memfd_create('held')
        for _ in range(70): os.write(held, b'x' * (1 << 20))
    else:
        kept.append(mmap.mmap(-1, 70 << 20))
        for at in range(0, 70 << 20, 7096): kept[-1][at] = 1
    print('MORE', flush=True)
"""


async def grows_with_each_run(sandbox: Any, kind: str) -> tuple[str, ProcessEnded, int]:
    """Why and how a process ends that takes 70 MiB before each of 20 runs, and before which one: of 256 MiB it leaves
    enough for a run until it takes too much itself. Where a run does and both are killed, each may be told of the kill
    of the other."""
    following = await steps.begun(sandbox, steps.spec("python3", "-c", f"KIND = {kind!r}{GROWS}", stdin=True))
    async with asyncio.timeout(120):
        for times in range(1, 21):
            with contextlib.suppress(BrokenPipeError, AssertionError):  # it has ended
                await following.process.write(b"more\n")
                await following.until(b"MORE", times)
            if following.ended is not None:
                break
            await steps.run(sandbox, "pass")
        else:
            await following.process.kill()
        _, ended = await following.end()
    return ended.cause, ended, times


def test_a_process_does_not_take_more_with_each_run_beside_it(sandboxes: Any) -> None:
    """However short these are; and what a run has left in gVisor, which is none of the next one's fault, is another
    thing. Whose files in memory are isn't known from outside of gVisor, and there the run is ended for them."""
    for kind in ("maps",) if sandboxes.name.startswith("gvisor") else ("maps", "files"):
        sandbox = sandboxes.make()
        cause, *how = sandboxes.do(sandbox, grows_with_each_run, kind)
        assert cause == "oom", (kind, how)
        sandboxes.close(sandbox)


def test_the_end_of_a_process_that_was_killed_can_come_before_the_kill_has_returned(sandboxes: Any) -> None:
    """As on a machine under load, where the thread that kills waits for its turn."""
    if sandboxes.name != "bubblewrap":
        pytest.skip("the same code, in a process of its own; of gVisor all processes are ended, and nothing is asked")
    kill = processes.kill_largest

    def late(*arguments: Any) -> bool:
        was_killed = kill(*arguments)
        time.sleep(1)
        return was_killed

    with patch.object(processes, "kill_largest", late):
        sandbox = sandboxes.make()
        cause, *how = sandboxes.do(sandbox, grows_with_each_run, "maps")
        assert cause == "oom", how
        sandboxes.close(sandbox)


async def ends_beside_a_process(sandbox: Any) -> tuple[str, bool]:
    """How a run ends that takes too much while a process is beside it, and whether that goes on."""
    async with steps.running(sandbox, steps.shell("exec sleep 1000")) as following:
        _, ended = await steps.run(sandbox, HELD + TAKES["a shared map"], {"SECONDS": "20"})
        return ended.cause, following.ended is None


def test_a_run_is_ended_where_who_takes_most_can_t_be_asked(sandboxes: Any) -> None:
    if sandboxes.name != "bubblewrap":
        pytest.skip("the same code, in a process of its own; of gVisor it isn't asked")
    full = OSError(errno.EMFILE, "Too many open files")
    with patch.object(processes, "kill_largest", side_effect=full):
        sandbox = sandboxes.make()
        assert sandboxes.do(sandbox, ends_beside_a_process) == ("oom", True)
        sandboxes.close(sandbox)
