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
from unittest.mock import patch

import pytest

from era.core.models import JsonObject
from era.drivers import gvisor
from era.drivers.bubblewrap import BubblewrapDriver
from era.drivers.gvisor import GvisorDriver
from era.errors import NoIsolation, SandboxFailed
from tests.conftest import cgroups, descendants, eventually, is_running, mounts
from tests.drivers.sandboxes import LIMITS

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
