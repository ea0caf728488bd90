"""What starts bubblewrap: nothing of it outlives the service, at whatever moment that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from os import kill
from pathlib import Path

import pytest

from era.drivers import processes
from era.drivers.launch import Bubblewrap, Survivor
from tests.conftest import eventually, is_running
from tests.hostile.conftest import strace

__all__ = ["strace"]

# A service that starts one bubblewrap. It says its pid, and goes on when it is told to.
SERVICE = """
import os, signal, subprocess, sys
from era.drivers.bubblewrap import _BWRAP
from era.drivers.launch import launch
from era.drivers.options import Plan
from era.drivers.launch import Survivor

def bound(pid):
    print(pid, flush=True)
    sys.stdin.readline()

class Killed(Survivor):
    def add(self, group):
        super().add(group)
        self._process.kill()
        self._process.wait()

survivor = {"lives": Survivor, "is killed": Killed}[sys.argv[1]]()
options = ["--unshare-all", "--unshare-user", "--die-with-parent", "--as-pid-1", "--new-session", "--ro-bind", "/", "/"]
launch(_BWRAP, Plan({}, lambda _: options, ["/bin/cat"]), survivor, bound=bound)
signal.pause()
"""


@contextmanager
def stopping_at_its_first_write(pid: int, log: Path) -> Iterator[None]:
    """Have a process stand still when it has first written something. That is so when the block is left."""
    command = ["strace", "-o", str(log), "-p", str(pid), "-e", "inject=write:signal=STOP:when=1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        assert "attached" in tracer.stderr.readline()
        try:
            yield
            assert eventually(lambda: "stopped by SIGSTOP" in log.read_text())
        finally:
            tracer.send_signal(signal.SIGINT)  # it detaches


@pytest.mark.usefixtures("strace")
@pytest.mark.parametrize("survivor", ["lives", "is killed"])
def test_nothing_waits_for_a_bubblewrap_that_was_killed_with_its_service(tmp_path: Path, survivor: str) -> None:
    """bubblewrap's first process writes what it has made, and only then lets the second one begin."""
    command = [sys.executable, "-c", SERVICE, survivor]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as service:
        try:
            assert service.stdin is not None
            assert service.stdout is not None
            first = int(service.stdout.readline())
            with stopping_at_its_first_write(first, tmp_path / "trace"):
                service.stdin.write(b"\n")
                service.stdin.flush()
            _, second = processes.below(first)
        finally:
            service.kill()
    try:
        assert eventually(lambda: not is_running(first))
        assert eventually(lambda: not is_running(second), 60 if survivor == "lives" else 2) == (survivor == "lives")
    finally:
        with suppress(ProcessLookupError):
            kill(second, signal.SIGKILL)


class Noted(Survivor):
    """One that is told of groups, and kills none."""

    def __init__(self) -> None:
        self.removed: list[int] = []

    def remove(self, group: int) -> None:
        self.removed.append(group)


def killed(process: Bubblewrap) -> None:
    process.kill()
    process.wait()


@pytest.mark.parametrize("end", [Bubblewrap.wait, Bubblewrap.end, Bubblewrap.poll, killed])
def test_a_group_whose_number_is_free_is_killed_no_more(end: Callable[[Bubblewrap], object]) -> None:
    """However it is learned that bubblewrap has ended: else the number, which may be somebody else's by the time that
    the service ends, would be killed then."""
    process = Bubblewrap(["/bin/true"], start_new_session=True)
    process.survivor = survivor = Noted()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    for _ in range(2):
        end(process)
        assert survivor.removed == [process.pid]
