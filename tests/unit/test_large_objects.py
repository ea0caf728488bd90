"""Answers with large objects of the storage: the same as in one piece, and never in memory as a whole."""

from __future__ import annotations

import base64
import json
import random
import tracemalloc

import pytest

import era.api.files  # noqa: F401  where the paths of the storage's routes are explained
from era.api import storage
from era.core.loop_slices import Budget


@pytest.mark.parametrize("size", [1, 2, 3, (3 << 14) - 1, 3 << 14, (3 << 14) + 1, 100_000])
async def test_the_answer_is_the_same(size: int) -> None:
    value, rest = random.Random(size).randbytes(size), {"content": "", "customMetadata": {"a": ""}}
    told = b"".join([piece async for piece in storage._in_pieces(value, json.dumps(rest).encode(), Budget("me"))])
    assert json.loads(told) == {**rest, "content": base64.b64encode(value).decode()}
    assert len(told) == len(json.dumps(rest)) + -(-size // 3) * 4


@pytest.mark.parametrize("is_sound", [True, False], ids=["", "weakened"])
async def test_memory_is_flat(is_sound: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_sound:
        monkeypatch.setattr(storage, "_PIECE_BYTES", 1 << 30)
    value = bytes(8 << 20)
    tracemalloc.start()
    try:
        async for _ in storage._in_pieces(value, b'{"content":""}', Budget("me")):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (peak < 1 << 20) is is_sound
