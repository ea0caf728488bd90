"""The output of a setup, for readers that come early, come late or don't stay."""

from __future__ import annotations

import asyncio

from era.core.concurrency.event_log import Gap
from era.core.setup import progress
from era.core.setup.progress import Became, Line, Progress

type Found = list[Line | Became | Gap]


async def _all(output: Progress, after: int = 0) -> Found:
    """All events, whose numbers are consecutive."""
    found: Found = []
    last = after
    async for item in output.follow(after):
        if isinstance(item, Gap):
            assert item.first == last + 1
            last = item.last
            found.append(item)
        else:
            assert item[0] == last + 1
            last = item[0]
            found.append(item[1])
    return found


async def test_pieces_become_lines() -> None:
    output = Progress()
    output.began()
    output.began()
    for piece in (b"a", b"b\nc\r\n", "ü".encode()[:1], "ü".encode()[1:], b"\n\nopen"):
        output.say("stdout", piece)
    output.say("stderr", b"\xff\n")
    output.end()
    statuses = [event for event in await _all(output) if isinstance(event, Became)]
    assert statuses == [Became("pending"), Became("running")]
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
    expected = [Became("pending"), *(Line("stdout", text) for text in [*map(str, range(100)), "last"])]
    assert await early == await late == await _all(output) == expected
    assert await _all(output, after=40) == expected[40:]
    assert (await asyncio.gather(gone, return_exceptions=True))[0].__class__ is asyncio.CancelledError


async def test_what_is_kept_is_bounded() -> None:
    output = Progress()
    slow = output.follow(1)
    output.say("stdout", b"first\n")
    assert await anext(slow) == (2, Line("stdout", "first"))
    for _ in range(50):
        output.say("stdout", b"x" * (1 << 16))
    for n in range(3 * progress.MAX_LINES):
        output.say("stderr", b"%d\n" % n)
    output.end()
    gap, *kept = await _all(output)
    assert gap == Gap(1, output.last - len(kept))
    lines = [event for event in kept if isinstance(event, Line)]
    assert len(lines) == len(kept) <= progress.MAX_LINES
    assert sum(len(line.text) for line in lines) <= progress.MAX_CHARACTERS
    assert max(len(line.text) for line in lines) <= 2000
    missed, *rest = [event async for event in slow]
    assert missed == Gap(3, gap.last)
    assert [item[1] for item in rest if isinstance(item, tuple)] == kept, "and nothing comes twice"


async def test_numbers_go_on_from_one_setup_to_the_next() -> None:
    output = Progress(last=10)
    output.say("stdout", b"x\n")
    output.end()
    assert await _all(output) == [Gap(1, 10), Became("pending"), Line("stdout", "x")]
    assert await _all(output, after=11) == [Line("stdout", "x")]


async def test_what_comes_after_the_end_changes_nothing() -> None:
    """The service stops, and a tool that is killed for that had written more."""
    output = Progress()
    output.say("stdout", b"before\nbegun")
    output.end()
    before = await _all(output)
    output.say("stdout", b"after\nbegun")
    output.flush()
    output.began()
    assert await _all(output) == before == [Became("pending"), Line("stdout", "before"), Line("stdout", "begun")]
