"""Runs that have used their slice of processor time stand back behind all others; those that only wait don't."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from era.drivers.bubblewrap import BubblewrapSandbox
from tests.conftest import eventually
from tests.drivers.sandboxes import Sandboxes

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only in a control group can a run stand back")


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
