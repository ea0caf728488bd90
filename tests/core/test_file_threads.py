"""Whose turn it is on the threads of snapshots: large work waits for large work only, and nobody takes all."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Iterable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import pytest

from era.core.fair_limiter import FairLimiter, Release
from era.core.files import file_threads, trees
from era.core.files.edits import Changes, PutFile
from era.core.files.file_threads import FileThreads
from era.core.files.live_snapshots import ContentCopies
from era.core.files.snapshots import change_pages, file_pages
from era.core.files.totals import Bounds
from era.core.models import EMPTY, OwnedId, Snapshot
from tests.conftest import eventually
from tests.core.lab import Lab, Place, large_turns
from tests.core.moments import MomentLab, opened
from tests.owners import mine
from tests.soaking import soak_the_rest
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
    monkeypatch.setattr(file_threads, "LARGE_BYTES", 10 * trees.FILE_BYTES)
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

    def noted_read(digest: str, **budget: Any) -> Any:
        held.begin(names[digest])
        return read_tree(digest, **budget)

    monkeypatch.setattr(lab.snapshots, "read_tree", noted_read)

    def listed(name: str, _: int) -> Coroutine[Any, Any, object]:
        return lab.snapshots.entries(snapshots[name], mine(name))

    await one_beside_many(held, listed, many=9, get=4 if weakened else 2, all_taken=weakened)
    if weakened:  # it waited for all that stood in the queue, but for those that other threads have just begun
        assert held.begun.index("neighbour") >= 9 - 3


@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
async def test_a_session_with_many_first_uploads_leaves_others_threads(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, weakened: bool
) -> None:
    """As long as a session is empty, it has no content that tells it from a stranger's."""
    if weakened:  # whatever is empty counts as one
        small = FileThreads.small
        monkeypatch.setattr(FileThreads, "small", lambda threads, job, _: small(threads, job, mine("")))
    held = Held()

    def first_upload(name: str, _: int) -> Coroutine[Any, Any, object]:
        return upload(lab, EMPTY, OwnedId(name, "s"), lambda: held.begin(name))

    await one_beside_many(held, first_upload, many=9, get=2, all_taken=weakened)


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


@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
async def test_all_that_a_session_has_done_counts_together(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, weakened: bool
) -> None:
    """Be it about its sandbox, about files that it has, or about those that it had."""
    if weakened:  # each counts for itself
        small, numbers = FileThreads.small, count()
        monkeypatch.setattr(FileThreads, "small", lambda threads, job, _: small(threads, job, mine(f"{next(numbers)}")))
    first, second = [await kept(lab, "greedy", text) for text in ("first", "second")]
    others = await kept(lab, "neighbour", "other")
    held, get, session_id = Held(), lab.blobs.get, mine("greedy")
    names = {first.root: "greedy", second.root: "greedy", others.root: "neighbour"}

    def noted_get(digest: str) -> bytes:
        if digest in names:
            held.begin(names[digest])
        return get(digest)

    monkeypatch.setattr(lab.blobs, "get", noted_get)

    async def page(pages: AsyncIterator[object]) -> object:
        return await anext(pages)

    work: list[Callable[[], Coroutine[Any, Any, object]]] = [
        lambda: upload(lab, EMPTY, session_id, lambda: held.begin("greedy")),
        lambda: upload(lab, first, session_id, lambda: held.begin("greedy")),
        lambda: lab.snapshots.take(filled(lab, "third").sandbox, first, session_id=session_id),
        lambda: lab.snapshots.restore(second, lab.place().sandbox, session_id=session_id),
        lambda: lab.snapshots.entries(second, session_id),
        lambda: lab.snapshots.find(first, ("1",), session_id),
        lambda: lab.snapshots.artifacts(EMPTY, second, session_id),
        lambda: lab.snapshots.held_bytes([str(first.root)], 1 << 40, session_id=session_id),
        lambda: page(file_pages(lab.snapshots, second, session_id)),
        lambda: page(change_pages(lab.snapshots, first, second, session_id, "changed")),
    ]

    def call(name: str, number: int) -> Coroutine[Any, Any, object]:
        return work[number]() if name == "greedy" else lab.snapshots.entries(others, mine(name))

    await one_beside_many(held, call, many=len(work), get=4 if weakened else 2, all_taken=weakened)


async def slot_given_back_at_once[T](slots: Any, holder: Any, threads: Executor, job: Callable[[], T]) -> T:
    """The weakness: whoever hangs up has no slot any more, though his job goes on."""
    async with slots.slot(holder.owner, holder):
        return await asyncio.get_running_loop().run_in_executor(threads, job)


@pytest.mark.parametrize("kind", ["small", "large"])
@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
async def test_whoever_hangs_up_has_his_threads_until_his_jobs_have_ended(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, kind: str, weakened: bool
) -> None:
    """Else he would have all of them by asking again."""
    if weakened:
        monkeypatch.setattr(file_threads, "_in_turn", slot_given_back_at_once)
    held, every = Held(), lab.snapshots.threads._small._max_workers if kind == "small" else file_threads.LARGE_THREADS

    def call(name: str) -> asyncio.Task[None]:
        work = getattr(lab.snapshots.threads, kind)
        return asyncio.create_task(work(lambda: held.begin(name), OwnedId(name, "s")))

    other = None
    try:
        for many in (2, every if weakened else 2):
            calls = [call("greedy") for _ in range(2)]
            await held.wait_for(many)
            await as_far_as_it_gets()
            for each in calls:
                each.cancel()
            await asyncio.wait(calls)
        assert held.begun == ["greedy"] * (every if weakened else 2)
        other = call("neighbour")
        if weakened:
            await as_far_as_it_gets()
            assert "neighbour" not in held.begun
        else:
            await asyncio.wait_for(other, SECONDS)
    finally:
        held.go_on.set()
    await other


@asynccontextmanager
async def all_large_threads_taken(lab: Lab) -> AsyncIterator[None]:
    """Within the block others' large work has all threads of large work."""
    held = Held()
    tasks = [
        asyncio.create_task(lab.snapshots.threads.large(lambda: held.begin("greedy"), OwnedId(f"owner {number}", "s")))
        for number in range(file_threads.LARGE_THREADS)
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


@pytest.mark.parametrize("what", soak_the_rest(WORK, ["a count"]))
async def test_taken_for_large_it_does(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The weakness: it is done as large work is, whatever its size."""
    asked = asyncio.Event()

    async def as_large(
        threads: FileThreads, job: Callable[[None], Any], session_id: OwnedId, *, is_large: bool = False
    ) -> Any:
        asked.set()
        return await threads.large(lambda: job(None), session_id)

    def large_slot(threads: FileThreads, session_id: OwnedId, *, is_large: bool) -> Any:
        asked.set()
        return slot(threads, session_id, is_large=True)

    slot = FileThreads.slot
    monkeypatch.setattr(FileThreads, "by_size", as_large)
    monkeypatch.setattr(FileThreads, "slot", large_slot)
    async with live_lab(tmp_path) as lab:
        async with all_large_threads_taken(lab):
            task = asyncio.create_task(WORK[what](lab))
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
        monkeypatch.setattr(file_threads, "LARGE_BYTES", trees.FILE_BYTES - 1)
        assert await WORK[what](lab) == as_small
        assert set(turns) == {"me"}


async def test_how_large_a_restore_is_depends_on_what_differs(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    place = lab.place()
    for number in range(FILES):
        (place.workspace / str(number)).mkdir()
        (place.workspace / str(number) / "file").write_text("first")
    first = await lab.snapshots.take(place.sandbox, EMPTY, session_id=mine("s"))
    (place.workspace / "7" / "file").write_text("second")
    second = await lab.snapshots.take(place.sandbox, first, session_id=mine("s"))
    turns = large_turns(monkeypatch)
    # What is read counts too: the lists of two directories, of which one is long, and one file.
    needed = file_threads._LIST_WEIGHT * len(lab.blobs.get(str(first.root))) + 2 * trees.FILE_BYTES
    assert needed > 3 * trees.FILE_BYTES
    for most, expected in ((needed, []), (needed - 1, ["me"])):
        monkeypatch.setattr(file_threads, "LARGE_BYTES", most)
        await lab.snapshots.restore(first, place.sandbox, session_id=OwnedId("me", "s"))
        assert (place.workspace / "7" / "file").read_text() == "first"
        assert turns == expected
        await lab.snapshots.restore(second, place.sandbox, session_id=OwnedId("me", "s"))
        assert (place.workspace / "7" / "file").read_text() == "second"
        assert turns == expected * 2
    lab.snapshots.forget(place.id)
    empty = lab.place()
    monkeypatch.setattr(file_threads, "LARGE_BYTES", FILES * trees.FILE_BYTES)
    await lab.snapshots.restore(second, empty.sandbox, session_id=OwnedId("else's", "s"))
    assert turns == ["me", "me", "else's"]


async def test_little_is_fetched_ahead_for_what_may_be_large(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a directory with many others, where content comes from elsewhere."""
    place = lab.place()
    for number in range(FILES):
        (place.workspace / str(number)).mkdir()
        (place.workspace / str(number) / "file").write_text(f"{number}")
    snapshot = await lab.snapshots.take(place.sandbox, EMPTY, session_id=mine("s"))
    monkeypatch.setattr(file_threads, "LARGE_BYTES", FILES // 2 * trees.FILE_BYTES)
    fetched: dict[str, int] = {}

    def expect(digests: Iterable[str]) -> None:
        thread = threading.current_thread().name.rpartition("_")[0]
        fetched[thread] = fetched.get(thread, 0) + len(set(digests))

    monkeypatch.setattr(lab.blobs, "expect", expect)
    await lab.snapshots.restore(snapshot, lab.place().sandbox, session_id=mine("s"))
    (place.workspace / "7" / "file").write_text("second")
    lab.snapshots.forget(place.id)
    await lab.snapshots.take(place.sandbox, snapshot, session_id=mine("s"))
    assert fetched.get("era-files", 0) <= FILES // 2
    assert fetched["era-bulk"] > 0


@pytest.mark.parametrize("entries", [1, 3])
def test_a_large_look_puts_nothing_aside_where_small_work_is_done(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, entries: int
) -> None:
    """Neither before everything stands still nor where it can't."""
    monkeypatch.setattr(file_threads, "LARGE_BYTES", 2 * trees.FILE_BYTES)
    names: list[str] = []
    put_tree = ContentCopies.put_tree

    def noted(aside: ContentCopies, fd: int, tree: Any, **more: Any) -> None:
        if not more["still"]:
            names.append(threading.current_thread().name.rpartition("_")[0])
        put_tree(aside, fd, tree, **more)

    monkeypatch.setattr(ContentCopies, "put_tree", noted)
    with opened(tmp_path) as lab:
        for number in range(entries):
            (lab.live.workspace / str(number)).write_text("x")
        lab.moment()
        lab.live.can_freeze = False
        lab.snapshots.forget(lab.live.id)
        lab.last = EMPTY
        lab.moment()
    assert set(names) == {"era-bulk" if entries == 3 else "era-files"}
    assert len(names) >= 2
