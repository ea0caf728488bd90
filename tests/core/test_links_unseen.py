"""Second names of files that came, or came and went, where no watch was asked: what is written under them is kept."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from era.core.models import EMPTY
from era.core.trees.live_snapshots import LiveSnapshots
from era.core.trees.memory import Memory
from era.core.trees.watch import WatchBudget
from tests.core.lab import SETTLE
from tests.core.moments import MomentLab
from tests.owners import mine

FILES = 40
"""Too many for the event loop, so that the directory is watched."""

ENTRY = "main.py"


async def filled(directory: Path) -> MomentLab:
    lab = MomentLab(directory)
    for number in range(FILES):
        (lab.live.workspace / str(number)).write_text("first")
    await asyncio.sleep(SETTLE)
    return lab


@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
async def test_a_watch_that_began_after_a_program_s_file_was_removed_expects_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weakened: bool
) -> None:
    """Else its name would be free once for a link that comes and goes, under which anything can be written."""
    lab = await filled(tmp_path)
    budget = lab.snapshots._watches
    monkeypatch.setattr(lab.snapshots, "_watches", WatchBudget(0))
    first = await lab.snapshots.take(lab.live.sandbox, EMPTY, session_id=mine("s"))
    monkeypatch.setattr(lab.snapshots, "_watches", budget)
    warm, frozen_look = LiveSnapshots._warm, LiveSnapshots._frozen_look

    async def written_once_it_was_read(*arguments: Any) -> Memory | None:
        memory = await warm(*arguments)
        assert memory is not None
        assert memory.watch is not None
        os.link(lab.live.workspace / "7", lab.live.workspace / ENTRY)
        (lab.live.workspace / ENTRY).write_text("second")
        (lab.live.workspace / ENTRY).unlink()
        return memory

    async def expecting(moments: LiveSnapshots, sandbox: Any, memory: Any, _: str | None, *rest: Any) -> Any:
        return await frozen_look(moments, sandbox, memory, ENTRY, *rest)

    monkeypatch.setattr(LiveSnapshots, "_warm", written_once_it_was_read)
    if weakened:
        monkeypatch.setattr(LiveSnapshots, "_frozen_look", expecting)
    look = await lab.moments.take(lab.live.sandbox, first, ENTRY, session_id=mine("s"))
    assert look.consistent
    assert lab.contents(look.snapshot)["7"] == (b"first" if weakened else b"second")
    await lab.snapshots.close()


@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
async def test_a_directory_is_kept_unwatched_where_the_last_look_did_not_ask_its_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weakened: bool
) -> None:
    """Which so doesn't know of the other names that files have got since."""
    lab = await filled(tmp_path)
    first = await lab.snapshots.take(lab.live.sandbox, EMPTY, session_id=mine("s"))
    lab.live.can_freeze = False
    os.link(lab.live.workspace / "7", lab.live.workspace / "other")
    await asyncio.sleep(SETTLE)
    second = (await lab.moments.take(lab.live.sandbox, first, session_id=mine("s"))).snapshot
    memory = lab.snapshots.memories.get(lab.live.id)
    assert memory is not None
    assert memory.watch is not None
    if weakened:
        object.__setattr__(memory, "held", frozenset())
    assert lab.snapshots.put_away(lab.live.sandbox, second) == FILES + 1
    new = lab.place()
    await lab.snapshots.move(lab.live.sandbox, new.sandbox, session_id=mine("s"))
    (new.workspace / "other").write_text("second")
    (new.workspace / "other").unlink()
    third = await lab.snapshots.take(new.sandbox, second, session_id=mine("s"))
    assert lab.contents(third)["7"] == (b"first" if weakened else b"second")
    await lab.snapshots.close()
