"""A sandbox whose making is given up halfway, as by Ctrl-C during the start, leaves nothing behind."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from era.drivers.bubblewrap import BubblewrapDriver, BubblewrapSandbox
from tests.conftest import cgroups, is_running
from tests.drivers.sandboxes import LIMITS


async def give_up_while_spawning(directory: Path, name: str) -> tuple[list[Any], BubblewrapDriver]:
    """Cancel the making of a sandbox while its thread is about to start bubblewrap, and stop the driver. Returns the
    processes that the thread started."""
    driver = BubblewrapDriver(directory, LIMITS, cgroup_name=name, template_forks=0)
    driver.self_tested = []
    await driver.clear()
    await driver.start()
    spawn, begun, started = BubblewrapSandbox._spawn, asyncio.Event(), []
    loop = asyncio.get_running_loop()

    def slow(self: BubblewrapSandbox, *arguments: Any) -> None:
        loop.call_soon_threadsafe(begun.set)
        time.sleep(0.3)
        spawn(self, *arguments)
        started.append(self._process)

    with patch.object(BubblewrapSandbox, "_spawn", slow):
        making = asyncio.create_task(driver.create("python", LIMITS))
        await begun.wait()
        making.cancel()
        await asyncio.wait([making])
        await driver.stop()
    return started, driver


async def test_giving_up_waits_for_the_thread_and_leaves_nothing(tmp_path: Path) -> None:
    started, driver = await give_up_while_spawning(tmp_path, "era-test-cancelled")
    assert len(started) == 1
    assert not is_running(started[0].pid)
    assert list(driver.directory.iterdir()) == []
    assert cgroups("era-test-cancelled") == []


async def test_not_waiting_would_leave_it_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close, forgotten = BubblewrapSandbox._close, list[Any]()

    async def at_once(self: BubblewrapSandbox) -> None:
        forgotten.append(self._spawning)
        self._spawning = None
        await close(self)

    monkeypatch.setattr(BubblewrapSandbox, "_close", at_once)
    started, driver = await give_up_while_spawning(tmp_path, "era-test-left")
    assert [*driver.directory.iterdir(), *cgroups("era-test-left"), *started]
    for spawning in forgotten:
        (await spawning).close()
    for process in started:
        process.kill()
        process.wait()
    if driver.cgroups is not None and cgroups("era-test-left"):
        driver.cgroups.remove_leftovers()
        driver.cgroups.close()
