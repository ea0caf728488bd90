"""A host of a cluster that starts while another one makes what they share."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
from pathlib import Path

from tests.conftest import ERA, STOP_SECONDS, eventually

TOLD_SOON = """
from era import directory_locks
directory_locks._TOLD_AFTER_SECONDS = 0.5
"""


def test_a_host_that_waits_for_another_to_start_says_so_and_can_be_stopped(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ERA_")} | {
        "ERA_SHARED_DIR": str(shared),
        "ERA_DATA_DIR": str(tmp_path / "host"),
        "ERA_CLUSTER_SECRET": "a secret that the hosts of a test know",
        "ERA_PORT": "0",
        "PYTHONPATH": str(tmp_path),
    }
    (tmp_path / "sitecustomize.py").write_text(TOLD_SOON)
    log = tmp_path / "log"
    with (shared / "starting").open("a") as lock, log.open("wb") as output:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen([str(ERA), "serve"], stdout=output, stderr=output, env=environment)
        try:
            assert eventually(lambda: "start_waits" in log.read_text()), log.read_text()
            process.send_signal(signal.SIGTERM)
            assert process.wait(STOP_SECONDS) == 128 + signal.SIGTERM
        finally:
            process.kill()
    assert log.read_text().count("start_waits") == 1
