"""Kept directories: what is left of a session whose sandbox makes way, and what it finds when it is woken."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from era.core.models import Snapshot
from era.core.pool import directory_cache
from era.core.totals import Bounds
from era.core.trees.edits import Changes, Remove
from tests.owners import mine
from tests.unit.core import Core, until

FILES = 150
FILL = f"""
import os
for number in range({FILES}):
    os.makedirs(f"d{{number % 3}}/below", exist_ok=True)
    open(f"d{{number % 3}}/below/{{number}}", "w").write(str(number))
open("top", "w").write("top")
os.symlink("top", "link")
os.mkdir("closed", 0o700)
"""
SHOW = "import os\nprint(sorted(os.listdir('.')), sum(len(names) for _, _, names in os.walk('d1')), open('top').read())"
SHOWN = f"['.session_data.json', 'closed', 'd0', 'd1', 'd2', 'link', 'main.py', 'top'] {FILES // 3} top\n".encode()


@pytest.fixture
async def core(directory: Path, template: Path) -> AsyncIterator[Core]:
    """Room for one sandbox, and for the directories of others."""
    async with Core.opened(directory, template, max_warm=1, kept_bytes=1 << 30) as core:
        for name in ("s", "other"):
            await core.session(name)
        yield core


@contextmanager
def restored(core: Core) -> Iterator[list[Snapshot]]:
    """The snapshots that are restored within the block, if only in part."""
    calls, real = [], core.snapshots.restore

    async def restore(snapshot: Snapshot, sandbox: Any, **named: Any) -> None:
        calls.append(snapshot)
        assert named == {"session_id": mine("s")}
        await real(snapshot, sandbox, **named)

    core.snapshots.restore = restore  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        core.snapshots.restore = real  # type: ignore[method-assign]


def directories(core: Core) -> int:
    """How many sandboxes have a directory on disk."""
    return len(os.listdir(core.driver.directory))


async def fill_and_put_away(core: Core) -> None:
    """Give the session many files, and let another one take its place."""
    assert (await core.run(FILL)).result.status == "ok"
    await core.run("pass", "other")


async def test_a_woken_session_has_its_files_without_a_restore(core: Core) -> None:
    await fill_and_put_away(core)
    assert (core.pool.counts()["live"], directories(core)) == (1, 2)
    with restored(core) as calls:
        woken = await core.run(SHOW)
    assert (woken.stdout, calls) == (SHOWN, [])
    assert woken.result.state.version == 2, "nothing has changed"
    await until(lambda: directories(core) == 1)


async def test_changes_after_waking_are_found(core: Core) -> None:
    await fill_and_put_away(core)
    await core.run("open('d1/below/1', 'w').write('changed')\nimport os\nos.unlink('top')")
    session = await core.store.session(mine("s"))
    assert session.snapshot.file_count == FILES + 1
    found = await core.snapshots.find(session.snapshot, ("d1", "below", "1"), mine("s"))
    assert found[3] == len("changed")


async def test_what_a_client_has_changed_meanwhile_is_there(core: Core) -> None:
    await fill_and_put_away(core)
    session = await core.store.session(mine("s"))
    changes = Changes()
    changes.add(("d0",), Remove(recursive=True))
    bounds = Bounds()
    snapshot = await core.snapshots.edit(session.snapshot, changes, lambda batch: None, bounds, mine("s"))
    await core.store.commit(mine("s"), "files", data=None, snapshot=snapshot)
    with restored(core) as calls:
        woken = await core.run("import os; print(os.path.exists('d0'), len(os.listdir('d1/below')))")
    assert (woken.stdout, len(calls)) == (f"False {FILES // 3}\n".encode(), 1)


@pytest.mark.parametrize("change", ["a new file", "a file that is gone", "a file that was written to"])
async def test_a_directory_that_is_not_what_it_was_is_not_used(core: Core, change: str) -> None:
    await fill_and_put_away(core)
    (sandbox,) = (each.sandbox for each in core.pool._kept._kept.values())
    match change:
        case "a new file":
            (sandbox.workspace / "new").touch()
        case "a file that is gone":
            (sandbox.workspace / "top").unlink()
        case _:
            (sandbox.workspace / "top").write_text("other")
    with restored(core) as calls:
        woken = await core.run(SHOW)
    assert (woken.stdout, len(calls)) == (SHOWN, 1)
    await until(lambda: directories(core) == 1)


async def test_what_a_failed_run_left_is_not_kept(core: Core) -> None:
    await core.run(FILL)
    failed = await core.run("open('top', 'w').write('uncommitted')\nraise SystemExit(1)", atomic=True)
    assert not failed.result.state.committed
    await core.run("pass", "other")
    assert directories(core) == 1
    assert (await core.run(SHOW)).stdout == SHOWN


async def test_nothing_is_kept_of_a_deleted_session(core: Core) -> None:
    await fill_and_put_away(core)
    session = await core.store.session(mine("s"))
    assert session.key in core.pool.session_keys(), "expiry asks for these"
    await core.pool.release(session.key)
    assert directories(core) == 1
    assert session.key not in core.pool.session_keys()


async def test_the_oldest_goes_first(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core.pool._kept, "_most_bytes", (2 * FILES + 30) * directory_cache._BLOCK)
    for name in ("a", "b", "c"):
        await core.session(name)
        await core.run(FILL, name)
    await core.run("pass", "other")
    await until(lambda: directories(core) == 3)
    keys = [(await core.store.session(mine(name))).key for name in ("b", "c")]
    assert core.pool._kept.keys() == keys
