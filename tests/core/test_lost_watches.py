"""No watch is lost, whatever becomes of the call for which it was made: others would have none left."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from era.core.models import EMPTY
from era.core.trees import restoring, tree_objects, trees
from era.core.trees.copies import ContentCopies
from era.core.trees.live_snapshots import LiveSnapshots
from era.core.trees.memory import Memories
from era.core.trees.snapshots import Snapshots
from era.core.trees.trees import SnapshotRefused
from era.core.trees.watch import WatchBudget
from era.errors import SandboxFailed
from tests.conftest import eventually
from tests.core.lab import Lab, Place
from tests.core.moments import MomentLab
from tests.owners import mine

FILES = 40
"""So many that a directory is watched."""

SECONDS = 60


def fill(place: Place, make: Callable[[Path], object] = lambda path: path.write_text("x")) -> None:
    for number in range(FILES):
        make(place.workspace / str(number))


async def has_all_again(budget: WatchBudget, instances: int = 2) -> bool:
    """Whether so many instances are left at last."""
    return await asyncio.to_thread(eventually, lambda: budget._instances == instances, SECONDS)


async def leave_a_list_too_long(lab: Lab, place: Place) -> None:
    """As 90,000 names of 255 bytes that aren't UTF-8 make one."""
    fill(place)
    with pytest.raises(SnapshotRefused, match="list of names"):
        await lab.snapshots.take(place.sandbox, EMPTY, session_id=mine("s"))


async def leave_pipes(lab: Lab, place: Place) -> None:
    """Of which none is kept, so the directory counts as empty."""
    fill(place, os.mkfifo)
    assert await lab.snapshots.take(place.sandbox, EMPTY, session_id=mine("s")) == EMPTY


@pytest.mark.parametrize("run", [leave_a_list_too_long, leave_pipes])
@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
async def test_runs_cant_use_up_all_watches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Coroutine[Any, Any, None]], weakened: bool
) -> None:
    if weakened:
        monkeypatch.setattr(Memories, "note_watch", lambda *_: True)
    budget = WatchBudget(1000, 2)
    lab = Lab(tmp_path, watches=budget)
    with monkeypatch.context() as bounded:
        bounded.setattr(tree_objects, "MAX_LIST_BYTES", 1000)
        for _ in range(3):
            await run(lab, lab.place())
            assert weakened or await has_all_again(budget)
    assert budget._instances == (0 if weakened else 2)
    neighbour = lab.place()
    fill(neighbour)
    await lab.snapshots.take(neighbour.sandbox, EMPTY, session_id=mine("s"))
    memory = lab.snapshots.memories.get(neighbour.id)
    assert memory is not None
    assert (memory.watch is None) == weakened
    lab.snapshots.forget(neighbour.id)
    assert weakened or await has_all_again(budget)
    assert weakened or budget._shares.taken == 0
    await lab.snapshots.close()


class Stop:
    """A place in a job at which it waits, and the caller may go meanwhile."""

    def __init__(self) -> None:
        self.reached, self.go_on, self.ended = threading.Event(), threading.Event(), threading.Event()

    def wrap(self, function: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
        """The function, which waits before it begins, or after it has ended."""

        def stopped(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options) if after else None
            self.reached.set()
            assert self.go_on.wait(SECONDS)
            try:
                return result if after else function(*arguments, **options)
            finally:
                self.ended.set()

        return stopped

    async def gone(self, call: Coroutine[Any, Any, object]) -> None:
        """Make a call and cancel it there. It ends once the job has."""
        task = asyncio.create_task(call)
        assert await asyncio.to_thread(self.reached.wait, SECONDS)
        task.cancel()
        self.go_on.set()
        assert await asyncio.to_thread(self.ended.wait, SECONDS)
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("where", ["before the watch is made", "behind it", "while it is stored"])
async def test_a_commit_whose_caller_has_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    budget, stop = WatchBudget(1000, 2), Stop()
    lab = Lab(tmp_path, watches=budget)
    snapshots, place = lab.snapshots, lab.place()
    fill(place)
    match where:
        case "before the watch is made":
            monkeypatch.setattr(snapshots, "new_watch", stop.wrap(snapshots.new_watch))
        case "behind it":
            monkeypatch.setattr(snapshots, "new_watch", stop.wrap(snapshots.new_watch, after=True))
        case _:
            monkeypatch.setattr(snapshots, "_store", stop.wrap(snapshots._store))
    await stop.gone(snapshots.take(place.sandbox, EMPTY, session_id=mine("s")))
    assert await has_all_again(budget)
    await snapshots.close()  # all jobs have ended
    assert (budget._instances, budget._shares.taken) == (2, 0)


async def committed(lab: Lab) -> tuple[Place, Any]:
    """A watched place, and its snapshot."""
    place = lab.place()
    fill(place)
    snapshot = await lab.snapshots.take(place.sandbox, EMPTY, session_id=mine("s"))
    memory = lab.snapshots.memories.get(place.id)
    assert memory is not None
    assert memory.watch is not None
    return place, snapshot


@pytest.mark.parametrize("how", ["cancelled", "refused", "failed"])
async def test_a_restore_that_comes_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    budget, stop = WatchBudget(1000, 2), Stop()
    lab = Lab(tmp_path, watches=budget)
    place, _ = await committed(lab)
    assert budget._instances == 1
    if how == "cancelled":
        monkeypatch.setattr(restoring, "restore", stop.wrap(restoring.restore))
        await stop.gone(lab.snapshots.restore(EMPTY, place.sandbox, session_id=mine("s")))
    else:
        error: Exception = trees.Changed() if how == "refused" else OSError(5, "failed")

        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(restoring, "restore", fail)
        with pytest.raises(trees.Changed if how == "refused" else SandboxFailed):
            await lab.snapshots.restore(EMPTY, place.sandbox, session_id=mine("s"))
    assert await has_all_again(budget)
    await lab.snapshots.close()


@pytest.mark.parametrize("how", ["cancelled", "failed"])
async def test_a_move_that_comes_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    budget, stop = WatchBudget(1000, 2), Stop()
    lab = Lab(tmp_path, watches=budget)
    place, snapshot = await committed(lab)
    assert lab.snapshots.put_away(place.sandbox, snapshot) == FILES
    assert await has_all_again(budget)
    new = lab.place()
    if how == "cancelled":
        monkeypatch.setattr(restoring, "watch", stop.wrap(restoring.watch))
        await stop.gone(lab.snapshots.move(place.sandbox, new.sandbox, session_id=mine("s")))
    else:

        def fail(*_: object) -> None:
            raise trees.Changed

        monkeypatch.setattr(restoring, "watch", fail)
        with pytest.raises(SandboxFailed):
            await lab.snapshots.move(place.sandbox, new.sandbox, session_id=mine("s"))
    assert await has_all_again(budget)
    await lab.snapshots.close()


def live(directory: Path, budget: WatchBudget) -> MomentLab:
    lab = MomentLab(directory)
    lab.snapshots = Snapshots(lab.blobs, watches=budget)
    lab.moments = LiveSnapshots(lab.snapshots, directory / "aside")
    fill(lab.live)
    return lab


@pytest.mark.parametrize("where", ["warm", "stored"])
async def test_a_live_directory_whose_caller_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    budget, stop = WatchBudget(1000, 2), Stop()
    lab = live(tmp_path, budget)
    if where == "warm":
        monkeypatch.setattr(ContentCopies, "put_tree", stop.wrap(ContentCopies.put_tree))
    else:

        async def not_warm(*_: object) -> None: ...

        monkeypatch.setattr(lab.moments, "_warm", not_warm)
        monkeypatch.setattr(lab.moments, "_store", stop.wrap(lab.moments._store))
    await stop.gone(lab.moments.take(lab.live.sandbox, EMPTY, session_id=mine("s")))
    assert await has_all_again(budget)
    await lab.snapshots.close()
