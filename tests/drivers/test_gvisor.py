"""The gVisor driver itself: how it starts, and that nothing of it outlives the service."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from era.core.models import JsonObject
from era.drivers import gvisor
from era.drivers.bubblewrap import BubblewrapDriver
from era.drivers.gvisor import GvisorDriver
from era.errors import NoIsolation, SandboxFailed
from tests.conftest import cgroups, descendants, eventually, is_running, mounts
from tests.drivers import process_steps as steps
from tests.drivers.sandboxes import LIMITS, Sandboxes, Weakness

installed = pytest.mark.skipif(shutil.which("runsc") is None, reason="runsc is not installed")

SERVICE = """
import sys
from contextlib import suppress
from pathlib import Path
from tests.drivers.sandboxes import Sandboxes, Weakness
sandboxes = Sandboxes(Path(sys.argv[1]), Weakness(), "gvisor", cgroup_name=sys.argv[2])
idle, busy = sandboxes.make(), sandboxes.make()
print("ready", flush=True)
sandboxes.run(busy, "import os, time; os.fork(); print('up', flush=True); time.sleep(600)", timeout=600)
"""


@installed
def test_nothing_outlives_a_killed_service(tmp_path: Path) -> None:
    before, name = mounts(), f"era-test-{os.getpid()}-killed"
    service = subprocess.Popen(
        [sys.executable, "-c", SERVICE, tmp_path, name],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).resolve().parent.parent.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert service.stdout
    with service.stdout:
        assert service.stdout.readline() == b"ready\n"
    assert eventually(lambda: len(descendants(service.pid)) > 15)
    processes = descendants(service.pid)
    service.send_signal(signal.SIGKILL)
    service.wait()
    assert eventually(lambda: not any(map(is_running, processes)))
    assert mounts() == before

    async def start_again() -> None:
        driver = GvisorDriver(tmp_path, LIMITS, cgroup_name=name)
        await driver.clear()
        await driver.start()
        assert list(driver.directory.iterdir()) == []
        assert cgroups(name) == []
        await driver.stop()

    asyncio.run(start_again())
    assert not list(Path("/sys/fs/cgroup").glob(f"*/{name}"))


def test_what_to_install_is_said(tmp_path: Path) -> None:
    driver = GvisorDriver(tmp_path, LIMITS, cgroup_name="era-test-none")
    with patch.object(gvisor, "_RUNSC", "/usr/bin/no-such-runsc"), pytest.raises(NoIsolation) as raised:
        asyncio.run(driver.start())
    assert "apt-get install runsc" in raised.value.hint
    asyncio.run(driver.stop())


def test_no_uid_is_given_out_by_two_drivers(tmp_path: Path) -> None:
    drivers = [
        BubblewrapDriver(tmp_path, LIMITS, cgroup_name="era-test-none"),
        GvisorDriver(tmp_path / "gvisor", LIMITS, cgroup_name="era-test-none"),
    ]
    first, second = ([driver.uids.take() for _ in range(10)] for driver in drivers)
    assert set(first).isdisjoint(second) or os.geteuid() != 0


NONE_LEFT = {
    "def _fork_apart(instructions: bytes) -> int:": "def _fork_apart(instructions, _calls=[]) -> int:",
    "    told, tell = os.pipe2(os.O_CLOEXEC)\n": (
        "    _calls.append(None)\n    if len(_calls) == 2:\n        raise BlockingIOError(11, 'too many processes')\n"
        "    told, tell = os.pipe2(os.O_CLOEXEC)\n"
    ),
}
"""A `Weakness.supervisor`: there can be no other process when the first of a session's is started."""

WAITS = """
import os, time
print('up', flush=True)
while not os.path.exists('go'): time.sleep(0.05)
print('well')
"""


@installed
def test_a_run_goes_on_where_no_process_can_be_started_beside_it(tmp_path: Path) -> None:
    """As where it has taken all processes that there may be."""
    sandboxes = Sandboxes(tmp_path, Weakness(supervisor=NONE_LEFT), "gvisor", self_tested=())
    try:
        said, ended, beside = sandboxes.do(sandboxes.make(), starts_processes)
        assert (said, ended.cause, ended.exit_code) == ("up\nwell\n", "exit", 0)
        assert beside == b"beside\n"
    finally:
        sandboxes.stop()


async def starts_processes(sandbox: Any) -> tuple[str, Any, bytes]:
    """Try to, under a run, and again. Returns what the run said and how it ended, and what the process said then."""
    run = asyncio.create_task(steps.run(sandbox, WAITS))
    with pytest.raises(SandboxFailed):
        await sandbox.process_supervisor()
    (sandbox.workspace / "go").touch()
    said, ended = await run
    process, _ = await steps.process(sandbox, steps.shell("echo beside"))
    return said, ended, process["stdout"]


UNFILTERED_SENTRY = """
import ctypes, struct, subprocess
allow = ctypes.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0x7fff0000))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, struct.pack('HP', 1, ctypes.addressof(allow)), 0, 0) == 0
subprocess.run(['runsc-sandbox'], executable='cat')
"""


def test_a_sentry_without_a_filter_of_its_own_is_reported() -> None:
    """It has those of what has started it. A sound one is in test_gvisor_attacks.py."""
    with subprocess.Popen([sys.executable, "-c", UNFILTERED_SENTRY], stdin=subprocess.PIPE) as init:

        def status() -> JsonObject:
            with suppress(SandboxFailed):  # it isn't there yet
                return gvisor.sentry_status(init.pid)
            return {}

        assert eventually(status)
        assert status()["Seccomp"] == "0"
        assert Path(f"/proc/{init.pid}/status").read_text().count("Seccomp:\t2") == 1
