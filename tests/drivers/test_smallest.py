"""The smallest driver, which CONTRIBUTING shows as a model: the core can run programs with it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from era.core.models import EMPTY
from era.core.ports import Driver, Sandbox
from era.core.program import Ended, Output, Program
from era.core.trees.allowance import bounded
from era.errors import NoIsolation, SandboxFailed
from tests.drivers.sandboxes import LIMITS
from tests.drivers.smallest import SmallestDriver


async def _run(sandbox: Sandbox, code: str, timeout: float = 30.0) -> tuple[bytes, Ended]:
    written, ended = b"", None
    async for event in bounded(sandbox, Program(code.encode(), env={"A": "1"}, timeout=timeout), EMPTY):
        if isinstance(event, Output):
            written += event.data
        else:
            ended = event
    assert ended is not None
    return written, ended


def test_programs_run_and_end_and_leave_files(tmp_path: Path) -> None:
    async def steps() -> None:
        driver: Driver = SmallestDriver(tmp_path)
        await driver.start()
        sandbox = await driver.create("bash", LIMITS)
        written, ended = await _run(sandbox, "echo $A; echo kept > file; exit 3")
        assert (written, ended.exit_code, ended.cause) == (b"1\n", 3, "exit")
        assert (sandbox.workspace / "file").read_text() == "kept\n"
        _, ended = await _run(sandbox, "exec sleep 60", timeout=0.1)
        assert ended.cause == "killed"
        running = asyncio.create_task(_run(sandbox, "echo up; exec sleep 60"))
        while not running.done():
            await sandbox.stop_run()
            await asyncio.sleep(0.01)
        assert running.result()[1].cause == "killed"
        await driver.stop()
        assert not sandbox.workspace.exists()
        with pytest.raises(SandboxFailed):
            await anext(sandbox.run(Program(b"true")))

    asyncio.run(steps())


def test_capabilities_that_it_lacks_are_said_to_be_missing(tmp_path: Path) -> None:
    async def steps() -> None:
        sandbox: Sandbox = await SmallestDriver(tmp_path).create("bash", LIMITS)
        assert await sandbox.connect(80) is None
        assert not sandbox.guest_listeners
        assert sandbox.held_files(0) is None
        async with sandbox.frozen() as still:
            assert still is None
        with pytest.raises(NoIsolation):
            await sandbox.process_supervisor()

    asyncio.run(steps())


def test_a_sandbox_without_what_the_core_needs_can_t_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        type("Half", (Sandbox,), {})()
