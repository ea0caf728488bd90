"""What a setup says, for those who listen early, late or not for long."""

from __future__ import annotations

import asyncio

from era.core.setup import progress
from era.core.setup.progress import Began, Line, Progress


async def _all(one: Progress) -> list[Line | Began]:
    return [event async for event in one.follow()]


async def test_pieces_become_lines() -> None:
    one = Progress()
    one.began()
    one.began()
    for piece in (b"a", b"b\nc\r\n", "ü".encode()[:1], "ü".encode()[1:], b"\n\nopen"):
        one.say("stdout", piece)
    one.say("stderr", b"\xff\n")
    one.end()
    assert [event for event in await _all(one) if isinstance(event, Began)] == [Began()]
    found = [event for event in await _all(one) if isinstance(event, Line)]
    assert [line.text for line in found if line.stream == "stdout"] == ["ab", "c", "ü", "", "open"]
    assert [line.text for line in found if line.stream == "stderr"] == ["\ufffd"]


async def test_early_and_late_listeners_hear_the_same() -> None:
    one = Progress()
    early = asyncio.create_task(_all(one))
    for n in range(100):
        one.say("stdout", b"%d\n" % n)
        if n % 7 == 0:
            await asyncio.sleep(0)
    late = asyncio.create_task(_all(one))
    gone = asyncio.create_task(_all(one))
    await asyncio.sleep(0)
    gone.cancel()
    one.say("stdout", b"last\n")
    one.end()
    expected = [Line("stdout", text) for text in [*map(str, range(100)), "last"]]
    assert await early == await late == await _all(one) == expected
    assert (await asyncio.gather(gone, return_exceptions=True))[0].__class__ is asyncio.CancelledError


async def test_what_is_kept_is_bounded() -> None:
    one = Progress()
    slow = one.follow()
    one.say("stdout", b"first\n")
    assert await anext(slow) == Line("stdout", "first")
    for _ in range(50):
        one.say("stdout", b"x" * (1 << 16))
    for n in range(3 * progress.MAX_LINES):
        one.say("stderr", b"%d\n" % n)
    one.end()
    kept = await _all(one)
    assert len(kept) <= progress.MAX_LINES
    assert sum(len(event.text) for event in kept) <= progress.MAX_CHARACTERS
    assert max(len(event.text) for event in kept) <= 2000
    rest = [event async for event in slow]
    assert rest == kept, "what it missed is dropped, and nothing is told twice"
