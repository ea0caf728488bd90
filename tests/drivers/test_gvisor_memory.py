"""A program that takes too much memory in gVisor: it ends as anywhere, and gVisor with it doesn't."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from functools import partial
from unittest.mock import patch

import pytest

from era.drivers.cgroups import Group
from era.drivers.gvisor import GvisorSandbox
from era.drivers.process_supervisor import ProcessSupervisor
from tests.drivers import process_steps as steps
from tests.drivers.sandboxes import Sandboxes, Weakness
from tests.drivers.test_memory import grows_with_each_run
from tests.gvisor import needs_gvisor
from tests.soaking import soak_the_rest

pytestmark = [needs_gvisor, pytest.mark.skipif(os.geteuid() != 0, reason="control groups are root's")]

TAKES = {
    "slowly": "kept.append(bytearray(b'1') * (1 << 20))",
    "at once": "kept.append(bytearray(b'1') * (64 << 20))",
    "shared": "kept.append(mmap.mmap(-1, 1 << 22)); kept[-1].write(b'1' * (1 << 22))",
    "in many processes": "kept.append(bytearray(b'1') * (1 << 23)); os.fork()",
}
BOMB = """
import mmap, os
open('.session_data.json', 'w').write('{"kept": true}')
open('file', 'w').close()
print('before', flush=True)
kept = []
while True: TAKE
"""


@pytest.fixture(scope="module")
def gvisor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandboxes]:
    made = Sandboxes(tmp_path_factory.mktemp("gvisor"), Weakness(), "gvisor")
    yield made
    made.stop()


@pytest.mark.parametrize("take", soak_the_rest(TAKES.values(), [TAKES["slowly"], TAKES["shared"]]), ids=TAKES)
def test_it_ends_as_anywhere(gvisor: Sandboxes, take: str) -> None:
    sandbox = gvisor.make()
    result = gvisor.run(sandbox, BOMB.replace("TAKE", take), timeout=60)
    ended = result.ended
    assert (ended.cause, ended.exit_code, ended.sandbox_alive) == ("oom", 137, True)
    assert (result.stdout, ended.state) == ("before\n", b'{"kept": true}')
    assert ended.duration > 0
    assert gvisor.run(sandbox, "print('well')").stdout == "well\n"
    gvisor.close(sandbox)


def test_a_process_that_takes_it_all_is_not_the_runs_fault(gvisor: Sandboxes) -> None:
    sandbox = gvisor.make()
    process, ended, said = gvisor.do(sandbox, steps.out_of_memory_beside_a_run)
    assert (process.cause, process.signal) == ("oom", 9)
    assert (ended.cause, ended.exit_code, said) == ("exit", 0, "well")
    gvisor.close(sandbox)


def test_a_process_that_takes_more_with_each_run_is_ended_before_gvisor_is(gvisor: Sandboxes) -> None:
    sandbox = gvisor.make()
    cause, *how = gvisor.do(sandbox, grows_with_each_run, "maps")
    assert cause == "oom", how
    assert gvisor.run(sandbox, "print('well')").stdout == "well\n"
    assert sandbox.alive
    gvisor.close(sandbox)


def test_nor_where_that_takes_a_while_to_be_told(gvisor: Sandboxes) -> None:
    """As on a busy machine: the answer comes only once there was a look at whether it can be waited for."""
    has_reserve = GvisorSandbox._has_reserve
    come: list[Callable[[], None]] = []

    def late(supervisor: ProcessSupervisor) -> asyncio.Future[int]:
        supervisor._asked.append(answer := asyncio.get_running_loop().create_future())
        come.append(partial(supervisor.send, b"M", 0))
        return answer

    def then_it_comes(sandbox: GvisorSandbox) -> bool:
        if come:
            come.pop()()
        return has_reserve(sandbox)

    with patch.object(ProcessSupervisor, "_ask", late), patch.object(GvisorSandbox, "_has_reserve", then_it_comes):
        sandbox = gvisor.make()
        process, ended, said = gvisor.do(sandbox, steps.out_of_memory_beside_a_run, 1 << 20)
    assert (process.cause, process.signal) == ("oom", 9)
    assert (ended.cause, ended.exit_code, said) == ("exit", 0, "well")
    gvisor.close(sandbox)


def test_unless_nobody_can_say_who_takes_it(gvisor: Sandboxes) -> None:
    async def silent(_: ProcessSupervisor, may_wait: Callable[[], bool]) -> None:
        assert may_wait() in (True, False)

    with patch.object(ProcessSupervisor, "memory_bytes", silent):
        sandbox = gvisor.make()
        _, ended, said = gvisor.do(sandbox, steps.out_of_memory_beside_a_run)
    assert (ended.cause, ended.exit_code, said) == ("oom", 137, "well")
    gvisor.close(sandbox)


def test_left_to_the_kernel_it_ends_otherwise(gvisor: Sandboxes) -> None:
    """It kills what it likes: gVisor, or a process of gVisor's that stands for the program."""
    with patch.object(GvisorSandbox, "memory_watch", lambda *_: None):
        sandbox = gvisor.make()
        ended = gvisor.run(sandbox, BOMB.replace("TAKE", TAKES["slowly"]), timeout=60).ended
    assert (ended.exit_code, ended.sandbox_alive) != (137, True)
    assert ended.cause == "oom"
    gvisor.close(sandbox)


def test_a_sandbox_that_the_kernel_ended_says_so(gvisor: Sandboxes) -> None:
    sandbox = gvisor.make()
    kills = iter([0])  # before the run, and one more as soon as it has begun
    with patch.object(Group, "out_of_memory_kills", lambda _: next(kills, 1)):
        code = "import time; print('before', flush=True); time.sleep(60)"
        result = gvisor.run(sandbox, code, meanwhile="murder")
    assert (result.stdout, result.ended.cause, result.ended.exit_code) == ("before\n", "oom", 137)
    assert "out of memory" in str(result.ended.state_problem)
    assert result.ended.duration > 0
    gvisor.close(sandbox)
