"""Whose turn it is on the threads of snapshots: large work waits for large work only, and nobody takes all."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from era.core.concurrency.fair_limiter import FairLimiter, Release
from era.core.models import EMPTY, OwnedId, Snapshot
from era.core.totals import Bounds, Totals
from era.core.trees import file_threads, snapshots
from era.core.trees.edits import Changes, PutFile
from era.core.trees.file_threads import FileThreads
from era.core.trees.pages import change_pages, file_pages
from tests.conftest import eventually
from tests.core.lab import Lab, Place, large_turns
from tests.core.moments import MomentLab
from tests.owners import mine
from tests.weakened import FirstCome

SECONDS = 60
FILES = 40
"""Too many for the event loop."""


class BySession(FairLimiter):
    """The weakness: sessions in turn, whosever they are."""

    async def take(self, owner: str, session: Hashable = "") -> Release:
        return await super().take("anybody", session)


def first_come(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = lab.snapshots.threads._small._max_workers, file_threads.LARGE_THREADS
    monkeypatch.setattr(lab.snapshots.threads, "_small_slots", FirstCome(small))
    monkeypatch.setattr(lab.snapshots.threads, "_large_slots", FirstCome(large))


class Held:
    """Jobs that have begun, by name; those of the greedy go on only once they may."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.go_on = threading.Event()

    def begin(self, name: str) -> None:
        """Called in the job."""
        self.begun.append(name)
        if name == "greedy":
            assert self.go_on.wait(SECONDS), "nothing else went on"

    async def wait_for(self, many: int) -> None:
        """Wait until so many jobs have begun."""
        assert await asyncio.to_thread(eventually, lambda: len(self.begun) >= many, SECONDS)


async def as_far_as_it_gets(*, rounds: int = 50) -> None:
    """Let tasks go on until each waits for a thread."""
    for _ in range(rounds):
        await asyncio.sleep(0)


async def one_beside_many(
    held: Held, call: Callable[[str, int], Coroutine[Any, Any, object]], *, many: int, get: int, all_taken: bool
) -> None:
    """Have a call of a neighbour made while one who is greedy makes `many`, of which `get` have a thread at once."""
    greedy = [asyncio.create_task(call("greedy", number)) for number in range(many)]
    try:
        await held.wait_for(get)
        await as_far_as_it_gets()
        assert held.begun == ["greedy"] * get
        other = asyncio.create_task(call("neighbour", 0))
        if all_taken:
            await as_far_as_it_gets()
        else:
            await asyncio.wait_for(other, SECONDS)
            assert held.begun == [*["greedy"] * get, "neighbour"]
    finally:
        held.go_on.set()
        await asyncio.gather(*greedy)
    await other


def filled(lab: Lab, text: str) -> Place:
    place = lab.place()
    for number in range(FILES):
        (place.workspace / str(number)).write_text(text)
    return place


async def kept(lab: Lab, name: str, text: str) -> Snapshot:
    """A snapshot of some files, in a session of this name."""
    return await lab.snapshots.take(filled(lab, text).sandbox, EMPTY, session_id=mine(name))


def upload(lab: Lab, snapshot: Snapshot, session_id: OwnedId, put: Callable[[], None]) -> Coroutine[Any, Any, Snapshot]:
    """Have a file put into a snapshot, which is done on a thread with `put`."""
    changes = Changes()
    changes.add(("uploaded",), PutFile(hashlib.sha256(b"content").hexdigest(), 7, 0))
    return lab.snapshots.edit(snapshot, changes, lambda _: put(), Bounds(), session_id)


@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
async def test_an_owner_with_many_large_commits_leaves_others_a_thread(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, weakened: bool
) -> None:
    if weakened:
        first_come(lab, monkeypatch)
    monkeypatch.setattr(file_threads, "LARGE_ENTRIES", FILES // 2)
    held, store = Held(), lab.snapshots._store
    places = {("greedy", number): filled(lab, f"{number}") for number in range(6)} | {
        ("neighbour", 0): filled(lab, "other")
    }
    owners = {place.id: owner for (owner, _), place in places.items()}

    def noted_store(sandbox: Any, *rest: Any) -> Any:
        held.begin(owners[sandbox.id])
        return store(sandbox, *rest)

    monkeypatch.setattr(lab.snapshots, "_store", noted_store)

    def commit(owner: str, number: int) -> Coroutine[Any, Any, Snapshot]:
        return lab.snapshots.take(places[owner, number].sandbox, EMPTY, session_id=OwnedId(owner, f"{number}"))

    await one_beside_many(held, commit, many=6, get=3 if weakened else 2, all_taken=weakened)
    assert (held.begun.index("neighbour") >= 3) == weakened
    assert sorted(held.begun) == [*["greedy"] * 6, "neighbour"]


@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
async def test_a_session_with_many_small_jobs_leaves_others_threads(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, weakened: bool
) -> None:
    if weakened:
        first_come(lab, monkeypatch)
    snapshots = {name: await kept(lab, name, name) for name in ("greedy", "neighbour")}
    names = {snapshot.root: name for name, snapshot in snapshots.items()}
    held, read_tree = Held(), lab.snapshots.read_tree

    def noted_read(digest: str) -> Any:
        held.begin(names[digest])
        return read_tree(digest)

    monkeypatch.setattr(lab.snapshots, "read_tree", noted_read)

    def listed(name: str, _: int) -> Coroutine[Any, Any, object]:
        return lab.snapshots.entries(snapshots[name], mine(name))

    await one_beside_many(held, listed, many=9, get=4 if weakened else 2, all_taken=weakened)
    if weakened:  # it waited for all that stood in the queue, but for those that other threads have just begun
        assert held.begun.index("neighbour") >= 9 - 3


@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
async def test_an_owner_with_many_sessions_delays_others_by_what_is_being_done_only(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, weakened: bool
) -> None:
    """Not by a round of his sessions."""
    threads = lab.snapshots.threads
    most = threads._small._max_workers
    if weakened:
        monkeypatch.setattr(threads, "_small_slots", BySession(most, each=most // 2))
    begun: list[str] = []
    may_end = {number: threading.Event() for number in range(20)}

    def first_upload(owner: str, number: int) -> Coroutine[Any, Any, object]:
        def put() -> None:
            begun.append(owner)
            if owner == "greedy":
                assert may_end[number].wait(SECONDS)

        return upload(lab, EMPTY, OwnedId(owner, f"{number}"), put)

    greedy = [asyncio.create_task(first_upload("greedy", number)) for number in may_end]
    try:
        await as_far_as_it_gets()
        other = asyncio.create_task(first_upload("neighbour", 0))
        await as_far_as_it_gets()
        for ended in range(2):  # the first thread that comes free is the greedy's who has waited longer, the second not
            may_end[ended].set()
            await greedy[ended]
        if weakened:
            assert await asyncio.to_thread(eventually, lambda: len(begun) == most + 2, SECONDS)
            assert "neighbour" not in begun
        else:
            await asyncio.wait_for(other, SECONDS)
    finally:
        for event in may_end.values():
            event.set()
        await asyncio.gather(*greedy)
    await other


@asynccontextmanager
async def all_large_threads_taken(lab: Lab) -> AsyncIterator[None]:
    """Within the block others' large work has all threads of large work."""
    held = Held()
    tasks = [
        asyncio.create_task(lab.snapshots.threads.by_size(lambda _: held.begin("greedy"), each, is_large=True))
        for each in [OwnedId(f"owner {number}", "s") for number in range(file_threads.LARGE_THREADS)]
    ]
    await held.wait_for(file_threads.LARGE_THREADS)
    try:
        yield
    finally:
        held.go_on.set()
        await asyncio.gather(*tasks)


async def count_a_history(lab: MomentLab) -> object:
    return await lab.snapshots.held_bytes([str(lab.last.root)], 1 << 40, session_id=OwnedId("me", "s"))


async def commit_what_was_forgotten(lab: MomentLab) -> object:
    lab.snapshots.forget(lab.live.id)
    return await lab.snapshots.take(lab.live.sandbox, lab.last, session_id=OwnedId("me", "s"))


async def look_at_an_unknown_directory(lab: MomentLab) -> object:
    lab.snapshots.forget(lab.live.id)
    return (await lab.moments.take(lab.live.sandbox, EMPTY, session_id=OwnedId("me", "s"))).snapshot


async def look_twice(lab: MomentLab) -> object:
    lab.live.can_freeze = False
    lab.snapshots.forget(lab.live.id)
    return (await lab.moments.take(lab.live.sandbox, EMPTY, session_id=OwnedId("me", "s"))).snapshot


async def restore(lab: MomentLab) -> object:
    place = lab.place()
    await lab.snapshots.restore(lab.last, place.sandbox, session_id=OwnedId("me", "s"))
    return sorted((path.name, path.read_text()) for path in place.workspace.iterdir())


async def restore_into_a_warm_directory(lab: MomentLab) -> object:
    """One that holds something else."""
    place = lab.place()
    (place.workspace / "one").write_text("else")
    before = await lab.snapshots.take(place.sandbox, EMPTY, session_id=OwnedId("me", "s"))
    assert before.file_count == 1
    await lab.snapshots.restore(lab.last, place.sandbox, session_id=OwnedId("me", "s"))
    return sorted((path.name, path.read_text()) for path in place.workspace.iterdir())


async def look_while_all_stands_still(lab: MomentLab) -> object:
    """At a directory of which only a file has changed."""
    (lab.live.workspace / "1").write_text("changed")
    lab.last = (await lab.moments.take(lab.live.sandbox, lab.last, session_id=OwnedId("me", "s"))).snapshot
    return lab.last.total_bytes


async def commit_what_changed(lab: MomentLab) -> object:
    """In a directory that is watched."""
    (lab.live.workspace / "1").write_text("changed")
    lab.last = await lab.snapshots.take(lab.live.sandbox, lab.last, session_id=OwnedId("me", "s"))
    return lab.last.total_bytes


async def edit(lab: MomentLab) -> object:
    return (await upload(lab, lab.last, OwnedId("me", "s"), lambda: None)).root


async def list_files(lab: MomentLab) -> object:
    return await lab.snapshots.entries(lab.last, OwnedId("me", "s"))


async def find(lab: MomentLab) -> object:
    return await lab.snapshots.find(lab.last, ("1",), OwnedId("me", "s"))


async def nesting(lab: MomentLab) -> object:
    return await lab.snapshots.depth(["dir", "d", lab.last.root, 0o755], OwnedId("me", "s"))


async def list_artifacts(lab: MomentLab) -> object:
    return await lab.snapshots.artifacts(EMPTY, lab.last, OwnedId("me", "s"))


async def totals(lab: MomentLab) -> object:
    lab.snapshots._counts.clear()
    return await lab.snapshots.totals(lab.last, OwnedId("me", "s"))


async def list_all_files(lab: MomentLab) -> object:
    return [page async for page in file_pages(lab.snapshots, lab.last, OwnedId("me", "s"))]


async def list_all_changes(lab: MomentLab) -> object:
    return [page async for page in change_pages(lab.snapshots, EMPTY, lab.last, OwnedId("me", "s"), "added")]


WORK: dict[str, Callable[[MomentLab], Coroutine[Any, Any, object]]] = {
    "a count": count_a_history,
    "a commit": commit_what_was_forgotten,
    "a live session's first look": look_at_an_unknown_directory,
    "looks at what can't be frozen": look_twice,
    "a restore": restore,
    "a warm restore": restore_into_a_warm_directory,
    "a live session's look": look_while_all_stands_still,
    "a commit of a change": commit_what_changed,
    "an edit": edit,
    "a list": list_files,
    "a look for a file": find,
    "a look at nesting": nesting,
    "artifacts": list_artifacts,
    "totals": totals,
    "a list of all files": list_all_files,
    "a list of all changes": list_all_changes,
}


@asynccontextmanager
async def live_lab(directory: Any) -> AsyncIterator[MomentLab]:
    """One whose live place has a snapshot of some files."""
    lab = MomentLab(directory)
    for number in range(FILES):
        (lab.live.workspace / str(number)).write_text("small")
    lab.last = await lab.snapshots.take(lab.live.sandbox, EMPTY, session_id=mine("s"))
    yield lab
    await lab.snapshots.close()


@pytest.mark.parametrize("what", WORK)
async def test_small_work_never_waits_for_large(tmp_path: Any, what: str) -> None:
    async with live_lab(tmp_path) as lab, all_large_threads_taken(lab):
        await asyncio.wait_for(WORK[what](lab), SECONDS)


async def test_taken_for_large_it_does(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weakness: it is done as large work is, whatever its size."""
    asked = asyncio.Event()

    def large_slot(threads: FileThreads, session_id: OwnedId, *, is_large: bool) -> Any:
        asked.set()
        return slot(threads, session_id, is_large=True)

    slot = FileThreads.slot
    monkeypatch.setattr(FileThreads, "slot", large_slot)
    async with live_lab(tmp_path) as lab:
        async with all_large_threads_taken(lab):
            task = asyncio.create_task(WORK["a count"](lab))
            await asyncio.wait_for(asked.wait(), SECONDS)
            await as_far_as_it_gets()
            assert not task.done()
        await task


@pytest.mark.parametrize("what", WORK)
async def test_large_work_is_given_up_where_small_work_is_done(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """It is done in its owner's turn then, and to the same end."""
    turns = large_turns(monkeypatch)
    async with live_lab(tmp_path) as lab:
        as_small = await WORK[what](lab)
        assert turns == []
        monkeypatch.setattr(file_threads, "LARGE_BYTES", 0)
        monkeypatch.setattr(file_threads, "LARGE_ENTRIES", 0)
        assert await WORK[what](lab) == as_small
        assert set(turns) == {"me"}


async def test_whoever_hangs_up_has_his_thread_until_his_job_has_ended(lab: Lab) -> None:
    """Else he would have all of them by asking again."""
    held = Held()
    call = asyncio.create_task(lab.snapshots.threads.by_size(lambda _: held.begin("greedy"), mine("s")))
    await held.wait_for(1)
    call.cancel()
    await as_far_as_it_gets()
    assert lab.snapshots.threads._small_slots.taken == 1
    held.go_on.set()
    await asyncio.wait([call])
    assert not lab.snapshots.threads._small_slots.taken


def test_what_trees_hold_is_forgotten_one_by_one(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "_COUNTS_KEPT", 3)
    for root in "abc":
        lab.snapshots.remember_totals(root, Totals(1))
    assert lab.snapshots._known_totals("a") == Totals(1), "which counts as a use"
    lab.snapshots.remember_totals("d", Totals(2))
    assert [lab.snapshots._known_totals(root) for root in "abcd"] == [Totals(1), None, Totals(1), Totals(2)]
