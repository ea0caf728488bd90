"""What a process has written: its last MiB, numbered by bytes, for any number of readers.

Theory of operation. Output goes into the log as it comes and waits for nobody; a reader asks for what lies behind the
byte that it has seen last. So a reader that is slow, or dead, costs nothing and holds up nobody: it finds out by a
*gap* that what it wanted is gone. Every event is numbered by its last byte, counted over all streams of the process
together. Therefore it makes no difference how output is cut into events: whoever goes on behind a number gets the next
byte, whether he counts events or the bytes of a terminal.

A character is not split between events: up to three bytes of one that is incomplete wait for the rest, but no longer
than a moment, since they may be no text at all.
"""

from __future__ import annotations

import asyncio
import json
from base64 import b64decode, b64encode
from bisect import bisect_right
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from era.core.concurrency.event_log import Gap
from era.core.execution.transcript import incomplete_bytes
from era.core.process import ProcessStream

KEPT_BYTES = 1 << 20
_CHUNK_BYTES = 16 << 10
_CHUNK_COST = 128
"""What a chunk counts besides its bytes. A process that changes between streams all the time is kept less of."""

_MOST_COST = KEPT_BYTES + (KEPT_BYTES // _CHUNK_BYTES + 1) * _CHUNK_COST
"""Enough for the last KEPT_BYTES of one stream, whatever the pieces that they came in."""

_MOMENT = 0.05
"""Seconds for which an incomplete character waits."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Output of one stream, up to the byte `number`."""

    number: int
    stream: ProcessStream
    data: bytes


@dataclass(frozen=True, slots=True)
class Exit:
    """The end of a process. Its number is the one behind the last byte's."""

    number: int
    exit_code: int | None
    signal: int | None
    reason: str | None


type LogEvent = Piece | Gap | Exit


@dataclass(slots=True)
class _Chunk:
    """Bytes of one stream. `start` are before it."""

    start: int
    stream: ProcessStream
    data: bytearray = field(default_factory=bytearray)


class OutputLog:
    """The output of one process. There is one writer."""

    def __init__(self) -> None:
        self.total = 0
        """Bytes that were written, those still waiting for the rest of a character not counted."""

        self.exit: Exit | None = None
        self._chunks: list[_Chunk] = []
        self._starts: list[int] = []
        self._kept = 0
        self._incomplete: dict[ProcessStream, bytes] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._more = asyncio.Event()
        """Set when there is more or all has come, and then replaced."""

    @property
    def kept_bytes(self) -> int:
        return self._kept

    def append(self, stream: ProcessStream, data: bytes) -> None:
        """Take output. It waits for nobody."""
        data = self._incomplete.pop(stream, b"") + data
        if rest := incomplete_bytes(data):
            self._incomplete[stream] = data[-rest:]
            data = data[:-rest]
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(_MOMENT, self.flush)
        if data:
            self._add(stream, data)
            self._wake()

    def finish(self, exit_code: int | None, signal: int | None, reason: str | None) -> None:
        """The process has ended, and nothing comes any more."""
        self.flush()
        self.exit = Exit(self.total + 1, exit_code, signal, reason)
        self._wake()

    async def follow(self, after: int) -> AsyncGenerator[LogEvent]:
        """All events behind the number `after`, as they come, to the end of the process. It may be one that is yet to
        come, or never does: of a process that was lost, readers have had more than is known of it now. Only who has
        had the end isn't told of it."""
        while True:
            event = self._next(after)
            if event is not None:
                after = event.last if isinstance(event, Gap) else event.number
                yield event
            elif self.exit is not None:
                if after != self.exit.number:
                    yield self.exit
                return
            else:
                await self._more.wait()

    def _next(self, after: int) -> Piece | Gap | None:
        """The event behind this number, None where there is none yet."""
        if after >= self.total:
            return None
        first = self._starts[0] if self._starts else self.total
        if after < first:
            return Gap(after + 1, first)
        chunk = self._chunks[bisect_right(self._starts, after) - 1]
        at = after - chunk.start
        data = bytes(chunk.data[at : at + _CHUNK_BYTES])
        if at + len(data) < len(chunk.data) and (rest := incomplete_bytes(data)):
            data = data[:-rest]
        return Piece(after + len(data), chunk.stream, data)

    def _wake(self) -> None:
        self._more.set()
        self._more = asyncio.Event()

    def flush(self) -> None:
        """Take what waits for the rest of a character as it is."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for stream, data in self._incomplete.items():
            self._add(stream, data)
        if self._incomplete:
            self._incomplete.clear()
            self._wake()

    def _add(self, stream: ProcessStream, data: bytes) -> None:
        if not self._chunks or self._chunks[-1].stream != stream or len(self._chunks[-1].data) >= _CHUNK_BYTES:
            self._chunks.append(_Chunk(self.total, stream))
            self._starts.append(self.total)
            self._kept += _CHUNK_COST
        self._chunks[-1].data += data
        self.total += len(data)
        self._kept += len(data)
        drop = 0
        while self._kept - self._size(drop) >= _MOST_COST:
            self._kept -= self._size(drop)
            drop += 1
        if drop:
            del self._chunks[:drop], self._starts[:drop]

    def _size(self, index: int) -> int:
        return _CHUNK_COST + len(self._chunks[index].data)

    def packed(self, most: int) -> bytes:
        """The last `most` bytes or so, for `unpacked`."""
        kept: list[tuple[str, str]] = []
        start, left = self.total, most
        for chunk in reversed(self._chunks):
            data = bytes(chunk.data[-left:])
            kept.append((chunk.stream, b64encode(data).decode()))
            start -= len(data)
            left -= len(data)
            if left <= 0:
                break
        return json.dumps([start, kept[::-1]]).encode()

    @classmethod
    def unpacked(
        cls, packed: bytes | None, total: int, exit_code: int | None, signal: int | None, reason: str | None
    ) -> OutputLog:
        """The log of a process that has ended, of whose `total` bytes this is kept."""
        log = cls()
        if packed:
            log.total, kept = json.loads(packed)
            for stream, data in kept:
                log._chunks.append(_Chunk(log.total, stream, bytearray(b64decode(data))))
                log._starts.append(log.total)
                log.total += len(log._chunks[-1].data)
        log.total = max(log.total, total)
        log.exit = Exit(log.total + 1, exit_code, signal, reason)
        return log
