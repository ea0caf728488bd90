"""Looks at live directories that turn out to be large, or become so meanwhile, and such as are known to be."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from era.core.models import EMPTY, OwnedId, Snapshot
from era.core.trees import file_threads
from era.core.trees.copies import ContentCopies
from era.core.trees.trees import Scan, Tree
from tests.conftest import eventually
from tests.core.lab import SETTLE
from tests.core.moments import MomentLab, opened
from tests.owners import mine

FILES = 40


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
        monkeypatch.setattr(file_threads, "LARGE_BYTES", FILES // 2 * len("first"))
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
    monkeypatch.setattr(file_threads, "LARGE_BYTES", FILES // 2 * len("first"))
    lab = MomentLab(tmp_path)
    for number in range(FILES):
        (lab.live.workspace / str(number)).write_text("first")
    first = (await lab.moments.take(lab.live.sandbox, EMPTY, session_id=mine("s"))).snapshot
    standing, go_on = Standing(lab, monkeypatch), threading.Event()
    others = [
        asyncio.create_task(
            lab.snapshots.threads.by_size(lambda _: go_on.wait(60), OwnedId(f"{number}", "s"), is_large=True)
        )
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
