"""A working directory that outgrows its limits while a program runs: with files/allowance.py, and without."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from era.core.models import EMPTY
from era.core.program import Ended, Output, Program
from era.core.trees.allowance import bounded
from era.drivers import processes
from tests.drivers.sandboxes import LIMITS, Sandboxes, Weakness
from tests.gvisor import needs_gvisor
from tests.soaking import soak_the_rest

CODE = (
    "b80900000031ffbe00100000ba0700000041ba2200000049c7c0ffffffff4531c90f0548"
    "89c7488d35d3ffffffb970000000f3a4488d803d000000ffe0b80b000000bf00004000be"
    "001000000f05b801000000bf01000000488d3510000000ba010000000f05b8220000000f"
    "05ebf778"
)
"""A program for x86-64 that copies itself into other memory, goes on there, takes the map of its file away, writes an
"x" and waits for ever."""

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
    "files that are only mapped": """
import mmap
held = []
for n in range(4):
    file = open('f', 'w+b'); os.unlink('f'); write(file)
    held.append((file, mmap.mmap(file.fileno(), 0))); os.closerange(file.fileno(), 100)  # and what mmap has made of it
""",
    "files of which a page is mapped": """
import ctypes
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
for n in range(4):
    file = open('f', 'w+b'); os.unlink('f'); write(file)
    assert libc.mmap(None, 4096, 1, 1, file.fileno(), ctypes.c_long(0)) not in (None, 2**64 - 1)
    file.close()
""",
    "files of programs": f"""
import struct, subprocess
code = bytes.fromhex('{CODE}')
size = 120 + len(code)
head = b'\\x7fELF\\2\\1\\1' + bytes(9) + struct.pack('<HHIQQQIHHHHHH', 2, 62, 1, 0x400078, 64, 0, 0, 64, 56, 1, 0, 0, 0)
head += struct.pack('<IIQQQQQQ', 1, 5, 0, 0x400000, 0x400000, size, size, 4096)
for n in range(4):
    with open('f', 'wb') as file: file.write(head + code); write(file)
    os.chmod('f', 0o700)
    assert subprocess.Popen('./f', stdout=subprocess.PIPE).stdout.read(1) == b'x'
    os.unlink('f')
""",
    "installed files": "for n in range(4): write(open(f'/opt/session/share/{n}', 'wb'))",
    "many empty files": "for n in range(300): open(f'{n}', 'w').close(); time.sleep(0.002)",
    "many directories": "for n in range(300): os.mkdir(f'{n}'); time.sleep(0.002)",
}
"""Programs that go over 4 MiB or 200 entries, and then say so."""

IN_FLIGHT = """
import os, socket, sys, time
for _ in range(int(os.environ['TIMES'])):
    ours, theirs = socket.socketpair()
    for _ in range(3):
        with open('f', 'wb') as file:
            os.unlink('f')
            for _ in range(100): file.write(b'x' * (1 << 20))
            file.flush()
            socket.send_fds(ours, [b'x'], [file.fileno()])
    time.sleep(1.5)
    ours.close(), theirs.close()
print('all of it')
"""
"""300 MiB of files in a socket's queue: several times, since what others free meanwhile may hide them."""

of_x86_64 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="it is machine code")

IN_A_CALL = """
import os, socket, sys, threading, time
for _ in range(int(os.environ['TIMES'])):
    pipe, end = os.pipe()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    try:
        while True: ours.send(b'x' * (1 << 16))
    except BlockingIOError: pass
    ours.setblocking(True)
    def splice(file):
        try: os.splice(pipe, file, 1)
        except OSError: pass
    def send(file):
        try: socket.send_fds(ours, [b'x'], [file])
        except OSError: pass
    for _ in range(3):
        file = os.open('f', os.O_WRONLY | os.O_CREAT)
        os.unlink('f')
        for _ in range(100): os.write(file, b'x' * (1 << 20))
        threading.Thread(target=HOLD, args=[file]).start()
        time.sleep(0.1)
        os.close(file)
    time.sleep(1.5)
    os.close(end), theirs.close()
    time.sleep(0.2)
    os.close(pipe), ours.close()
print('all of it')
"""
"""300 MiB of files in calls that wait: of closed descriptors a call has what they were of until it ends."""

type Runs = Callable[[Program], AsyncIterator[Output | Ended]]


def ended(sandboxes: Sandboxes, runs: Runs, code: str, env: dict[str, str] | None = None) -> tuple[str, Ended]:
    async def follow() -> tuple[str, Ended]:
        said = b""
        async for event in runs(Program(code.encode(), b"{}", env or {}, 120, False, {})):
            if isinstance(event, Ended):
                result = event
            elif event.stream == "stdout":
                said += event.data
        return said.decode(), result

    return sandboxes._runner.run(follow())


LIKE_OTHERS = ("files below", "many directories", "files of which a page is mapped")
"""Of these programs, those that differ little from others."""


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(
            code,
            marks=[
                *([of_x86_64] if name == "files of programs" else []),
                *([pytest.mark.soak] if name in LIKE_OTHERS else []),
            ],
            id=name,
        )
        for name, code in GROWS.items()
    ],
)
def test_it_is_ended(sandboxes: Sandboxes, code: str) -> None:
    limits = replace(LIMITS, disk_bytes=4 << 20, files=200)
    sandbox = sandboxes._runner.run(sandboxes.driver.create("python", limits))
    code = SLOWLY + code
    waiting = code + "\ntime.sleep(60)\nprint('all of it')"  # a machine may be busy, and what others free hide it
    said, result = ended(sandboxes, lambda program: bounded(sandbox, program, EMPTY), waiting)
    assert (said, result.cause, result.sandbox_alive) == ("", "disk_full", True)
    measured, hidden = "the working directory outgrew", "only in maps"  # of these an ordinary user sees a page
    assert any(problem in str(result.disk_problem) for problem in (measured, hidden))

    unwatched = sandboxes._runner.run(sandboxes.driver.create("python", limits))
    said, result = ended(sandboxes, unwatched.run, code + "\ntime.sleep(1.2)\nprint('all of it')")
    assert (said, result.cause) == ("all of it\n", "exit"), "without the watch it goes through"
    for each in (sandbox, unwatched):
        sandboxes.close(each)


def test_what_fits_is_left_alone(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes._runner.run(sandboxes.driver.create("python", replace(LIMITS, disk_bytes=4 << 20, files=200)))
    code = SLOWLY + "for n in range(6):\n    write(open('f', 'wb')); os.unlink('f')\nprint('all of it')"
    said, result = ended(sandboxes, lambda program: bounded(sandbox, program, EMPTY), code)
    assert (said, result.cause, result.disk_problem) == ("all of it\n", "exit", None)
    sandboxes.close(sandbox)


@pytest.mark.parametrize(
    "which",
    soak_the_rest(
        ["files that are only mapped", "files of which a page is mapped"], ["files of which a page is mapped"]
    ),
)
def test_files_that_are_only_mapped_count_for_an_ordinary_user_too(
    sandboxes: Sandboxes, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """To whom the kernel shows no files by maps."""
    monkeypatch.setattr(processes, "_MAPS", "none")
    test_it_is_ended(sandboxes, GROWS[which])


def test_maps_of_deleted_files_alone_are_no_harm(sandboxes: Sandboxes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_MAPS", "none")
    much = replace(LIMITS, disk_bytes=64 << 30)  # more than other tests take of the disk meanwhile
    sandbox = sandboxes._runner.run(sandboxes.driver.create("python", much))
    code = SLOWLY + GROWS["files of which a page is mapped"] + "\ntime.sleep(1.2)\nprint('all of it')"
    said, result = ended(sandboxes, lambda program: bounded(sandbox, program, EMPTY), code)
    assert (said, result.cause, result.disk_problem) == ("all of it\n", "exit", None)
    sandboxes.close(sandbox)


@pytest.mark.parametrize(
    "code",
    soak_the_rest([IN_FLIGHT, IN_A_CALL.replace("HOLD", "splice"), IN_A_CALL.replace("HOLD", "send")], 2),
    ids=["in a socket's queue", "in splice", "in send"],
)
def test_files_that_cannot_be_found_end_the_run(
    sandboxes: Sandboxes, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    limits = replace(LIMITS, disk_bytes=128 << 20)
    sandbox = sandboxes._runner.run(sandboxes.driver.create("python", limits))
    said, result = ended(sandboxes, lambda program: bounded(sandbox, program, EMPTY), code, {"TIMES": "20"})
    assert (said, result.cause) == ("", "disk_full")
    assert "sockets' queues" in str(result.disk_problem)
    monkeypatch.setattr(processes, "hide_files", lambda *_: False)
    said, result = ended(sandboxes, lambda program: bounded(sandbox, program, EMPTY), code, {"TIMES": "1"})
    assert (said, result.cause) == ("all of it\n", "exit"), "it isn't found otherwise"
    sandboxes.close(sandbox)


@pytest.mark.parametrize(
    "code", soak_the_rest([IN_FLIGHT, IN_A_CALL.replace("HOLD", "send")], 1), ids=["in a queue", "in a call"]
)
def test_descriptors_in_flight_alone_are_no_harm(sandboxes: Sandboxes, code: str) -> None:
    sandbox = sandboxes._runner.run(sandboxes.driver.create("python", LIMITS))
    code = code.replace("range(100)", "range(1)")
    said, result = ended(sandboxes, lambda program: bounded(sandbox, program, EMPTY), code, {"TIMES": "2"})
    assert (said, result.cause, result.disk_problem) == ("all of it\n", "exit", None)
    sandboxes.close(sandbox)


@needs_gvisor
@pytest.mark.parametrize(
    "code",
    [
        pytest.param(GROWS["files that are only mapped"], marks=pytest.mark.soak, id="mapped"),
        pytest.param(GROWS["files of programs"], marks=[of_x86_64, pytest.mark.soak], id="run"),
        pytest.param(IN_FLIGHT, id="in flight"),
    ],
)
def test_gvisor_has_a_descriptor_of_each_file(tmp_path: Path, code: str) -> None:
    weakness = Weakness(limits=replace(LIMITS, disk_bytes=128 << 20))
    made = Sandboxes(tmp_path / "gvisor", weakness, "gvisor")
    sandbox = made.make()
    # As long as the watch may take on a busy machine.
    program = SLOWLY.replace("range(8)", "range(160)").replace("0.02", "0.002") + code
    program += "\ntime.sleep(float(os.environ['TIMES']))\nprint('all')"
    said, result = ended(made, lambda program: bounded(sandbox, program, EMPTY), program, {"TIMES": "20"})
    assert (said, result.cause) == ("", "disk_full")
    assert "outgrew" in str(result.disk_problem)
    said, result = ended(made, made.make().run, program, {"TIMES": "1"})
    assert (said.endswith("all\n"), result.cause) == (True, "exit"), "without the watch it goes through"
    made.stop()
