"""Copies of what changes while a snapshot of a live session is taken: of one moment, and gone afterwards."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from era.core.trees import copies, file_threads, live_snapshots
from era.core.trees.copies import ContentCopies
from era.core.trees.trees import SnapshotRefused
from tests.core.lab import SETTLE
from tests.core.moments import MomentLab, lab, write

__all__ = ["lab"]


@pytest.mark.parametrize("size", [100, 300_000])
def test_what_changes_while_it_is_put_aside_is_read_again(
    lab: MomentLab, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Its times are those of the change already, and what was read isn't."""
    lab.live.can_freeze = False
    lab.moment()
    write(lab, "file", b"first" + bytes(size))
    time.sleep(SETTLE)

    def then_changed(put: Callable[..., Any]) -> Callable[..., Any]:
        def reading(*arguments: Any) -> Any:
            result = put(*arguments)
            monkeypatch.undo()
            with open(lab.live.workspace / "file", "r+b") as file:
                file.write(b"other")
            return result

        return reading

    monkeypatch.setattr(copies, "_read", then_changed(copies._read))
    monkeypatch.setattr(copies, "copy_changing", then_changed(copies.copy_changing))
    lab.moment()
    assert lab.contents()["file"].startswith(b"first")
    lab.moment()
    assert lab.contents()["file"].startswith(b"other")


def test_what_is_put_aside_for_a_call_that_was_cancelled_is_removed(
    lab: MomentLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread goes on with it meanwhile."""
    write(lab, "file", bytes(300_000))
    began, goes_on, copy = threading.Event(), threading.Event(), copies.copy_changing

    def held(*arguments: Any) -> None:
        began.set()
        goes_on.wait(60)
        copy(*arguments)

    monkeypatch.setattr(copies, "copy_changing", held)

    async def cancelled() -> None:
        taking = asyncio.create_task(lab._take())
        assert await asyncio.to_thread(began.wait, 60)
        taking.cancel()
        await asyncio.wait([taking], timeout=0.1)
        goes_on.set()
        with pytest.raises(asyncio.CancelledError):
            await taking

    asyncio.run(cancelled())
    assert os.listdir(lab.directory / "aside") == []


def grown_first(lab: MomentLab, monkeypatch: pytest.MonkeyPatch, size: int, *, then_shrunk: bool = False) -> list[str]:
    """Let the file grow after each scan, as a program may that is told when files are opened, and perhaps shrink before
    the next one. Returns on which threads content is stored."""
    stored = list[str]()
    put, store = ContentCopies.put_tree, ContentCopies.store_files

    def put_tree(*arguments: Any, **more: Any) -> None:
        os.truncate(lab.live.workspace / "file", size)
        try:
            put(*arguments, **more)
        finally:
            if then_shrunk:
                os.truncate(lab.live.workspace / "file", 5)

    def store_files(*arguments: Any) -> None:
        stored.append(threading.current_thread().name.rpartition("_")[0])
        store(*arguments)

    monkeypatch.setattr(ContentCopies, "put_tree", put_tree)
    monkeypatch.setattr(ContentCopies, "store_files", store_files)
    return stored


@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
def test_what_grows_after_the_scan_is_bounded_all_the_same(
    lab: MomentLab, monkeypatch: pytest.MonkeyPatch, weakened: bool
) -> None:
    """Where nothing can be frozen, what was put aside is kept: more than the session may have, of holes as well."""
    lab.live.can_freeze = False
    lab.live.limits = replace(lab.live.limits, disk_bytes=64 << 20)
    write(lab, "file", b"small")
    grown_first(lab, monkeypatch, 65 << 20, then_shrunk=True)
    if weakened:
        monkeypatch.setattr(ContentCopies, "_take_room", lambda *_: None)
        assert lab.moment().snapshot.total_bytes == 65 << 20
    else:
        with pytest.raises(SnapshotRefused, match="more than 67108864 bytes"):
            lab.moment()
        assert os.listdir(lab.directory / "aside") == []


@pytest.mark.parametrize("can_freeze", [True, False])
@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
def test_what_grows_after_the_scan_is_large_work(
    lab: MomentLab, monkeypatch: pytest.MonkeyPatch, can_freeze: bool, weakened: bool
) -> None:
    """Else all threads of small work could be kept busy for as long as it takes to read thousands of large holes."""
    lab.live.can_freeze = can_freeze
    monkeypatch.setattr(file_threads, "LARGE_BYTES", 1 << 20)
    for number in range(40):  # or the event loop would look at it
        write(lab, f"file{number}", b"small")
    write(lab, "file", b"small")
    stored = grown_first(lab, monkeypatch, 2 << 20)
    if weakened:
        monkeypatch.setattr(live_snapshots, "_small_bytes", lambda *_, **__: 0)
    lab.moment()
    assert lab.contents()["file"] == b"small" + bytes((2 << 20) - 5)
    # Where it can be frozen, it has been stored by then.
    assert stored[0] == ("era-files" if weakened and can_freeze else "era-bulk")
