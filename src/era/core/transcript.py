"""What a run writes to stdout and stderr, in the order in which it came: numbered pieces, for any number of readers.

Theory of operation. The bytes of each stream are kept apart (spooled_output.py), since that is how they are asked for
afterwards. Beside them is a compact list: of each piece that came, its stream and its size. A reader walks along the
list, so it gets the same pieces with the same numbers while the run lasts, from what is kept of it, and after a restart
of the service. It has a position and no queue: however slow it is, it takes one piece of memory and holds up nobody.

A piece is whole text: a character whose bytes come in two parts belongs to the piece of its last one. So a piece can be
read without those before it, and a reader can go on behind any.

The list is left out where it is what anybody would guess (`PLAIN`): stdout in pieces of 64 KiB, then stderr. Most runs
write less than that, and are kept without a list; so are those from before there were lists.

An entry of the list is a number in LEB128: twice the size, and one more for stderr.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from era.core.loop_slices import Budget
from era.core.program import STREAMS, Output, Stream
from era.core.spooled_output import PIECE, SpooledOutput

_PIECE_BYTES = 16 << 10
"""Of a piece that is written: thousands may read, each of whom has one. It is four times as much where it was kept by
an older version."""

_READ_AT_ONCE = 2048
"""Bytes of the list that a reader takes in one step."""

_ENTRY_US = 0.5
"""What it costs to pass an entry that a reader has had already."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of what a run wrote, by its number from 1 on."""

    number: int
    stream: Stream
    data: bytes


class Transcript:
    """The output of one run, while it grows and afterwards. Close it, or have it collected."""

    def __init__(self, directory: Path | None = None) -> None:
        """`directory` is where temporary files go."""
        self.stdout = SpooledOutput(directory)
        self.stderr = SpooledOutput(directory)
        self.order = SpooledOutput(directory)
        """The list of the pieces."""

        self.count = 0
        """How many pieces there are."""

        self.ended = False
        """No more comes."""

        self._unfinished = dict.fromkeys(STREAMS, b"")
        """By stream, the begin of a character whose end hasn't come yet."""

        self._more = asyncio.Event()
        """Set when there is more or all has come, and then replaced."""

    @classmethod
    async def of(
        cls, stdout: SpooledOutput, stderr: SpooledOutput, order: SpooledOutput | None, count: int | None
    ) -> Transcript:
        """What was kept of a run that has ended; closed with this. `count` and `order` are None where they are
        PLAIN."""
        made = cls()
        made.stdout, made.stderr = stdout, stderr
        if order is None:
            order, count = SpooledOutput(), 0
            for stream in STREAMS:
                async for size in _plain_sizes(made[stream]):
                    await order.append(_entry(stream, size))
                    count += 1
        made.order, made.count, made.ended = order, count or 0, True
        return made

    def __getitem__(self, stream: Stream) -> SpooledOutput:
        return self.stdout if stream == "stdout" else self.stderr

    @property
    def is_plain(self) -> bool:
        """Whether its list is what is guessed without one."""
        streams = [stream for stream in STREAMS if self[stream].size]
        if self.count != len(streams) or any(self[stream].size > PIECE for stream in streams):
            return False
        return self.count < 2 or self._first == "stdout"

    _first: Stream | None = None
    """The stream of the first piece."""

    async def append(self, output: Output) -> None:
        """Add what was written. Raises OSError where the disk fails. Only one call may be under way."""
        stream = output.stream
        for at in range(0, len(output.data), _PIECE_BYTES):
            data = output.data[at : at + _PIECE_BYTES]
            await self[stream].append(data)
            unfinished = self._unfinished[stream]
            tail = (unfinished + data[-4:])[-4:] if len(data) < 4 else data[-4:]
            left = _unfinished(tail)
            self._unfinished[stream] = tail[len(tail) - left :]
            await self._add(stream, len(unfinished) + len(data) - left)

    async def end(self) -> None:
        """No more comes: readers stop after the last piece. Raises OSError."""
        try:
            for stream, rest in self._unfinished.items():
                self._unfinished[stream] = b""
                await self._add(stream, len(rest))
        finally:
            self.ended = True
            self._wake_readers()

    def share(self) -> Transcript:
        """The same, for readers besides the one who closes it: it goes with the last of them."""
        for written in (self.stdout, self.stderr, self.order):
            written.share()
        return self

    def close(self) -> None:
        for written in (self.stdout, self.stderr, self.order):
            written.close()

    async def pieces(self, after: int = 0) -> AsyncIterator[Piece]:
        """The pieces behind the one with the number `after`: those that there are, then new ones as they come, until
        all has come. Raises OSError where the disk fails, or the list is damaged."""
        budget = Budget(self)
        ends = dict.fromkeys(STREAMS, 0)
        at = number = 0
        while True:
            more = self._more
            while at < self.order.size:
                entries = await self.order.read(at, min(at + _READ_AT_ONCE, self.order.size))
                begin = at
                for stream, size, length in _entries(entries):
                    at += length
                    number += 1
                    start = ends[stream]
                    ends[stream] += size
                    if number > after:
                        yield Piece(number, stream, await self[stream].read(start, start + size))
                    else:
                        budget.charge(_ENTRY_US)
                if at == begin:  # an entry is added as a whole
                    raise OSError(errno.EIO, "the list of what was written is damaged")
                if budget.used_up:
                    await budget.next_slice()
            if self.ended:
                return
            if more is self._more:
                await more.wait()

    async def _add(self, stream: Stream, size: int) -> None:
        if size:
            await self.order.append(_entry(stream, size))
            self.count += 1
            self._first = self._first or stream
            self._wake_readers()

    def _wake_readers(self) -> None:
        self._more.set()
        self._more = asyncio.Event()


def plain_count(*sizes: int) -> int:
    """How many pieces PLAIN streams of these sizes have."""
    return sum(-(-size // PIECE) for size in sizes)


async def _plain_sizes(written: SpooledOutput) -> AsyncIterator[int]:
    """The sizes of the pieces of a stream without a list."""
    start = 0
    for border in range(PIECE, written.size + PIECE, PIECE):
        end = written.size
        if border < written.size:
            end = border - _unfinished(await written.read(border - 4, border))
        yield end - start
        start = end


def _unfinished(tail: bytes) -> int:
    """How many bytes at the end of a text, of which these are the last four, begin a character of UTF-8 that isn't
    complete."""
    for back in range(1, min(len(tail), 3) + 1):
        byte = tail[-back]
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back if back < length else 0
        if byte < 0x80:
            break
    return 0


def _entry(stream: Stream, size: int) -> bytes:
    value = size << 1 | (stream == "stderr")
    entry = bytearray()
    while value > 0x7F:
        entry.append(value & 0x7F | 0x80)
        value >>= 7
    entry.append(value)
    return bytes(entry)


def _entries(content: bytes) -> Iterator[tuple[Stream, int, int]]:
    """Stream and size of each complete entry, and its own length in bytes."""
    value = shift = length = 0
    for byte in content:
        value |= (byte & 0x7F) << shift
        shift += 7
        length += 1
        if byte < 0x80:
            yield "stderr" if value & 1 else "stdout", value >> 1, length
            value = shift = length = 0
