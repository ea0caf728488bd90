"""The order of what a cell writes and shows.

Theory of operation
===================

A kernel's output comes through two pipes and what it shows through its channel, so one can overtake the other. Before
it shows something, a kernel writes a mark into both pipes and then sends the event over the channel. Output before the
marks is given out first, then the event, then what is behind the marks. The end of a cell has marks of its own.

*What has no order.* Output of processes that a cell has started, and of stdout relative to stderr, is as the supervisor
reads it.

*Trust.* A cell can write marks without events and send events without marks. What is held back for the other part is
bounded: beyond HELD_BYTES or HELD_EVENTS everything is given out as it comes until the cell ends.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection, Iterator, Mapping

from era.core.cells import CellEvent
from era.core.program import Output, Stream

HELD_BYTES = 1 << 20
HELD_EVENTS = 10_000


class MarkedStream:
    """One stream of a cell's output, divided by marks, up to the mark at its end."""

    def __init__(self, event_mark: bytes, end_mark: bytes) -> None:
        self._marks = (event_mark, end_mark)
        self._pattern = re.compile(b"|".join(map(re.escape, self._marks)))
        self._held = b""
        self.ended = False
        """The mark at the end has come."""

    def feed(self, data: bytes) -> tuple[list[bytes | None], bytes]:
        """Divide more of the stream.

        Returns:
            The cell's output, with None for each mark before an event, and what comes behind the mark at the end. The
            beginning of a mark at the end of `data` is held back.
        """
        if self.ended:
            return [], data
        data = self._held + data
        parts: list[bytes | None] = []
        at = 0
        for found in self._pattern.finditer(data):
            parts.append(data[at : found.start()])
            at = found.end()
            if found[0] == self._marks[1]:
                self.ended, self._held = True, b""
                return parts, data[at:]
            parts.append(None)
        held = max(_beginning_at_end(data[at:], mark) for mark in self._marks)
        self._held = data[len(data) - held :]
        parts.append(data[at : len(data) - held])
        return parts, b""

    def rest(self) -> bytes:
        """Take what was held back, where no mark comes any more."""
        held, self._held = self._held, b""
        return held


def _beginning_at_end(data: bytes, mark: bytes) -> int:
    """Count the bytes at the end of `data` that may be the beginning of the mark."""
    at = data.find(mark[:1], max(0, len(data) - len(mark) + 1))
    while at >= 0:
        if mark.startswith(data[at:]):
            return len(data) - at
        at = data.find(mark[:1], at + 1)
    return 0


class CellOrder:
    """Puts the output and the events of one cell in order."""

    def __init__(self, names: Mapping[int, Stream], event_mark: bytes, end_mark: bytes) -> None:
        """`names` has the streams by the descriptor that the kernel has them at."""
        self._names = names
        self._streams = {fd: MarkedStream(event_mark, end_mark) for fd in names}
        self._written = {fd: deque[bytes | None]() for fd in names}
        """Of each stream, what wasn't given out yet; None is a mark."""

        self._events = deque[tuple[CellEvent | None, Collection[int]]]()
        self._mark_bytes = len(event_mark)
        self._held_bytes = 0
        """Of what is in `_written`, with its marks."""

        self._is_ordered = True

    def has_ended(self, fd: int) -> bool:
        """Whether the mark at the end of the stream has come."""
        return self._streams[fd].ended

    def write(self, fd: int, data: bytes) -> bytes:
        """Add what came from a stream. Returns what is behind the mark at its end."""
        parts, after = self._streams[fd].feed(data)
        written = [part for part in parts if part != b""]
        self._written[fd] += written
        self._held_bytes += sum(self._mark_bytes if part is None else len(part) for part in written)
        return after

    def show(self, event: CellEvent | None, marked: Collection[int]) -> None:
        """Add an event, or one that was left out. `marked` are the descriptors that have a mark before it."""
        self._events.append((event, marked))

    def take(self) -> Iterator[Output | CellEvent]:
        """Yield what is in its place by now."""
        while True:
            for fd, written in self._written.items():
                while written and (data := written[0]) is not None:
                    written.popleft()
                    self._held_bytes -= len(data)
                    yield Output(self._names[fd], data)
            if not self._events:
                break
            event, marked = self._events[0]
            if self._is_ordered and not all(self._written[fd] for fd in marked):
                break
            self._events.popleft()
            for fd in marked:
                if self._written[fd]:
                    self._written[fd].popleft()
                    self._held_bytes -= self._mark_bytes
            if event is not None:
                yield event
        if self._held_bytes > HELD_BYTES or len(self._events) > HELD_EVENTS:
            self._is_ordered = False
        if not self._is_ordered:
            yield from self._take_all()

    def rest(self) -> Iterator[Output | CellEvent]:
        """Yield all that is left, where nothing comes any more."""
        self._is_ordered = False
        for fd, stream in self._streams.items():
            if left := stream.rest():
                self._written[fd].append(left)
        yield from self.take()

    def _take_all(self) -> Iterator[Output | CellEvent]:
        """Yield what is held, whatever is missing."""
        while self._events:
            event, _ = self._events.popleft()
            if event is not None:
                yield event
        for fd, written in self._written.items():
            data = b"".join(part for part in written if part)
            written.clear()
            if data:
                yield Output(self._names[fd], data)
        self._held_bytes = 0
