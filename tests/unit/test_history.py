"""core.versions.HistoryBound: how much a session's kept versions may hold."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from era.core.execution.run_messages import RunResult
from era.core.models import KeptVersion, NewCopy, Session
from era.core.sessions.versions import MAX_NAMED, HistoryBound
from era.errors import TooLarge
from tests.owners import mine
from tests.unit.core import Core

LIMIT = 1 << 20
FILL = "import os; open('%s', 'wb').write(os.urandom(%d))"


@pytest.fixture
async def core(directory: Path, template: Path) -> AsyncIterator[Core]:
    async with Core.opened(directory, template, history_bytes=LIMIT) as core:
        yield core


async def fill(core: Core, size: int, name: str = "f") -> RunResult:
    """A run that writes a file of random content."""
    result = (await core.run(FILL % (name, size))).result
    assert (result.status, result.state.committed) == ("ok", True)
    return result


async def current(core: Core) -> Session:
    return await core.store.session(mine("s"))


async def kept(core: Core) -> Sequence[KeptVersion]:
    return await core.store.kept_versions((await current(core)).key)


async def held(core: Core) -> int:
    """How many bytes the kept versions really hold."""
    roots = [version.root for version in await kept(core) if version.root]
    return (await core.snapshots.held_bytes(roots, 1 << 60, session_id=mine("s")) or [0])[-1]


async def name(core: Core, n: int) -> None:
    named = {version.n for version in await kept(core) if version.named}
    assert await core.store.name_version(mine("s"), n, f"v{n}", named=named)


@pytest.mark.slow
async def test_the_oldest_versions_go_when_the_limit_is_exceeded(core: Core) -> None:
    await core.session()
    for _ in range(5):
        assert (await fill(core, 200_000)).state.versions_dropped == 0
    result = await fill(core, 200_000)
    assert [version.n for version in await kept(core)] == [7, 6, 5, 4]
    assert result.state.versions_dropped == 3
    assert (await core.record(result.run_id)).versions_dropped == 3
    assert LIMIT * 3 // 4 < await held(core) <= LIMIT * 7 // 8
    for _ in range(20):
        await fill(core, 200_000)
        assert await held(core) <= LIMIT * 9 // 8


async def test_named_versions_stay(core: Core) -> None:
    await core.session()
    await fill(core, 400_000)
    await name(core, 2)
    for _ in range(12):
        await fill(core, 200_000)
    assert [version.n for version in await kept(core) if version.named] == [2]
    assert await held(core) <= LIMIT * 9 // 8


async def test_named_versions_hold_no_more_than_the_limit(core: Core) -> None:
    bound = HistoryBound(core.store, core.snapshots, core.rules, 600_000)
    await core.session()
    for _ in range(2):
        await fill(core, 400_000)
    versions = [version for version in await kept(core) if version.root]
    await bound.check_names(await current(core), versions[:1])
    with pytest.raises(TooLarge, match="limit of its history"):
        await bound.check_names(await current(core), versions)
    with pytest.raises(TooLarge, match=f"{MAX_NAMED} named"):
        await bound.check_names(await current(core), [KeptVersion(1, None, named=True)] * (MAX_NAMED + 1))


async def test_a_version_named_while_a_run_drops_it_stays(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    await core.session()
    for _ in range(5):
        await fill(core, 200_000)
    end_run = core.store.end_run

    async def named_first(*args: Any, **options: Any) -> Any:
        await name(core, 2)
        return await end_run(*args, **options)

    monkeypatch.setattr(core.store, "end_run", named_first)
    assert (await fill(core, 200_000)).state.versions_dropped == 2
    monkeypatch.undo()
    assert (await current(core)).history_bytes is None
    await fill(core, 1)
    assert (await current(core)).history_bytes is not None


async def test_what_a_row_says_is_never_less_than_what_is_held(core: Core) -> None:
    chance = random.Random(5)
    await core.session(limits={"disk_mb": 100})
    core.runs._parts.history._most_bytes = 1 << 40
    for _ in range(12):
        steps = [
            f"open('{chance.choice('abc')}', 'ab').write(os.urandom({chance.randrange(5000)}))",
            f"os.makedirs('d/{chance.choice('xyz')}', exist_ok=True)",
            f"open('{chance.choice('uvw')}', 'wb').write(bytes({chance.randrange(5000)}))",
            "[os.utime(name) for name in os.listdir('.')]",
            "[os.rename(name, name + name) for name in os.listdir('.')[:1] if os.path.isfile(name) and name[0] != '.']",
        ]
        code = "\n".join(chance.sample(steps, 3))
        result = (await core.run("import os\n" + code)).result
        assert result.status == "ok"
        said = (await current(core)).history_bytes
        assert said is not None
        assert said >= await held(core)
    copy = await core.store.duplicate(NewCopy(mine("s"), "t"))
    assert copy.history_bytes == (await current(core)).history_bytes


async def test_without_the_bound_all_of_it_stays(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    async def trim(*_: object) -> None:
        return None

    monkeypatch.setattr(HistoryBound, "trim", trim)
    await core.session()
    for _ in range(10):
        await fill(core, 200_000)
    assert await held(core) > LIMIT * 9 // 8
