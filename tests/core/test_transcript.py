"""The order of what a run writes: the same pieces with the same numbers, whenever and from wherever they are read."""

from __future__ import annotations

import asyncio
import errno
import gc
import random
import threading
from pathlib import Path

import pytest

from era.core.execution.spooled_output import MEMORY_BYTES, PIECE, SpooledOutput
from era.core.execution.transcript import Piece, Transcript, plain_count
from era.core.program import STREAMS, Output, Stream
from era.core.runs.outputs import INLINE_BYTES, Outputs
from era.store.blobs.blobs import LocalBlobs
from tests.conftest import opened
from tests.soaking import soak_the_rest

TEXT = "aé…😀\n" * 3


async def wrote(directory: Path, *outputs: tuple[Stream, bytes]) -> Transcript:
    made = Transcript(directory)
    for stream, data in outputs:
        await made.append(Output(stream, data))
    await made.end()
    return made


async def pieces(transcript: Transcript, after: int = 0) -> list[Piece]:
    return [piece async for piece in transcript.pieces(after)]


def shape(found: list[Piece]) -> list[tuple[str, bytes]]:
    return [(piece.stream, piece.data) for piece in found]


@pytest.fixture
def outputs(tmp_path: Path) -> Outputs:
    blobs = LocalBlobs(tmp_path / "blobs")
    blobs.open()
    return Outputs(blobs, 10, tmp_path)


async def test_pieces_are_numbered_in_the_order_in_which_they_came(tmp_path: Path) -> None:
    made = await wrote(tmp_path, ("stdout", b"1"), ("stderr", b"2"), ("stdout", b"3"))
    found = await pieces(made)
    assert found == [Piece(1, "stdout", b"1"), Piece(2, "stderr", b"2"), Piece(3, "stdout", b"3")]
    for after in range(5):
        assert await pieces(made, after) == found[after:]


@pytest.mark.parametrize("seed", soak_the_rest(range(20), 4))
async def test_a_piece_is_whole_text(tmp_path: Path, seed: int) -> None:
    """However the bytes are cut, each piece can be read by itself, and all together say what the bytes say."""
    chance = random.Random(seed)
    content = {stream: (TEXT.encode() if seed % 2 else chance.randbytes(60)) + b"\xf0\x9f" for stream in STREAMS}
    rest = dict(content)
    outputs: list[tuple[Stream, bytes]] = []
    while stream := chance.choice([name for name in STREAMS if rest[name]] or [None]):
        size = chance.randint(1, 5)
        outputs.append((stream, rest[stream][:size]))
        rest[stream] = rest[stream][size:]
    found = await pieces(await wrote(tmp_path, *outputs))
    for stream in STREAMS:
        mine = [piece.data for piece in found if piece.stream == stream]
        assert b"".join(mine) == content[stream]
        said = "".join(data.decode(errors="replace") for data in mine)
        assert said == content[stream].decode(errors="replace")


CASES: dict[str, list[tuple[Stream, bytes]]] = {
    "nothing": [],
    "stdout": [("stdout", b"x" * 100)],
    "stderr": [("stderr", b"x")],
    "both": [("stdout", b"x"), ("stderr", b"y")],
    "stderr first": [("stderr", b"x"), ("stdout", b"y")],
    "two pieces": [("stdout", b"x"), ("stdout", b"y")],
    "a character's half": [("stdout", b"x\xc3")],
    "long": [("stdout", b"x" * 3 * PIECE), ("stderr", b"y" * INLINE_BYTES), ("stderr", b"z")],
    "many": [("stdout", b"x"), ("stderr", b"y")] * INLINE_BYTES,
}


@pytest.mark.parametrize("case", CASES)
async def test_what_is_kept_is_read_as_it_was_live(tmp_path: Path, outputs: Outputs, case: str) -> None:
    made = await wrote(tmp_path, *CASES[case])
    live = await pieces(made)
    kept = await outputs.keep(made)
    assert kept is not None
    assert (kept.piece_order_digest is not None) == (case == "many")
    again = await outputs.transcript(kept, made.count)
    assert await pieces(again) == live
    assert again.count == made.count == len(live)
    assert await pieces(again, len(live) // 2) == live[len(live) // 2 :]


async def test_output_of_which_no_order_is_known_is_read_in_one_that_is_always_the_same(tmp_path: Path) -> None:
    texts = {"stdout": ("é" * PIECE).encode() + b"x", "stderr": b"y" + ("…" * PIECE).encode()}
    streams = {name: SpooledOutput(tmp_path) for name in texts}
    for name, text in texts.items():
        for at in range(0, len(text), PIECE):
            await streams[name].append(text[at : at + PIECE])
    found = await pieces(await Transcript.of(streams["stdout"], streams["stderr"], None, None))
    assert len(found) == plain_count(*map(len, texts.values())) == 3 + 4
    assert [piece.stream for piece in found] == ["stdout"] * 3 + ["stderr"] * 4
    for name, text in texts.items():
        assert "".join(piece.data.decode() for piece in found if piece.stream == name) == text.decode()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("rest", [b"\x80", b"\x80" * 5000])
async def test_a_list_that_is_damaged_is_said_to_be(tmp_path: Path, rest: bytes) -> None:
    """Its last entry has no end, which would be looked for for ever, and nothing else be done meanwhile."""
    stdout, stderr, order = (SpooledOutput(tmp_path) for _ in range(3))
    await stdout.append(b"x")
    await order.append(b"\x02" + rest)
    reader = (await Transcript.of(stdout, stderr, order, 2)).pieces()
    assert await anext(reader) == Piece(1, "stdout", b"x")
    with pytest.raises(OSError, match="damaged") as raised:
        await anext(reader)
    assert raised.value.errno == errno.EIO


async def test_readers_come_early_and_late_and_wait(tmp_path: Path) -> None:
    made = Transcript(tmp_path)
    early = asyncio.create_task(pieces(made))
    await asyncio.sleep(0)
    for number in range(1000):
        await made.append(Output(STREAMS[number % 3 == 0], b"%d" % number))
        if number % 10 == 0:
            await asyncio.sleep(0)
    late = asyncio.create_task(pieces(made, 990))
    await asyncio.sleep(0)
    await made.append(Output("stdout", b"last\xf0"))
    await made.end()
    found = await early
    assert [piece.data for piece in found] == [*(b"%d" % number for number in range(1000)), b"last", b"\xf0"]
    assert [piece.number for piece in found] == list(range(1, 1003))
    assert await late == found[990:]


async def test_a_reader_hears_at_once_and_costs_nothing(tmp_path: Path) -> None:
    made = Transcript(tmp_path)
    reader = made.pieces()
    for data in (b"first", b"second"):
        following = asyncio.ensure_future(anext(reader))
        await asyncio.sleep(0)
        await made.append(Output("stdout", data))
        assert (await following).data == data
    for _ in range(3 * MEMORY_BYTES // 1000):
        await made.append(Output("stdout", b"x" * 1000))
    assert len(made.stdout._state[1]) <= MEMORY_BYTES, "what nobody reads is in a file"
    assert (await anext(reader)).number == 3


async def test_who_reads_keeps_it_open_and_no_longer(tmp_path: Path) -> None:
    made = await wrote(tmp_path, *(("stdout", b"x" * PIECE) for _ in range(6)))
    reader = made.share().pieces()
    first = await anext(reader)
    made.close()
    del made
    assert opened(tmp_path) > 0
    rest = [piece async for piece in reader]
    assert sum(len(piece.data) for piece in [first, *rest]) == 6 * PIECE
    assert max(len(piece.data) for piece in [first, *rest]) == 16 << 10, "none is large: each of thousands has one"
    assert first.number == 1
    del reader
    gc.collect()
    assert opened(tmp_path) == 0


async def test_a_bucket_that_does_not_answer_keeps_only_output_waiting(
    tmp_path: Path, outputs: Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = await outputs.keep(await wrote(tmp_path, ("stdout", b"x" * (INLINE_BYTES + 1))))
    assert kept is not None
    answers, asked, read = threading.Event(), asyncio.Event(), outputs._blobs.open_blob
    loop = asyncio.get_running_loop()

    def stuck(digest: str) -> int:
        loop.call_soon_threadsafe(asked.set)
        answers.wait(30)
        return read(digest)

    monkeypatch.setattr(outputs._blobs, "open_blob", stuck)
    calls = [asyncio.create_task(outputs.open(kept, "stdout")) for _ in range(40)]
    try:
        await asked.wait()
        async with asyncio.timeout(5):
            await asyncio.to_thread(int)
    finally:
        answers.set()
    for written in await asyncio.gather(*calls):
        written.close()
    await outputs.close()
