"""A working directory that outgrows its disk while a program runs: with the watch over it, and without."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from era.core.files.allowance import bounded
from era.core.models import EMPTY
from era.core.program import Ended, Output, Program
from tests.drivers.boxes import LIMITS, Boxes

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
    "many empty files": "for n in range(300): open(f'{n}', 'w').close(); time.sleep(0.002)",
    "many directories": "for n in range(300): os.mkdir(f'{n}'); time.sleep(0.002)",
}
"""What goes over 4 MiB or 200 entries, and then says so."""

type Runs = Callable[[Program], AsyncIterator[Output | Ended]]


def ended(boxes: Boxes, runs: Runs, code: str) -> tuple[str, Ended]:
    async def follow() -> tuple[str, Ended]:
        said = b""
        async for event in runs(Program(code.encode(), b"{}", {}, 30, False, {})):
            if isinstance(event, Ended):
                told = event
            elif event.stream == "stdout":
                said += event.data
        return said.decode(), told

    return boxes._runner.run(follow())


@pytest.mark.parametrize("code", GROWS.values(), ids=GROWS)
def test_it_is_ended(boxes: Boxes, code: str) -> None:
    limits = replace(LIMITS, disk_bytes=4 << 20, files=200)
    box = boxes._runner.run(boxes.driver.create("python", limits))
    program = SLOWLY + code + "\ntime.sleep(1.2)\nprint('all of it')"  # or what others free meanwhile would hide it
    said, told = ended(boxes, lambda program: bounded(box, program, EMPTY), program)
    assert (said, told.cause, told.sandbox_alive) == ("", "disk_full", True)
    assert "the working directory outgrew" in str(told.disk_problem)

    unwatched = boxes._runner.run(boxes.driver.create("python", limits))
    said, told = ended(boxes, unwatched.run, program)
    assert (said, told.cause) == ("all of it\n", "exit"), "without the watch it goes through"
    for each in (box, unwatched):
        boxes.close(each)


def test_what_fits_is_left_alone(boxes: Boxes) -> None:
    box = boxes._runner.run(boxes.driver.create("python", replace(LIMITS, disk_bytes=4 << 20, files=200)))
    code = SLOWLY + "for n in range(6):\n    write(open('f', 'wb')); os.unlink('f')\nprint('all of it')"
    said, told = ended(boxes, lambda program: bounded(box, program, EMPTY), code)
    assert (said, told.cause, told.disk_problem) == ("all of it\n", "exit", None)
    boxes.close(box)
