"""What a run writes is whole, however it is read, and little of it is in memory."""

from __future__ import annotations

import gc
import hashlib
import random
from pathlib import Path

import pytest

from era.core.execution.spooled_output import MEMORY_BYTES, PIECE, SpooledOutput
from era.store.blobs.blobs import LocalBlobs
from tests.conftest import opened


def some(size: int) -> bytes:
    return random.Random(size).randbytes(size)


async def written(directory: Path, content: bytes) -> SpooledOutput:
    made = SpooledOutput(directory)
    for at in range(0, len(content), PIECE):
        await made.append(content[at : at + PIECE])
    return made


SIZES = [0, 1, MEMORY_BYTES, MEMORY_BYTES + 1, 3 * MEMORY_BYTES + 12_345]


@pytest.mark.parametrize("size", SIZES)
async def test_it_is_whole(tmp_path: Path, size: int) -> None:
    content = some(size)
    made = await written(tmp_path, content)
    assert made.size == size
    assert await made.whole() == content
    assert b"".join([piece async for piece in made.pieces(size // 3, size)]) == content[size // 3 :]
    assert len(made._state[1]) <= MEMORY_BYTES + PIECE
    assert list(tmp_path.iterdir()) == [], "a temporary file has no name"
    blobs = LocalBlobs(tmp_path / "blobs")
    blobs.open()
    with blobs.batch() as batch:
        digest = made.put(batch)
    assert digest == hashlib.sha256(content).hexdigest()
    assert blobs.get(digest) == await made.whole() == content
    blobs.close()


async def test_a_copy_stays_as_it_is(tmp_path: Path) -> None:
    content = some(MEMORY_BYTES * 2 + 5)
    made = await written(tmp_path, content)
    copy = made.so_far()
    await made.append(some(MEMORY_BYTES))
    made.close()
    assert await copy.whole() == content
    copy.close()


async def test_it_is_closed_with_or_without_being_told(tmp_path: Path) -> None:
    made = [await written(tmp_path, some(MEMORY_BYTES + 1)) for _ in range(3)]
    assert opened(tmp_path) == 3
    made[0].close()
    made[0].close()
    assert opened(tmp_path) == 2
    del made
    gc.collect()
    assert opened(tmp_path) == 0
