"""The output of a setup, for readers that come early, come late or don't stay."""

from __future__ import annotations

import asyncio

from era.core.setup import progress
from era.core.setup.progress import Began, Line, Progress


async def _all(output: Progress) -> list[Line | Began]:
    return [event async for event in output.follow()]


async def test_pieces_become_lines() -> None:
    output = Progress()
    output.began()
    output.began()
    for piece in (b"a", b"b\nc\r\n", "ü".encode()[:1], "ü".encode()[1:], b"\n\nopen"):
        output.say("stdout", piece)
    output.say("stderr", b"\xff\n")
    output.end()
    assert [event for event in await _all(output) if isinstance(event, Began)] == [Began()]
    lines = [event for event in await _all(output) if isinstance(event, Line)]
    assert [line.text for line in lines if line.stream == "stdout"] == ["ab", "c", "ü", "", "open"]
    assert [line.text for line in lines if line.stream == "stderr"] == ["\ufffd"]


async def test_early_and_late_readers_get_the_same() -> None:
    output = Progress()
    early = asyncio.create_task(_all(output))
    for n in range(100):
        output.say("stdout", b"%d\n" % n)
        if n % 7 == 0:
            await asyncio.sleep(0)
    late = asyncio.create_task(_all(output))
    gone = asyncio.create_task(_all(output))
    await asyncio.sleep(0)
    gone.cancel()
    output.say("stdout", b"last\n")
    output.end()
    expected = [Line("stdout", text) for text in [*map(str, range(100)), "last"]]
    assert await early == await late == await _all(output) == expected
    assert (await asyncio.gather(gone, return_exceptions=True))[0].__class__ is asyncio.CancelledError


async def test_what_is_kept_is_bounded() -> None:
    output = Progress()
    slow = output.follow()
    output.say("stdout", b"first\n")
    assert await anext(slow) == Line("stdout", "first")
    for _ in range(50):
        output.say("stdout", b"x" * (1 << 16))
    for n in range(3 * progress.MAX_LINES):
        output.say("stderr", b"%d\n" % n)
    output.end()
    kept = await _all(output)
    assert len(kept) <= progress.MAX_LINES
    assert sum(len(event.text) for event in kept) <= progress.MAX_CHARACTERS
    assert max(len(event.text) for event in kept) <= 2000
    rest = [event async for event in slow]
    assert rest == kept, "what it missed is dropped, and nothing comes twice"
