"""Looks at live directories that turn out to be large, or become so meanwhile, and such as are known to be."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from era.core.files import file_threads, live_snapshots, trees
from era.core.files.file_threads import FileThreads
from era.core.files.live_snapshots import ContentCopies
from era.core.files.trees import Scan, Tree
from era.core.files.watch import WatchBudget
from era.core.models import DEFAULT_OWNER, EMPTY, OwnedId, Snapshot
from era.core.process import HeldFiles
from tests.conftest import eventually
from tests.core.lab import SETTLE, large_turns
from tests.core.moments import MomentLab, opened
from tests.owners import mine

FILES = 40


@pytest.mark.parametrize("when", ["new_watch", "held_files"])
@pytest.mark.parametrize("grow", ["entries", "bytes"])
def test_what_grows_large_before_it_is_watched_is_given_up_where_small_work_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grow: str, when: str
) -> None:
    """And is watched by the only watch that may be made."""
    monkeypatch.setattr(file_threads, "LARGE_BYTES", 1 << 20 if grow == "bytes" else 1 << 40)
    monkeypatch.setattr(file_threads, "LARGE_ENTRIES", 2 * FILES)
    calls: list[tuple[str, str]] = []

    def noted(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted_call(*arguments: Any, **options: Any) -> Any:
            calls.append((what, threading.current_thread().name.rpartition("_")[0]))
            if what == when:
                for number in range(2 * FILES if grow == "entries" else 1):
                    path = lab.live.workspace / f"new{number}"
                    path.write_bytes(bytes(1 if grow == "entries" else 2 << 20))
            return call(*arguments, **options)

        return noted_call

    with opened(tmp_path) as lab:
        monkeypatch.setattr(lab.snapshots, "_watches", WatchBudget(1000, 1))
        monkeypatch.setattr(lab.snapshots, "new_watch", noted("new_watch", lab.snapshots.new_watch))
        monkeypatch.setattr(lab.live, "held_files", noted("held_files", lab.live.held_files))
        monkeypatch.setattr(ContentCopies, "put_tree", noted("put_tree", ContentCopies.put_tree))
        for number in range(FILES):
            (lab.live.workspace / str(number)).write_text("x")
        lab.moment()
        small = ["new_watch", "held_files"][: ["new_watch", "held_files"].index(when) + 1]
        large = ["new_watch", "held_files", "put_tree"]
        before = [(what, "era-files") for what in small] + [(what, "era-bulk") for what in large]
        assert calls[: len(before)] == before
        # While it stood still: it is so young that all of it is read again.
        assert calls[-2:] == [("held_files", "era-bulk"), ("put_tree", "era-bulk")]
        memory = lab.snapshots.memories.get(lab.live.id)
        assert memory is not None
        assert memory.watch is not None


class GivenUp:
    """How often work was tried as small work in vain, and in whose turn it was done as large work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.small = 0
        self.large = large_turns(monkeypatch)
        small = FileThreads.small

        async def noted_small(threads: FileThreads, job: Callable[[], Any], holder: OwnedId) -> Any:
            try:
                return await small(threads, job, holder)
            except trees.TreeNotSmall:
                self.small += 1
                raise

        monkeypatch.setattr(FileThreads, "small", noted_small)


def full_scans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None]]:
    """Note full scans, from here on: on whose threads, and how many entries they found; None if they were given up."""
    scanned: list[tuple[str, int | None]] = []
    full = Scan.full

    def noted(*arguments: Any) -> Tree:
        entries = None
        try:
            tree = full(*arguments)
            entries = tree.totals.entries
            return tree
        finally:
            scanned.append((threading.current_thread().name.rpartition("_")[0], entries))

    monkeypatch.setattr(Scan, "full", noted)
    return scanned


async def look(lab: MomentLab, live: bool, snapshot: Snapshot) -> Snapshot:
    """The next snapshot of the live place: as that of a live session, or as after a run."""
    if live:
        return (await lab.moments.take(lab.live.sandbox, snapshot, session_id=mine("s"))).snapshot
    return await lab.snapshots.take(lab.live.sandbox, snapshot, session_id=mine("s"))


def unwatched(directory: Path) -> MomentLab:
    """A lab whose live place has some files, and where nothing is watched."""
    lab = MomentLab(directory)
    lab.snapshots._watches = WatchBudget(0)
    for number in range(FILES):
        (lab.live.workspace / str(number)).write_text("x")
    return lab


async def test_a_large_live_session_that_isnt_watched_is_small_work_while_nothing_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up = GivenUp(monkeypatch)
    monkeypatch.setattr(file_threads, "LARGE_BYTES", FILES // 2 * trees.FILE_BYTES)
    lab = unwatched(tmp_path)
    await asyncio.sleep(SETTLE)
    first = (await lab.moments.take(lab.live.sandbox, EMPTY, session_id=mine("s"))).snapshot
    assert given_up.large == [DEFAULT_OWNER]
    (lab.live.workspace / "1").write_text("changed")
    second = (await lab.moments.take(lab.live.sandbox, first, session_id=mine("s"))).snapshot
    assert second.root not in (None, first.root)
    assert (await lab.moments.take(lab.live.sandbox, second, session_id=mine("s"))).snapshot == second
    assert given_up.large == [DEFAULT_OWNER]
    await lab.snapshots.close()


@pytest.mark.parametrize("can_freeze", [True, False])
async def test_a_tree_that_is_known_to_be_large_is_not_tried_as_small_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_freeze: bool
) -> None:
    monkeypatch.setattr(file_threads, "LARGE_ENTRIES", FILES // 2)
    lab = unwatched(tmp_path)
    lab.last = await lab.snapshots.take(lab.live.sandbox, EMPTY, session_id=mine("s"))
    lab.snapshots.forget(lab.live.id)
    given_up = GivenUp(monkeypatch)
    lab.live.can_freeze = can_freeze
    for name in "ab":
        (lab.live.workspace / name).write_text("more")
        lab.last = (await lab.moments.take(lab.live.sandbox, lab.last, session_id=mine("s"))).snapshot
    assert len(lab.contents()) == FILES + 2
    assert given_up.small == 0
    assert set(given_up.large) == {DEFAULT_OWNER}
    await lab.snapshots.close()


class Standing:
    """Notes when everything stops and goes on, and on whose threads content is put aside meanwhile."""

    def __init__(self, lab: MomentLab, monkeypatch: pytest.MonkeyPatch) -> None:
        self.noted: list[str] = []
        put_tree, frozen = ContentCopies.put_tree, lab.live.frozen

        def noted_put(aside: ContentCopies, *arguments: Any, still: bool, **more: Any) -> None:
            if still:
                self.noted.append(threading.current_thread().name.rpartition("_")[0])
            put_tree(aside, *arguments, still=still, **more)

        @asynccontextmanager
        async def noted_frozen() -> AsyncIterator[bool | None]:
            async with frozen() as still:
                self.noted.append("stop")
                yield still
            self.noted.append("go on")

        monkeypatch.setattr(ContentCopies, "put_tree", noted_put)
        monkeypatch.setattr(lab.live, "frozen", noted_frozen)


def test_much_that_has_changed_is_given_up_where_small_work_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though all stands still for it; and everything goes on until large work has its turn. Where files can't share
    blocks with their copies, these may take minutes."""
    with opened(tmp_path) as lab:
        for number in range(FILES):
            (lab.live.workspace / str(number)).write_text("first")
        lab.moment()
        standing = Standing(lab, monkeypatch)
        monkeypatch.setattr(file_threads, "LARGE_BYTES", FILES // 2 * trees.FILE_BYTES)
        (lab.live.workspace / "1").write_text("second")
        lab.moment()
        assert standing.noted == ["stop", "era-files", "go on"]
        standing.noted.clear()
        for number in range(FILES):
            (lab.live.workspace / str(number)).write_text("third")
        assert lab.moment().consistent
        assert standing.noted == ["stop", "go on", "stop", "era-bulk", "go on"]
        assert set(lab.contents().values()) == {b"third"}


async def test_a_large_look_waits_for_its_thread_while_everything_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_threads, "LARGE_BYTES", FILES // 2 * trees.FILE_BYTES)
    lab = MomentLab(tmp_path)
    for number in range(FILES):
        (lab.live.workspace / str(number)).write_text("first")
    first = (await lab.moments.take(lab.live.sandbox, EMPTY, session_id=mine("s"))).snapshot
    standing, go_on = Standing(lab, monkeypatch), threading.Event()
    others = [
        asyncio.create_task(lab.snapshots.threads.large(lambda: go_on.wait(60), OwnedId(f"{number}", "s")))
        for number in range(file_threads.LARGE_THREADS)
    ]
    for number in range(FILES):
        (lab.live.workspace / str(number)).write_text("second")
    look = asyncio.create_task(lab.moments.take(lab.live.sandbox, first, session_id=mine("s")))
    given_up = ["stop", "go on"]
    assert await asyncio.to_thread(eventually, lambda: standing.noted == given_up, 60)
    await asyncio.sleep(0.1)
    assert standing.noted == given_up
    go_on.set()
    assert (await look).consistent
    assert all(await asyncio.gather(*others))
    await lab.snapshots.close()


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("what", ["new files", "new directory", "one file"])
async def test_much_that_was_touched_is_given_up_where_small_work_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, live: bool, what: str
) -> None:
    """In a directory that is watched, where nothing is looked at but that."""
    lab = MomentLab(tmp_path)
    for number in range(3 * FILES):
        (lab.live.workspace / str(number)).write_text("first")

    await asyncio.sleep(SETTLE)
    first = await look(lab, live, EMPTY)
    monkeypatch.setattr(file_threads, "LARGE_ENTRIES", FILES)
    given_up = GivenUp(monkeypatch)
    full = full_scans(monkeypatch)
    directory = lab.live.workspace / "new" if what == "new directory" else lab.live.workspace
    directory.mkdir(exist_ok=True)
    for number in range(1 if what == "one file" else 2 * FILES):
        (directory / f"new{number}").touch()
    second = await look(lab, live, first)
    assert second.file_count == 3 * FILES + (1 if what == "one file" else 2 * FILES)
    assert bool(given_up.large) == (what != "one file")
    if not live:
        assert given_up.small == (what != "one file")
    if what != "new directory":  # in which files may have got their names before it was watched
        assert full == [], "what was touched is still known as large work"
    assert await look(lab, live, second) == second
    await lab.snapshots.close()


@pytest.mark.parametrize("live", [False, True])
async def test_a_full_scan_that_was_needed_and_given_up_is_a_full_scan_as_large_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, live: bool
) -> None:
    """A file has got another name where nobody looks, so what is written under that isn't told."""
    (tmp_path / "lab").mkdir()
    lab = MomentLab(tmp_path / "lab")
    for number in range(FILES):
        (lab.live.workspace / str(number)).write_text("first")

    await asyncio.sleep(SETTLE)
    first = await look(lab, live, EMPTY)
    monkeypatch.setattr(file_threads, "LARGE_ENTRIES", FILES // 2)
    scanned = full_scans(monkeypatch)
    os.link(lab.live.workspace / "1", tmp_path / "other")
    (lab.live.workspace / "1").write_text("second")
    second = await look(lab, live, first)
    assert [thread for thread, _ in scanned] == ["era-files", "era-bulk"]
    assert second.total_bytes == first.total_bytes + 1
    assert await look(lab, live, second) == second
    assert len(scanned) == 2, "from then on it is known"
    await lab.snapshots.close()


async def test_where_it_cant_be_had_as_large_work_it_is_looked_at_while_everything_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was touched before isn't forgotten, as nothing is taken for unchanged then."""
    monkeypatch.setattr(live_snapshots, "_FREEZE_PAUSES", (0, 0))
    lab = MomentLab(tmp_path)
    for number in range(FILES):
        (lab.live.workspace / str(number)).write_text("first")
    await asyncio.sleep(SETTLE)
    lab.last = (await lab.moments.take(lab.live.sandbox, EMPTY, session_id=mine("s"))).snapshot
    monkeypatch.setattr(file_threads, "LARGE_BYTES", FILES // 2 * trees.FILE_BYTES)
    frozen, stops = lab.live.frozen, 0

    @asynccontextmanager
    async def once() -> AsyncIterator[bool | None]:
        nonlocal stops
        stops += 1
        lab.live.too_slow = 0 if stops == 1 else 1
        async with frozen() as still:
            yield still

    monkeypatch.setattr(lab.live, "frozen", once)
    for number in range(FILES):
        (lab.live.workspace / str(number)).write_text("second")
    lab.last = (await lab.moments.take(lab.live.sandbox, lab.last, session_id=mine("s"))).snapshot
    assert stops == 4
    assert set(lab.contents().values()) == {b"second"}
    stops = 0
    (lab.live.workspace / "1").write_text("third")
    lab.last = (await lab.moments.take(lab.live.sandbox, lab.last, session_id=mine("s"))).snapshot
    assert lab.contents()["1"] == b"third"
    await lab.snapshots.close()


@pytest.mark.parametrize("can_freeze", [True, False])
def test_where_it_takes_long_to_find_what_is_held_looks_are_large_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_freeze: bool
) -> None:
    """As processes with very many descriptors make it; until it doesn't any more."""
    asked: list[str] = []
    takes_long = True
    with opened(tmp_path) as lab:
        held_files = lab.live.held_files

        def slow(device: int) -> HeldFiles | None:
            asked.append(threading.current_thread().name.rpartition("_")[0])
            until = time.thread_time() + (2 * live_snapshots._LONG_QUESTION if takes_long else 0)
            while time.thread_time() < until:
                pass
            return held_files(device)

        monkeypatch.setattr(lab.live, "held_files", slow)
        lab.live.can_freeze = can_freeze
        for text in ("first", "second", "third", "fourth"):
            if text == "third":
                takes_long = False
            asked.clear()
            (lab.live.workspace / "file").write_text(text)
            lab.moment()
            assert lab.contents() == {"file": text.encode()}
            if text == "first":
                assert asked[0] == "era-files"
            if text == "second":
                assert set(asked) == {"era-bulk"}
        assert set(asked) == {"era-files"}
