"""Copies of what changes while a snapshot of a live session is taken: of one moment, and gone afterwards."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from era.core.files import content_copies, sparse
from era.core.files.content_copies import ContentCopies
from era.errors import CommitFailed
from tests.core.lab import SETTLE
from tests.core.moments import MomentLab, lab, write
from tests.removals import noted_removals, on_the_loop

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

    monkeypatch.setattr(content_copies, "_read", then_changed(content_copies._read))
    monkeypatch.setattr(sparse, "copy_changing", then_changed(sparse.copy_changing))
    moment = lab.moment()
    assert lab.contents()["file"].startswith(b"other")
    assert moment.consistent, "two looks agree about what it is now"
    assert lab.moment().snapshot == moment.snapshot


@pytest.mark.parametrize("can_freeze", [True, False])
def test_copies_are_removed_on_threads(lab: MomentLab, can_freeze: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of looks that didn't agree, and of one that could not be stored: each may be large."""
    lab.live.can_freeze = can_freeze
    noted = noted_removals(monkeypatch)
    write(lab, "file", bytes(300_000))
    copy = sparse.copy_changing

    def then_changed(*arguments: Any) -> None:
        copy(*arguments)
        write(lab, "file", bytes(300_000 + len(noted)))

    def refused(*_: Any) -> NoReturn:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sparse, "copy_changing", then_changed)
        lab.moment()
    write(lab, "file", bytes(400_000))
    monkeypatch.setattr(ContentCopies, "_store_below", refused)
    with pytest.raises(CommitFailed):
        lab.moment()
    assert len(noted) >= 2
    assert on_the_loop(noted) == []
    assert os.listdir(lab.directory / "aside") == []


def test_what_is_put_aside_for_a_call_that_was_cancelled_is_removed(
    lab: MomentLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread goes on with it meanwhile."""
    write(lab, "file", bytes(300_000))
    began, goes_on, copy = threading.Event(), threading.Event(), sparse.copy_changing

    def held(*arguments: Any) -> None:
        began.set()
        goes_on.wait()
        copy(*arguments)

    monkeypatch.setattr(sparse, "copy_changing", held)

    async def cancelled() -> None:
        taking = asyncio.create_task(lab._take())
        await asyncio.to_thread(began.wait)
        taking.cancel()
        await asyncio.wait([taking], timeout=0.1)
        goes_on.set()
        with pytest.raises(asyncio.CancelledError):
            await taking

    asyncio.run(cancelled())
    assert os.listdir(lab.directory / "aside") == []
