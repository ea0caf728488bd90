"""Answers with large objects and results of the storage: the same as in one piece, and never in memory as a whole."""

from __future__ import annotations

import base64
import json
import random
import tracemalloc
from pathlib import Path
from unittest.mock import Mock

import pytest

from era.api.routes import storage
from era.core.execution import spooled_output
from era.core.execution.spooled_output import SpooledOutput
from era.core.owners.api_keys import Caller
from era.errors import Unavailable


async def kept(value: bytes) -> SpooledOutput:
    made = SpooledOutput()
    await made.append(value)
    return made


@pytest.mark.parametrize("size", [1, 2, 3, (3 << 14) - 1, 3 << 14, (3 << 14) + 1, 100_000])
async def test_the_answer_is_the_same(size: int) -> None:
    value, rest = random.Random(size).randbytes(size), {"content": "", "customMetadata": {"a": ""}}
    pieces = storage._in_pieces(await kept(value), json.dumps(rest).encode())
    told = b"".join([piece async for piece in pieces])
    assert json.loads(told) == {**rest, "content": base64.b64encode(value).decode()}
    assert len(told) == len(json.dumps(rest)) + -(-size // 3) * 4


@pytest.mark.parametrize("is_sound", [True, False], ids=["", "weakened"])
async def test_memory_is_flat(is_sound: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_sound:
        monkeypatch.setattr(storage, "_PIECE_BYTES", 1 << 30)
    value = await kept(bytes(8 << 20))
    tracemalloc.start()
    try:
        async for _ in storage._in_pieces(value, b'{"content":""}'):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (peak < 1 << 20) is is_sound


def asked(directory: Path | None) -> Mock:
    """A request to a server whose temporary files are in this directory."""
    request = Mock(state=Mock(caller=Caller("me")))
    request.app.state.storage.directory = directory
    return request


@pytest.mark.parametrize("is_sound", [True, False], ids=["", "weakened"])
async def test_results_of_sql_that_nobody_takes_are_no_memory(
    is_sound: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_sound:
        monkeypatch.setattr(spooled_output, "MEMORY_BYTES", 1 << 40)
    tracemalloc.start()
    try:
        answers = []
        for _ in range(8):
            result = [b"{", *(bytes(1 << 16) for _ in range(64))]
            answers.append(await storage._sql_answer(result, asked(tmp_path)))
        del result
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (held < 8 << 20) is is_sound
    assert all(answer.headers["content-length"] == str(len(b'{"success":true,') + (64 << 16)) for answer in answers)


async def test_a_result_of_sql_is_passed_on_as_it_is(tmp_path: Path) -> None:
    for count in (1, 10_000, 200_000):
        result = [b'{"results":[', b",".join(b"%d" % number for number in range(count)), b"]}"]
        answer = await storage._sql_answer(result, asked(tmp_path))
        iterator = getattr(answer, "body_iterator", None)
        told = bytes(answer.body) if iterator is None else b"".join([piece async for piece in iterator])
        assert json.loads(told) == {"success": True, "results": list(range(count))}
        assert int(answer.headers["content-length"]) == len(told)


async def test_a_result_for_which_the_disk_has_no_room_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="could not be kept") as raised:
        await storage._sql_answer([b"{", bytes(1 << 20)], asked(tmp_path / "gone"))
    assert raised.value.retry_after is None, "clients would send it again"
