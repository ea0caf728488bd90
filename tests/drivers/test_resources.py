"""Whatever a program uses up, only its own run ends, with the right outcome."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.conftest import eventually
from tests.drivers.boxes import Boxes

ROOT = os.geteuid() == 0

HEAP = "kept = []\nwhile True: kept.append(bytearray(1 << 20))"
MEMFD = "import os\nfd = os.memfd_create('m')\nwhile True: os.write(fd, b'x' * (1 << 20))"
CHILDREN = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
THREADS = "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()"


def _still_well(boxes: Boxes, box: object) -> None:
    told = boxes.run(box, "print('well')")  # type: ignore[arg-type]  # a sandbox of these boxes
    assert (told.stdout, told.ended.exit_code) == ("well\n", 0)


@pytest.mark.parametrize("code", [HEAP, MEMFD], ids=["heap", "memfd"])
def test_too_much_memory(boxes: Boxes, code: str) -> None:
    if not ROOT and code == MEMFD:
        pytest.skip("without a cgroup nothing bounds a memfd but the file size, and an ordinary user has no cgroup")
    box = boxes.make()
    told = boxes.run(box, code)
    if ROOT:
        assert (told.ended.cause, told.ended.exit_code) == ("oom", 137)
    else:
        assert told.ended.exit_code == 1
        assert "MemoryError" in told.stderr
    _still_well(boxes, box)


def test_a_fork_bomb_ends_at_the_deadline_and_leaves_nothing(boxes: Boxes) -> None:
    box = boxes.make()
    told = boxes.run(box, CHILDREN, timeout=1)
    assert (told.ended.cause, told.ended.exit_code) == ("timeout", 124)
    assert 30 < told.ended.reaped <= 64 + 8
    _still_well(boxes, box)
    if ROOT:
        procs = next(Path("/sys/fs/cgroup").glob(f"**/era-test-*/{box.id}/cgroup.procs"))
        assert eventually(lambda: len(procs.read_text().split()) <= 3)  # bubblewrap, the supervisor, one spare


def test_threads_are_bounded(boxes: Boxes) -> None:
    box = boxes.make()
    told = boxes.run(box, THREADS, timeout=3)
    assert "can't start new thread" in told.stderr
    _still_well(boxes, box)


@pytest.mark.parametrize("directory", ["/tmp", "/dev/shm"])
def test_a_full_scratch_directory(boxes: Boxes, directory: str) -> None:
    box = boxes.make()
    told = boxes.run(box, f"f = open('{directory}/big', 'wb')\nwhile True: f.write(bytes(1 << 20)); f.flush()")
    assert "No space left on device" in told.stderr
    gone = boxes.run(box, f"import os; print(os.listdir('{directory}'))")
    assert gone.stdout == "[]\n"


def test_a_file_over_its_bound(boxes: Boxes) -> None:
    box = boxes.make()
    told = boxes.run(box, "open('big', 'wb').truncate(300 << 20)")
    assert "File too large" in told.stderr


def test_deep_trees_and_many_files_are_cleared_away(boxes: Boxes) -> None:
    box = boxes.make()
    code = (
        "import os\n"
        "os.chdir('/tmp')\n"
        "for i in range(2000):\n    os.mkdir('d'); os.chdir('d')\n"
        "os.chdir('/dev/shm')\n"
        "for i in range(5000): open(str(i), 'w').close()\n"
        "os.mkdir('locked'); open('locked/f', 'w').close(); os.chmod('locked', 0)\n"
    )
    told = boxes.run(box, code)
    assert told.ended.exit_code == 0, told.stderr
    assert boxes.run(box, "import os; print(os.listdir('/tmp'), os.listdir('/dev/shm'))").stdout == "[] []\n"


@pytest.mark.parametrize("call", ["semget(1, 1, {})", "shmget(1, 4096, {})", "msgget(1, {})"])
def test_system_v_objects_are_not_handed_on(boxes: Boxes, call: str) -> None:
    """They outlive processes, but not the run."""
    box = boxes.make()
    code = "import ctypes; print(ctypes.CDLL(None)." + call + ")"
    assert boxes.run(box, code.format("0o1600")).stdout != "-1\n"
    assert boxes.run(box, code.format("0o600")).stdout == "-1\n"


def test_a_run_costs_no_more_than_its_deadline(boxes: Boxes) -> None:
    """SIGTERM at the deadline, SIGKILL two seconds later, whatever the program does about it."""
    box = boxes.make()
    code = (
        "import os, signal, time\n"
        "for number in range(1, 32):\n"
        "    if number not in (9, 19): signal.signal(number, signal.SIG_IGN)\n"
        "for _ in range(5):\n    os.fork()\n"
        "os.setsid() if os.getpid() != os.getsid(0) else None\n"
        "print('in', flush=True)\n"
        "time.sleep(60)\n"
    )
    begun = time.monotonic()
    told = boxes.run(box, code, timeout=0.5)
    assert 2.4 < time.monotonic() - begun < 6
    assert (told.ended.cause, told.ended.exit_code) == ("timeout", 124)
    assert "in" in told.stdout
    _still_well(boxes, box)
