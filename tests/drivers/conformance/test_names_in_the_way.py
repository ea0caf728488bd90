"""Processes that keep putting something else where files of runs belong: the sandbox and the processes go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests.drivers.conformance.helpers import is_alive
from tests.drivers.process_steps import begun, run, spec

STATE_FILE = ".session_data.json"
SWAPS = """
import os, shutil, socket, sys

def put_pipe(path): os.mkfifo(path)
def put_link(path): os.symlink("/usr", path)
def put_socket(path): socket.socket(socket.AF_UNIX).bind(path)
def put_directory(path): os.makedirs(path + "/below")

kinds = [globals()[f"put_{name}"] for name in sys.argv[2:]]
os.write(1, b"up")
while True:
    for put in kinds:
        try: os.unlink(sys.argv[1])
        except OSError: shutil.rmtree(sys.argv[1], ignore_errors=True)
        try: put(sys.argv[1])
        except OSError: pass
"""


async def runs_beside_swaps(
    sandbox: Any, path: str, kinds: Sequence[str], count: int
) -> tuple[set[tuple[str, int]], set[str | None]]:
    """Processes put these kinds of files at `path` in a loop, and `count` runs go on beside them. Returns what the runs
    printed with their exit codes, and their problems with the state file."""
    beside = [await begun(sandbox, spec("python3", "-c", SWAPS, path, *kinds)) for _ in range(2)]
    for following in beside:
        await following.until(b"up")
    said, problems = set(), set()
    for _ in range(count):
        printed, ended = await run(sandbox, "print('well')")
        assert ended.sandbox_alive
        said.add((printed, ended.exit_code))
        problems.add(ended.state_problem)
    assert all(following.ended is None for following in beside)
    for following in beside:
        await following.process.kill()
        await following.end()
    return said, problems


@pytest.mark.parametrize("kinds", [("pipe", "link", "socket", "directory"), ("pipe",), ("socket",), ("directory",)])
def test_state_file_is_swapped_beside_runs(sandboxes: Any, kinds: Sequence[str]) -> None:
    sandbox = sandboxes.make()
    said, problems = sandboxes.do(sandbox, runs_beside_swaps, STATE_FILE, kinds, 40)
    assert said == {("well\n", 0)}
    if len(kinds) == 1:
        named = {"pipe": "a named pipe"}.get(kinds[0], f"a {kinds[0]}")
        assert any(named in problem for problem in problems if problem is not None), problems
    assert is_alive(sandboxes, sandbox)
    assert sandboxes.run(sandbox, "print(open('.session_data.json').read())").stdout == "{}\n"
    sandboxes.close(sandbox)


def test_program_file_is_swapped_beside_runs(sandboxes: Any) -> None:
    """Its run may be another program then, or none. The sandbox is there for the next one."""
    sandbox = sandboxes.make()
    sandboxes.do(sandbox, runs_beside_swaps, "main.py", ("link", "socket", "directory"), 20)
    sandboxes.close(sandbox)


MEDDLES = {
    "closes the directory": "os.chmod(here, 0)",
    "makes it read-only": "os.chmod(here, 0o500)",
    "removes unfinished files": "[os.unlink(n) for n in os.listdir() if len(n) == 17]",
    "renames unfinished files": "[os.rename(n, 'x') for n in os.listdir() if len(n) == 17]",
}
MEDDLING = """
import os
here = os.getcwd()
os.write(1, b"up")
while True:
    try: {}
    except OSError: pass
"""


async def runs_beside_meddling(sandbox: Any, call: str) -> None:
    """A process makes this call in a loop, and runs go on beside it. They may fail."""
    beside = await begun(sandbox, spec("python3", "-c", MEDDLING.format(call)))
    await beside.until(b"up")
    for _ in range(25):
        assert (await run(sandbox, "print('well')"))[1].sandbox_alive
    assert beside.ended is None
    await beside.process.kill()
    await beside.end()


@pytest.mark.parametrize("how", MEDDLES)
def test_processes_go_on_when_they_change_the_directory(sandboxes: Any, how: str) -> None:
    sandbox = sandboxes.make()
    sandboxes.do(sandbox, runs_beside_meddling, MEDDLES[how])
    assert is_alive(sandboxes, sandbox)
    assert sandboxes.run(sandbox, "print('well')").stdout == "well\n"
    sandboxes.close(sandbox)
