"""The output of a process: numbered by bytes, bounded, for readers that come early, come late, or come back."""

from __future__ import annotations

import asyncio

import pytest

from era.core.concurrency.event_log import Gap
from era.core.live import output_log
from era.core.live.output_log import KEPT_BYTES, Exit, LogEvent, OutputLog, Piece


async def read(log: OutputLog, after: int = 0) -> list[LogEvent]:
    return [event async for event in log.follow(after)]


async def test_whoever_comes_back_gets_the_next_byte() -> None:
    log = OutputLog()
    early = asyncio.create_task(read(log))
    await asyncio.sleep(0)
    log.append("stdout", b"abc")
    log.append("stdout", b"def")
    log.append("stderr", b"gh")
    log.finish(0, None, None)
    end = Exit(9, 0, None, None)
    for after in range(9):
        events = await read(log, after)
        assert b"".join(e.data for e in events if isinstance(e, Piece)) == b"abcdefgh"[after:]
        assert events[-1] == end
    assert await read(log, 9) == []
    events = await early
    assert b"".join(e.data for e in events if isinstance(e, Piece) and e.stream == "stdout") == b"abcdef"
    assert await read(log, 100) == [end]


async def test_what_is_gone_is_said_and_memory_is_bounded() -> None:
    log = OutputLog()
    slow = log.follow(0)
    log.append("stdout", b"x")
    assert await anext(slow) == Piece(1, "stdout", b"x")
    for _ in range(300):
        log.append("stdout", b"y" * 10_000)
    gap = await anext(slow)
    assert isinstance(gap, Gap)
    assert gap.first == 2
    assert log.total - gap.last >= KEPT_BYTES, "a MiB is kept"
    assert log.kept_bytes < KEPT_BYTES + (1 << 16)
    piece = await anext(slow)
    assert isinstance(piece, Piece)
    assert piece.number == gap.last + len(piece.data)
    for index in range(100_000):
        log.append("stdout" if index % 2 else "stderr", b"z")
    assert len(log._chunks) < 10_000, "many small pieces of many streams don't take more memory"


@pytest.mark.parametrize("text", ["ä", "€", "😀", "aä€😀z" * 9])
async def test_no_character_is_split(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_log, "_MOMENT", 3600.0)  # on a busy machine a byte may come later than in a moment
    log = OutputLog()
    reading = asyncio.create_task(read(log))
    for byte in text.encode():
        log.append("pty", bytes([byte]))
        await asyncio.sleep(0)
    log.finish(0, None, None)
    pieces = [event.data for event in await reading if isinstance(event, Piece)]
    assert "".join(piece.decode() for piece in pieces) == text


async def test_what_is_no_text_is_passed_on_after_a_moment() -> None:
    log = OutputLog()
    log.append("stdout", b"\xf0\x9f")
    assert await anext(log.follow(0)) == Piece(2, "stdout", b"\xf0\x9f")
    log.append("stdout", b"\xff\xfe\xc3")
    log.finish(1, 9, "why")
    assert b"".join(e.data for e in await read(log, 2) if isinstance(e, Piece)) == b"\xff\xfe\xc3"


async def test_the_end_of_it_is_packed() -> None:
    log = OutputLog()
    log.append("stdout", b"a" * 1000)
    log.append("stderr", b"b" * 10)
    log.finish(3, None, None)
    kept = OutputLog.unpacked(log.packed(20), log.total, 3, None, None)
    assert await read(kept) == [
        Gap(1, 990),
        Piece(1000, "stdout", b"a" * 10),
        Piece(1010, "stderr", b"b" * 10),
        Exit(1011, 3, None, None),
    ]
    lost = OutputLog.unpacked(None, 0, None, None, "lost")
    assert await read(lost) == [Exit(1, None, None, "lost")]


async def test_no_event_is_large_whatever_came_at_once() -> None:
    log, written = OutputLog(), "ä€𝄞x" * 12_345
    log.append("stdout", b"")
    log.append("stdout", written.encode())
    log.finish(0, None, None)
    pieces = [event for event in await read(log) if isinstance(event, Piece)]
    assert max(len(piece.data) for piece in pieces) <= 16 << 10
    assert "".join(piece.data.decode() for piece in pieces) == written, "and no character is in two of them"
