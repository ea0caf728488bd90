"""A working directory that outgrows its limits while a program runs: with files/allowance.py, and without."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from era.core.files.allowance import bounded
from era.core.models import EMPTY
from era.core.program import Ended, Output, Program
from tests.drivers.sandboxes import LIMITS, Sandboxes

SLOWLY = """
import os, time
def write(file):
    for _ in range(8): file.write(b'x' * (1 << 18)); file.flush(); time.sleep(0.02)
"""
GROWS = {
    "files": "for n in range(4): write(open(f'{n}', 'wb'))",
    "files below": "for n in range(4):\n    os.makedirs(f'd{n}/e'); write(open(f'd{n}/e/f', 'wb'))",
    "files without names": """
held = []
for n in range(4):
    held.append(open('f', 'wb')); os.unlink('f'); write(held[-1])
""",
    "installed files": "for n in range(4): write(open(f'/opt/session/share/{n}', 'wb'))",
    "many empty files": "for n in range(300): open(f'{n}', 'w').close(); time.sleep(0.002)",
    "many directories": "for n in range(300): os.mkdir(f'{n}'); time.sleep(0.002)",
}
"""Programs that go over 4 MiB or 200 entries, and then say so."""

type Runs = Callable[[Program], AsyncIterator[Output | Ended]]


def ended(sandboxes: Sandboxes, runs: Runs, code: str) -> tuple[str, Ended]:
    async def follow() -> tuple[str, Ended]:
        said = b""
        async for event in runs(Program(code.encode(), b"{}", {}, 30, False, {})):
            if isinstance(event, Ended):
                result = event
            elif event.stream == "stdout":
                said += event.data
        return said.decode(), result

    return sandboxes._runner.run(follow())


@pytest.mark.parametrize("code", GROWS.values(), ids=GROWS)
def test_it_is_ended(sandboxes: Sandboxes, code: str) -> None:
    limits = replace(LIMITS, disk_bytes=4 << 20, files=200)
    sandbox = sandboxes._runner.run(sandboxes.driver.create("python", limits))
    program = SLOWLY + code + "\ntime.sleep(1.2)\nprint('all of it')"  # or what others free meanwhile would hide it
    said, result = ended(sandboxes, lambda program: bounded(sandbox, program, EMPTY), program)
    assert (said, result.cause, result.sandbox_alive) == ("", "disk_full", True)
    assert "the working directory outgrew" in str(result.disk_problem)

    unwatched = sandboxes._runner.run(sandboxes.driver.create("python", limits))
    said, result = ended(sandboxes, unwatched.run, program)
    assert (said, result.cause) == ("all of it\n", "exit"), "without the watch it goes through"
    for each in (sandbox, unwatched):
        sandboxes.close(each)


def test_what_fits_is_left_alone(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes._runner.run(sandboxes.driver.create("python", replace(LIMITS, disk_bytes=4 << 20, files=200)))
    code = SLOWLY + "for n in range(6):\n    write(open('f', 'wb')); os.unlink('f')\nprint('all of it')"
    said, result = ended(sandboxes, lambda program: bounded(sandbox, program, EMPTY), code)
    assert (said, result.cause, result.disk_problem) == ("all of it\n", "exit", None)
    sandboxes.close(sandbox)
