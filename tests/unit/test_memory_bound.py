"""What is remembered of all sessions' working directories has a bound: whose sandbox goes for it, and what is found."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from era.core.live.processes import ProcessRequest
from tests.owners import mine
from tests.unit.core import URL, Core, until

FILL = "import os\nfor number in range({}): open(f'f{{number}}', 'w').write('x')"
CHANGE = "open('f3', 'w').write('changed')\nopen('new', 'w').write('new')\nimport os\nos.unlink('f4')"


@pytest.fixture
async def core(directory: Path, template: Path) -> AsyncIterator[Core]:
    async with Core.opened(directory, template, max_warm=20, kept_bytes=1 << 30) as core:
        for name in ("a", "b", "c", "small", "s"):
            await core.session(name)
        core.snapshots.memories.most = 250
        yield core


async def is_warm(core: Core, name: str) -> bool:
    return core.pool.has((await core.store.session(mine(name))).key)


async def assert_changes_are_committed(core: Core, name: str) -> None:
    """A run of the session changes files, and its newest version holds that."""
    before = await core.store.session(mine(name))
    done = await core.run(CHANGE, name)
    assert (done.result.status, done.result.state.committed) == ("ok", True), done
    snapshot = (await core.store.session(mine(name))).snapshot
    assert snapshot.file_count == before.snapshot.file_count
    assert [(await core.snapshots.find(snapshot, (file,), mine("s")))[3] for file in ("f3", "new")] == [7, 3]
    shown = await core.run("print(open('f3').read(), open('new').read(), 'f4' in __import__('os').listdir())", name)
    assert shown.stdout == b"changed new False\n"
    assert shown.result.state.version == before.version + 1, "nothing has changed"


async def test_the_largest_is_forgotten_and_keeps_its_sandbox(core: Core) -> None:
    for name, count in {"small": 10, "a": 120, "b": 80}.items():
        await core.run(FILL.format(count), name)
    sandboxes = {sandbox.workspace: sandbox.id for sandbox in core.driver.alive}
    await core.run(FILL.format(60), "c")
    assert [core.snapshots.memories.size(each) for each in sandboxes.values()] == [10, 0, 80]
    assert len(core.driver.alive) == 4
    for name in ("a", "b", "c"):
        await assert_changes_are_committed(core, name)
        assert core.snapshots.memories.entries <= 250
        assert await is_warm(core, "small")


async def test_a_kept_directory_that_was_forgotten_is_restored(core: Core) -> None:
    await core.run(FILL.format(150), "a")
    core.pool._put_away((await core.store.session(mine("a"))).key, "idle")
    await until(lambda: bool(core.pool._kept.keys()))
    await core.run(FILL.format(140), "b")
    assert core.snapshots.memories.entries == 140
    await assert_changes_are_committed(core, "a")


async def test_one_that_runs_keeps_its_sandbox(core: Core) -> None:
    await core.run(FILL.format(150), "a")
    await core.run(FILL.format(10), "small")
    code, go = core.paused()
    running = asyncio.create_task(core.run(code + CHANGE, "a"))
    await until(lambda: core.pool.counts()["busy"] == 1)
    sandboxes = list(core.driver.alive)
    memory = core.snapshots.memories.size
    assert memory(sandboxes[0].id) >= 150
    await core.run(FILL.format(140), "b")
    assert core.driver.alive[:2] == sandboxes
    assert memory(sandboxes[0].id) == 0, "but what is remembered of it goes, for its neighbour is busy as well"
    assert memory(sandboxes[1].id) >= 10
    go.touch()
    done = await running
    assert (done.result.status, done.result.state.committed) == ("ok", True)
    snapshot = (await core.store.session(mine("a"))).snapshot
    assert (await core.snapshots.find(snapshot, ("f3",), mine("s")))[3] == 7
    assert snapshot.file_count == 150


async def test_a_live_session_keeps_its_processes(core: Core) -> None:
    await core.run(FILL.format(150), "s")
    process = (await core.processes.start(mine("s"), ProcessRequest(URL, "exec sleep 100"))).value
    (sandbox,) = core.driver.alive
    await core.run(FILL.format(140), "b")
    assert core.snapshots.memories.size(sandbox.id) == 0
    assert (await core.processes.get(mine("s"), process.id)).status == "running"
    before = (await core.store.session(mine("s"))).version
    assert (await core.run("pass", "s")).result.state.version == before, "nothing has changed"
    await assert_changes_are_committed(core, "s")
    (sandbox.workspace / "late").write_text("by a process")
    put_away = await core.live_sessions.put_away(mine("s"))
    assert (await core.snapshots.find(put_away.snapshot, ("late",), mine("s")))[3] == 12
