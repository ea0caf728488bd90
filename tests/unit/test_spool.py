"""Uploads on their way into the blob store: how much of them is in memory."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from era.core.concurrency.tasks import Threads
from era.core.trees import spool as spools
from era.core.trees.spool import SMALL, Slots, Spool
from era.errors import TooManyUploads
from tests.removals import noted_removals, on_the_loop

PIECE = bytes(range(256)) * 64


@pytest.mark.parametrize("is_sound", [True, False], ids=["", "weakened"])
async def test_many_uploads_that_are_not_large(tmp_path: Path, is_sound: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 4 << 20
    monkeypatch.setattr(spools, "_MOST_BUFFERED", most if is_sound else 1 << 40)
    spool, threads, goes_on = Spool(tmp_path / "spool", Slots(0)), Threads(4, "test"), asyncio.Event()
    spool.open()
    waiting = 0

    async def body(count: int) -> AsyncIterator[bytes]:
        nonlocal waiting
        for _ in range(count):
            yield PIECE
        waiting += 1
        await goes_on.wait()

    async def upload(count: int) -> None:
        async with spool.receive(body(count), "me", threads) as received:
            assert (received.size, received.digest) == (count * len(PIECE), hashlib.sha256(PIECE * count).hexdigest())
            content = Path(received.path).read_bytes() if received.content is None else received.content
            assert content == PIECE * count

    counts = [50] * 30 + [1, 0, 3, 4, 5, 63]
    uploads = [asyncio.create_task(upload(count)) for count in counts]
    while waiting < len(counts):  # noqa: ASYNC110  nothing tells of it
        await asyncio.sleep(0.01)
    assert (spool._buffered <= most + len(counts) * SMALL) is is_sound
    goes_on.set()
    await asyncio.gather(*uploads)
    assert spool._buffered == 0
    with pytest.raises(TooManyUploads):
        await upload(64)
    assert spool._buffered == 0
    assert not list((tmp_path / "spool").iterdir())
    await threads.close()


@pytest.mark.parametrize("end", ["", "broken off", "cancelled"])
async def test_no_file_is_removed_on_the_event_loop(tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To remove one of 64 MiB takes 25 ms, one of 4 GiB more than a second."""
    spool, threads, has_all = Spool(tmp_path / "spool", Slots(1)), Threads(1, "test"), asyncio.Event()
    spool.open()
    noted = noted_removals(monkeypatch)

    async def body() -> AsyncIterator[bytes]:
        yield bytes(1 << 20)
        has_all.set()
        if end == "broken off":
            raise ConnectionError
        if end == "cancelled":
            await asyncio.Event().wait()

    async def upload() -> None:
        async with spool.receive(body(), "me", threads) as received:
            assert received.size == 1 << 20

    task = asyncio.create_task(upload())
    await has_all.wait()
    if end == "cancelled":
        task.cancel()
    await asyncio.wait([task])
    assert task.cancelled() if end == "cancelled" else bool(task.exception()) is bool(end)
    assert [name for name, _ in noted] == ["0"]
    assert on_the_loop(noted) == []
    assert not list((tmp_path / "spool").iterdir())
    await threads.close()


async def test_a_file_whose_upload_is_cancelled_is_written_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its descriptor could be another file's while a thread still writes to it."""
    spool, threads = Spool(tmp_path / "spool", Slots(1)), Threads(2, "test")
    spool.open()
    began, goes_on, failures = threading.Event(), threading.Event(), []
    write = spools._File.write

    def held(file: Any, content: bytes) -> None:
        write(file, b"first")
        began.set()
        goes_on.wait()
        try:
            write(file, content)
        except OSError as error:
            failures.append(error)
            raise

    monkeypatch.setattr(spools._File, "write", held)

    async def body() -> AsyncIterator[bytes]:
        yield bytes(1 << 20)

    async def upload() -> None:
        async with spool.receive(body(), "me", threads):
            raise AssertionError

    task = asyncio.create_task(upload())
    await asyncio.to_thread(began.wait)
    task.cancel()
    await asyncio.wait([task], timeout=0.1)
    goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await threads.close()
    assert failures == []
    assert not list((tmp_path / "spool").iterdir())


def hold(slots: Slots, owner: str, held: ExitStack) -> int:
    """Take slots until there is none left for this owner; how many."""
    for taken in range(100):
        try:
            held.enter_context(slots.take(owner))
        except TooManyUploads:
            return taken
    raise AssertionError("there is always one more")


@pytest.mark.parametrize(("how_many", "one", "next_one"), [(0, 0, 0), (1, 1, 0), (2, 1, 1), (5, 3, 1), (32, 16, 8)])
def test_one_owner_has_half_of_the_large_uploads(how_many: int, one: int, next_one: int) -> None:
    slots = Slots(how_many)
    with ExitStack() as held:
        assert [hold(slots, owner, held) for owner in ("one", "next", "one")] == [one, next_one, 0]
        others = [hold(slots, f"{number}", held) for number in range(40)]
        assert one + next_one + sum(others) == how_many, "all of them can be had"


def test_who_gets_no_slot_is_told_whose_uploads_there_are() -> None:
    slots = Slots(3)
    with slots.take("one"), slots.take("one"):
        with pytest.raises(TooManyUploads, match="2 large uploads of this owner are"), slots.take("one"):
            pass
        with (
            slots.take("next"),
            pytest.raises(TooManyUploads, match="3 large uploads of all owners are"),
            slots.take("third"),
        ):
            pass
    with slots.take("third"):
        pass
