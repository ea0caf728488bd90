"""drivers.processes: the processors that processes use, whatever their names and however many threads they have."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from era.cluster import host_process
from era.drivers import processes
from tests.conftest import eventually

THREADS = """
import sys, threading
for _ in range(int(sys.argv[1])): threading.Thread(target=threading.Event().wait, daemon=True).start()
print(flush=True)
if sys.argv[2] == "works":
    while True: pass
threading.Event().wait()
"""


@contextmanager
def started(*command: str | bytes) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


def test_a_process_may_be_named_by_any_bytes(tmp_path: Path) -> None:
    """Whoever looks at it kills what goes on after its time: a name that can't be read would keep it from that."""
    name = os.fsencode(tmp_path) + b"/) \xff R"
    shutil.copy(b"/bin/sleep", name)
    with started(name, "60") as process:
        assert eventually(lambda: b"\xff" in Path(f"/proc/{process.pid}/comm").read_bytes())
        assert eventually(lambda: not processes.want_processor([process.pid]))
        assert processes.cpu_seconds([process.pid]) < 60
        assert host_process.began(process.pid) > 0, "a number may be that of any process by now"


@pytest.mark.parametrize("works", [True, False])
def test_of_very_many_threads_some_are_looked_at(monkeypatch: pytest.MonkeyPatch, works: bool) -> None:
    """A program says how many it has, and who looks does so in the event loop. One that works is found in the end."""
    looked: list[Path] = []
    read = Path.read_bytes

    def noted(path: Path) -> bytes:
        looked.append(path)
        return read(path)

    with started(sys.executable, "-c", THREADS, "400", "works" if works else "waits") as process:
        assert process.stdout is not None
        process.stdout.readline()
        monkeypatch.setattr(Path, "read_bytes", noted)
        if works:
            assert eventually(lambda: processes.want_processor([process.pid]))
        else:
            assert eventually(lambda: not processes.want_processor([process.pid]))
            looked.clear()
            processes.want_processor([process.pid])
            assert 0 < len(looked) <= 64
