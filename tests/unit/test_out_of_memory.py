"""Whose end is put down to want of memory, by what the kernel counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from era.core.program import Ended
from era.drivers.memory import OutOfMemory, Watches


@dataclass
class Group:
    """A control group in which the kernel has killed so many processes."""

    kills: int = 0

    def out_of_memory_kills(self) -> int:
        return self.kills


@pytest.fixture
def group() -> Group:
    return Group()


@pytest.fixture
def memory(group: Group) -> OutOfMemory:
    made, counts = OutOfMemory(), group
    made.group = counts  # type: ignore[assignment]  # of which nothing else is asked
    return made


def end(memory: OutOfMemory, exit_code: int = 1, **more: Any) -> str:
    """The cause of a run's end."""
    known = {"duration": 1.0, "state": None, "state_problem": None, "stdout_truncated": False, "cause": "exit"}
    known |= {"stderr_truncated": False, "reaped": 0, "peak_memory_bytes": None, "cpu_us": None, "sandbox_alive": True}
    return memory.classify(Ended(exit_code=exit_code, **{**known, **more}), Watches()).cause


def test_a_run_that_fails_after_a_kill_was_out_of_memory(group: Group, memory: OutOfMemory) -> None:
    memory.begin_run()
    group.kills += 1
    assert end(memory) == "oom"
    memory.begin_run()
    assert end(memory) == "exit"


@pytest.mark.parametrize("first", [0, 1], ids=["well", "killed by us"])
def test_a_kill_in_one_run_is_none_in_the_next(group: Group, memory: OutOfMemory, first: int) -> None:
    memory.begin_run()
    group.kills += 1
    end(memory, first, cause="timeout")
    memory.begin_run()
    assert end(memory) == "exit"


def test_a_kill_before_there_were_processes_is_none_of_theirs(group: Group, memory: OutOfMemory) -> None:
    memory.begin_run()
    group.kills += 1
    assert end(memory, 0) == "exit"
    memory.begin_processes()
    assert not memory.has_killed(7)
    group.kills += 1
    assert memory.has_killed(7)
    assert not memory.has_killed(7)


def test_a_kill_counts_once_for_a_run_and_a_process(group: Group, memory: OutOfMemory) -> None:
    memory.begin_processes()
    memory.begin_run()
    group.kills += 1
    assert memory.has_killed(7)
    assert end(memory) == "exit"


def test_a_process_that_we_killed_is_not_the_run_s(memory: OutOfMemory) -> None:
    memory.begin_run()
    memory.will_kill(7)
    assert end(memory) == "exit"
    assert not memory.has_killed(8), "another one, which somebody else has killed"
    assert memory.has_killed(7)
    assert not memory.has_killed(7)
