"""Numbered steps of a service, and a kill at any of them.

Theory of operation. A step is a system call that makes progress: content goes into a file, a file to the disk, a name
into a directory, an answer to a client. `recorded` has strace write down which of the service's threads makes which
steps during an operation. `kill_at` has strace send SIGKILL when one thread is about to make one of them for the nth
time; neither that call nor any other is carried out. A thread's steps come in the same order in every attempt
(served.py sees to that), so n = 1, 2, 3 … for each thread and call meets every state between two steps.

Only threads that exist at the beginning are traced, and no process of a sandbox.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

STEPS = (
    "write,writev,pwrite64,sendfile,copy_file_range,sendto,sendmsg,fsync,fdatasync,syncfs,ftruncate,utimensat,"
    "rename,renameat,renameat2,link,linkat,unlink,unlinkat,mkdir,mkdirat,rmdir"
)
_LINE = re.compile(r"^(\d+) +(\w+)\(")


class Step(NamedTuple):
    """The nth time that a thread makes a system call."""

    thread: str
    call: str
    n: int


def threads(pid: int) -> dict[str, int]:
    """The thread ids of a service by name; the first thread is `main`."""
    tids = {
        task.joinpath("comm").read_text().strip(): int(task.name)
        for task in Path(f"/proc/{pid}/task").iterdir()
        if task.name != str(pid)
    }
    return tids | {"main": pid}


@contextmanager
def _traced(tids: Sequence[int], log: Path, what: str) -> Iterator[None]:
    """Trace these threads with strace's expression `what`; the trace is written to `log`."""
    command = ["strace", "-o", str(log), "-s", "0", *(part for tid in tids for part in ("-p", str(tid))), "-e", what]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        for _ in tids:
            line = strace.stderr.readline()
            assert "attached" in line, line
        try:
            yield
        finally:
            strace.send_signal(signal.SIGINT)  # strace detaches from the threads that are left.


def recorded(pid: int, log: Path, act: Callable[[], object]) -> list[Step]:
    """Run `act` and return the steps that the service makes meanwhile, in order."""
    names = {tid: name for name, tid in threads(pid).items()}
    with _traced(list(names), log, f"trace={STEPS}"):
        act()
    steps, counts = [], Counter[tuple[str, str]]()
    for line in log.read_text().splitlines():
        if match := _LINE.match(line):
            thread, call = names[int(match[1])], match[2]
            counts[thread, call] += 1
            steps.append(Step(thread, call, counts[thread, call]))
    return steps


def kill_at(pid: int, step: Step, log: Path, act: Callable[[], object]) -> bool:
    """Run `act` and kill the service when it is about to make `step`; whether it came to that."""
    tid = threads(pid)[step.thread]
    with _traced([tid], log, f"inject={step.call}:signal=SIGKILL:when={step.n}"):
        act()
    return len(re.findall(rf"^(?:\d+ +)?{step.call}\(", log.read_text(), re.MULTILINE)) >= step.n


def calls_of(steps: Sequence[Step]) -> Mapping[tuple[str, str], int]:
    """How often each thread makes each call."""
    return Counter((step.thread, step.call) for step in steps)


@dataclass(frozen=True)
class Disk:
    """The files of a data directory, read without the service."""

    data_dir: Path

    def blobs(self) -> set[str]:
        """The names of the blobs."""
        return {path.name for path in (self.data_dir / "blobs").rglob("*") if path.is_file()}

    def leftovers(self) -> list[str]:
        """Files of uploads and runs, of which none may be left when none is under way. The service's templates are none
        of these: it has one, and the next one now and then."""
        places = ("uploads", "blobs/incoming", "live")
        found = [f"{place}/{name}" for place in places for name in os.listdir(self.data_dir / place)]
        templates = [name for name in found if name.startswith("live/template-")]
        return [name for name in found if name not in templates] + templates[2:]
