"""What starts a tool and waits for its end: nothing is started for a service that has died meanwhile, nor waited for
that a tool has left, and a tool that is cut off ends as that."""

from __future__ import annotations

import asyncio
import marshal
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from era.packages import child
from era.packages.processes import Processes, Space


@pytest.mark.parametrize("parent_lives", [True, False])
def test_a_tool_is_only_started_for_a_service_that_lives(tmp_path: Path, *, parent_lives: bool) -> None:
    with subprocess.Popen(["true"]) as dead:
        pass
    plan: dict[str, Any] = {
        "parent": os.getpid() if parent_lives else dead.pid,
        "uid": None,
        "rlimits": {},
        "directory": os.fspath(tmp_path),
        "command": [sys.executable, "-c", "open('started', 'w').close()"],
        "environment": {},
    }
    code = subprocess.run([sys.executable, child.__file__], input=marshal.dumps(plan), timeout=60).returncode
    assert (code, (tmp_path / "started").exists()) == ((0, True) if parent_lives else (1, False))


@pytest.mark.parametrize("left", ["sleep 1000", "setsid sleep 1000"])
async def test_what_a_tool_leaves_is_not_waited_for(tmp_path: Path, left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it has the tool's output open."""
    monkeypatch.setattr("era.packages.processes._OUTPUT_SECONDS", 0.5)
    processes, scratch = Processes(tmp_path, {}), tmp_path / "scratch"
    scratch.mkdir()
    processes.change_owner(scratch, processes.fetcher)
    now = time.monotonic()
    async with asyncio.timeout(60):
        ran = await processes.run(
            ["/bin/sh", "-c", f"{left} & echo $!"], {"PATH": os.environ["PATH"]}, scratch=scratch,
            uid=processes.fetcher, deadline=now + 50, space=Space(scratch, scratch, 1 << 30), names=[],
        )  # fmt: skip
    if left.startswith("setsid"):
        os.kill(int(ran.stdout), signal.SIGKILL)
    assert (ran.code, int(ran.stdout) > 0) == (0, True)


async def test_a_tool_that_is_cut_off_is_cut_off_though_nobody_takes_its_output(tmp_path: Path) -> None:
    processes, scratch, is_heard = Processes(tmp_path, {}), tmp_path / "scratch", asyncio.Event()
    scratch.mkdir()
    processes.change_owner(scratch, processes.fetcher)

    def fail(stream: str, piece: bytes) -> None:
        is_heard.set()
        raise RuntimeError("nobody takes it")

    running = asyncio.create_task(
        processes.run(
            ["/bin/sh", "-c", "echo on; exec sleep 1000"], {"PATH": os.environ["PATH"]}, scratch=scratch,
            uid=processes.fetcher, deadline=time.monotonic() + 50, space=Space(scratch, scratch, 1 << 30), names=[],
            say=fail,
        )
    )  # fmt: skip
    await is_heard.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
