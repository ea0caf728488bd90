"""Uploads on their way into the blob store: how much of them is in memory."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from era.core.files import spool as spools
from era.core.files.spool import SMALL, Slots, Spool, Threads
from era.errors import TooManyUploads

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
        async with spool.receive(body(count), threads) as received:
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
