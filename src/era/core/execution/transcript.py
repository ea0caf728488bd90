"""What a run writes to stdout and stderr, and the events of a cell, in the order in which it came: numbered pieces, for
any number of readers.

Theory of operation. The bytes of each stream are kept apart (spooled_output.py), since that is how they are asked for
afterwards. Beside them is a compact list: of each piece that came, its stream and its size. A reader walks along the
list, so it gets the same pieces with the same numbers while the run lasts, from what is kept of it, and after a restart
of the service. It has a position and no queue: however slow it is, it takes one piece of memory and holds up nobody.

A piece is whole text: a character whose bytes come in two parts belongs to the piece of its last one. So a piece can be
read without those before it, and a reader can go on behind any.

What was imported comes without a list. It is read as stdout in pieces of 64 KiB, then stderr.

An entry of the list is a number in LEB128: twice the size, and one more for stderr. No piece is empty, so 0 stands for
an event: it is followed by the size of the event in LEB128, and by the event.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from era.core.concurrency.meter import turn
from era.core.execution.spooled_output import PIECE, SpooledOutput
from era.core.program import STREAMS, Output, Stream

_PIECE_BYTES = 16 << 10
"""Of a piece that is written: thousands may read, each of whom has one."""

_READ_AT_ONCE = 2048
"""Bytes of the list that a reader takes in one step."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of what a run wrote, by its number from 1 on."""

    number: int
    stream: Stream | Literal["event"]
    data: bytes
    """Of an event, the JSON that CellEvent describes."""


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
        """What was kept of a run that has ended; closed with this. `count` and `order` are None of what was
        imported."""
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

    async def append(self, output: Output) -> None:
        """Add what was written. Raises OSError where the disk fails. Only one call may be under way."""
        stream = output.stream
        for at in range(0, len(output.data), _PIECE_BYTES):
            data = output.data[at : at + _PIECE_BYTES]
            await self[stream].append(data)
            unfinished = self._unfinished[stream]
            tail = (unfinished + data[-4:])[-4:] if len(data) < 4 else data[-4:]
            left = incomplete_bytes(tail)
            self._unfinished[stream] = tail[len(tail) - left :]
            await self._add(stream, len(unfinished) + len(data) - left)

    async def append_event(self, content: bytes) -> None:
        """Add an event of a cell. Raises OSError where the disk fails. Only one call may be under way."""
        await self._add_entry(b"\0" + _leb128(len(content)) + content)

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
                    start = at - size if stream == "event" else ends[stream]
                    if stream != "event":
                        ends[stream] += size
                    if number > after:
                        content = self.order if stream == "event" else self[stream]
                        yield Piece(number, stream, await content.read(start, start + size))
                if at == begin:  # an entry is added as a whole
                    raise OSError(errno.EIO, "the list of what was written is damaged")
                await turn()
            if self.ended:
                return
            if more is self._more:
                await more.wait()

    async def _add(self, stream: Stream, size: int) -> None:
        if size:
            await self._add_entry(_entry(stream, size))

    async def _add_entry(self, entry: bytes) -> None:
        await self.order.append(entry)
        self.count += 1
        self._wake_readers()

    def _wake_readers(self) -> None:
        self._more.set()
        self._more = asyncio.Event()


def plain_count(*sizes: int) -> int:
    """How many pieces streams of these sizes have that come without a list."""
    return sum(-(-size // PIECE) for size in sizes)


async def _plain_sizes(written: SpooledOutput) -> AsyncIterator[int]:
    """The sizes of the pieces of a stream without a list."""
    start = 0
    for border in range(PIECE, written.size + PIECE, PIECE):
        end = written.size
        if border < written.size:
            end = border - incomplete_bytes(await written.read(border - 4, border))
        yield end - start
        start = end


def incomplete_bytes(data: bytes) -> int:
    """How many bytes at the end are the beginning of a character in UTF-8 whose rest is missing."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte < 0x80:
            return 0
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4 if byte < 0xF8 else 0
            return back if back < length else 0
    return 0


def _entry(stream: Stream, size: int) -> bytes:
    return _leb128(size << 1 | (stream == "stderr"))


def _leb128(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _entries(content: bytes) -> Iterator[tuple[Stream | Literal["event"], int, int]]:
    """Read the entries at the beginning of `content`, up to the first whose numbers are cut off.

    Yields:
        Stream and size of each entry, and its own length in bytes, which includes an event. The event itself may lie
        beyond the end of `content`.
    """
    at = 0
    while (number := _number(content, at)) is not None:
        value, after = number
        if value:
            yield "stderr" if value & 1 else "stdout", value >> 1, after - at
            at = after
            continue
        number = _number(content, after)
        if number is None:
            return
        size, after = number
        yield "event", size, after - at + size
        at = after + size


def _number(content: bytes, at: int) -> tuple[int, int] | None:
    """Read the LEB128 number at `at`: its value and where it ends, None where it is cut off."""
    value = shift = 0
    for end in range(at, len(content)):
        value |= (content[end] & 0x7F) << shift
        shift += 7
        if content[end] < 0x80:
            return value, end + 1
    return None
