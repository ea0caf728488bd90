"""Work on the lists of many directories, or on long ones, is large by what it comes to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from era.core.files import edits, file_threads, snapshots, trees
from era.core.files.edits import Changes, Place, PutFile, Remove
from era.core.files.file_threads import FileThreads
from era.core.files.snapshots import change_pages, file_pages
from era.core.files.totals import Bounds, Totals
from era.core.models import EMPTY, Snapshot
from tests.conftest import eventually
from tests.core.lab import SETTLE, Lab, large_turns
from tests.owners import mine

DIRECTORIES = 40


async def nested(lab: Lab, text: str = "x") -> Snapshot:
    """Many directories with a file each."""
    place = lab.place()
    for number in range(DIRECTORIES):
        (place.workspace / f"{number:02}").mkdir()
        (place.workspace / f"{number:02}" / "file").write_text(text)
    return await lab.snapshots.take(place.sandbox, EMPTY, session_id=mine("s"))


def lists(monkeypatch: pytest.MonkeyPatch, most: float) -> None:
    """Have as many lists of directories be as much as small work may be."""
    monkeypatch.setattr(file_threads, "LARGE_BYTES", int(most * trees.FILE_BYTES))


@pytest.mark.parametrize("one_page", [1, 5, DIRECTORIES])
@pytest.mark.parametrize("kind", ["files", "changes"])
async def test_a_list_that_becomes_large_is_as_if_it_had_been_from_the_beginning(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, kind: str, one_page: int
) -> None:
    """Whichever page it is on: the first one here has a root, too."""
    one, other = await nested(lab), await nested(lab, "y")
    monkeypatch.setattr(snapshots, "_PAGE_CHARACTERS", one_page * (snapshots._ENTRY_CHARACTERS + len("00/file")))

    def listed() -> AsyncIterator[list[Any]]:
        if kind == "files":
            return file_pages(lab.snapshots, one, mine("s"))
        return change_pages(lab.snapshots, one, other, mine("s"), "changed")

    expected = [page async for page in listed()]
    assert len(expected) == DIRECTORIES // one_page
    turns = large_turns(monkeypatch)
    seen = set()
    for most in (1, 1.5, 3, 5, 8, 12, 100, 500):
        lists(monkeypatch, most)
        assert [page async for page in listed()] == expected
        seen.add(len(turns))
        turns.clear()
    assert {0, len(expected) + 1} <= seen, "none of its pages is large work, or each"


class LargeFromTheSecond:
    """Has each piece of small work but the first given up where it is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.small = 0
        small = FileThreads.small

        async def given_up(threads: FileThreads, job: Callable[[], Any], session_id: Any) -> Any:
            self.small += 1
            if self.small > 1:
                raise trees.TreeNotSmall
            return await small(threads, job, session_id)

        monkeypatch.setattr(FileThreads, "small", given_up)


async def test_nothing_is_listed_twice_or_left_out_where_the_second_page_is_large(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = await nested(lab)
    monkeypatch.setattr(snapshots, "_PAGE_CHARACTERS", 1000)
    expected = [page async for page in file_pages(lab.snapshots, snapshot, mine("s"))]
    turns, given_up = large_turns(monkeypatch), LargeFromTheSecond(monkeypatch)
    assert [page async for page in file_pages(lab.snapshots, snapshot, mine("s"))] == expected
    assert given_up.small == 2, "it isn't tried as small work again"
    assert len(turns) == len(expected), "those behind the first, and that there are no more"


async def test_a_list_that_is_abandoned_leaves_nothing_behind(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot, begun, go_on = await nested(lab), threading.Event(), threading.Event()
    monkeypatch.setattr(snapshots, "_PAGE_CHARACTERS", 1000)
    listed = file_pages(lab.snapshots, snapshot, mine("s"))
    assert len(await anext(listed)) == 4
    read_tree = lab.snapshots.read_tree

    def slow(digest: str, **budget: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return read_tree(digest, **budget)

    monkeypatch.setattr(lab.snapshots, "read_tree", slow)
    next_page: asyncio.Future[object] = asyncio.ensure_future(anext(listed))
    assert await asyncio.to_thread(begun.wait, 60)
    next_page.cancel()
    await asyncio.wait([next_page])
    assert lab.snapshots.threads._small_slots.taken, "its thread is taken until the job has ended"
    go_on.set()
    assert len(await lab.snapshots.entries(snapshot, mine("s"))) == DIRECTORIES
    assert await asyncio.to_thread(eventually, lambda: not lab.snapshots.threads._small_slots.taken, 60)


@pytest.mark.parametrize("large", [False, True])
async def test_a_directory_that_outlived_its_sandbox_is_moved_as_its_size_is(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    place, new = lab.place(), lab.place()
    for number in range(DIRECTORIES):
        (place.workspace / str(number)).write_text("x")
    snapshot = await lab.snapshots.take(place.sandbox, EMPTY, session_id=mine("s"))
    assert lab.snapshots.put_away(place.sandbox, snapshot) == DIRECTORIES
    monkeypatch.setattr(file_threads, "LARGE_ENTRIES", DIRECTORIES - large)
    turns = large_turns(monkeypatch)
    await lab.snapshots.move(place.sandbox, new.sandbox, session_id=mine("s"))
    assert bool(turns) == large
    assert len(list(new.workspace.iterdir())) == DIRECTORIES


def put(paths: Iterable[tuple[str, ...]]) -> Changes:
    changes = Changes()
    for path in paths:
        changes.add(path, PutFile("0" * 64, 0, 0))
    return changes


async def test_an_edit_is_as_large_as_the_lists_that_it_reads_and_makes(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, turns = await nested(lab), large_turns(monkeypatch)

    async def edited(changes: Changes, *, replace: bool = False) -> tuple[str | None, bool]:
        times: list[str] = []
        edited = await lab.snapshots.edit(
            snapshot, changes, lambda _: times.append("put"), Bounds(), mine("s"), replace=replace
        )
        was_large = bool(turns)
        turns.clear()
        assert times in (["put"], ["put"] * 2)
        return edited.root, was_large

    one = [("new",)]
    many = [(f"{number:02}", "new") for number in range(DIRECTORIES)]
    long = [("new", str(number)) for number in range(1000)]
    modules = [("node_modules", f"{number}", "f") for number in range(DIRECTORIES)]
    moved = Changes()
    moved.add(("00",), Remove(recursive=True))
    moved.add(("99",), Place(await lab.snapshots.find(snapshot, ("00",), mine("s"))))
    for changes, replace, most in (
        (put(one), False, 20),
        (put(many), False, 160),
        (put(long), False, 200),
        (put(one), True, 10),
        (put(modules), False, 350),
        (moved, False, 20),
    ):
        lists(monkeypatch, most)
        small = await edited(changes, replace=replace)
        assert not small[1]
        lists(monkeypatch, 1 if replace or most == 20 else most / 4)
        assert await edited(changes, replace=replace) == (small[0], True)


@pytest.mark.parametrize("warm", [False, True])
async def test_a_long_list_is_much_to_store_though_only_one_file_has_changed(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, warm: bool
) -> None:
    place = lab.place()
    for number in range(1000):
        (place.workspace / str(number)).write_text("x")
    await asyncio.sleep(SETTLE)
    snapshot = await lab.snapshots.take(place.sandbox, EMPTY, session_id=mine("s"))
    await asyncio.sleep(SETTLE)
    snapshot = await lab.snapshots.take(place.sandbox, snapshot, session_id=mine("s"))
    for most, large in ((70, False), (60, True)):
        lists(monkeypatch, most)
        turns = large_turns(monkeypatch)
        (place.workspace / "1").write_text(f"{most}")
        if warm:
            memory = lab.snapshots.memories.get(place.id)
            assert memory is not None
            assert memory.watch is not None
        snapshot = await lab.snapshots.take(place.sandbox, snapshot, session_id=mine("s"))
        assert bool(turns) == large


async def test_waiting_for_lists_that_are_elsewhere_is_large_work(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where content is kept in S3, each may take as long as it likes."""
    monkeypatch.setattr(file_threads, "_BYTES_A_SECOND", file_threads.LARGE_BYTES)
    snapshot, turns = await nested(lab), large_turns(monkeypatch)
    get, waited = lab.blobs.get, 0

    def slow(digest: str) -> bytes:
        nonlocal waited
        if threading.current_thread().name.startswith("era-files"):
            waited += 1
            threading.Event().wait(0.25)
        return get(digest)

    monkeypatch.setattr(lab.blobs, "get", slow)
    assert len(await lab.snapshots.entries(snapshot, mine("s"))) == DIRECTORIES
    assert turns
    assert waited <= 5


def test_what_trees_hold_is_forgotten_one_by_one(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "_COUNTS_KEPT", 3)
    for root in "abc":
        lab.snapshots.remember_totals(root, Totals(1))
    assert lab.snapshots._known_totals("a") == Totals(1), "which counts as a use"
    lab.snapshots.remember_totals("d", Totals(2))
    assert [lab.snapshots._known_totals(root) for root in "abcd"] == [Totals(1), None, Totals(1), Totals(2)]


def test_several_threads_remember_what_trees_hold(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "_COUNTS_KEPT", 2)

    def remember(thread: int) -> None:
        for number in range(20_000):
            lab.snapshots.remember_totals(f"{thread} {number % 5}", Totals(number))
            lab.snapshots._known_totals(f"{(thread + 1) % 4} {number % 5}")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(remember, range(4)))
    assert len(lab.snapshots._counts) <= 2


def test_the_weight_of_edits_is_that_of_the_lists_they_make() -> None:
    changes = put([("a", "b", str(number)) for number in range(100)])
    assert changes.list_bytes() == 2 * trees.FILE_BYTES + trees.list_bytes(100)
    assert trees.list_bytes(100) > trees.FILE_BYTES == trees.list_bytes(0)
    assert edits.Changes().list_bytes() == trees.FILE_BYTES
