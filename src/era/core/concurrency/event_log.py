"""A bounded log of numbered events, for any number of readers who come early, come late, or come back.

Theory of operation. Events get the numbers 1, 2, 3, … in the order in which they are appended. The oldest are dropped
beyond a bound. A reader has a position of its own and waits for more, so readers needn't register, a slow or dead one
holds up nobody and takes no memory, and nothing is left of one that goes away. It gets each event once; what was
dropped before it could be read comes as a Gap that says which numbers are missing.

    log: EventLog[Line] = EventLog(max_size=256 << 10)
    log.append(Line("hello"), size=5)
    log.end()                                  # readers stop after the last event
    async for item in log.follow(after=17):    # numbers from 18 on
        if isinstance(item, Gap):
            ...                                # item.first to item.last are not kept any more
        else:
            number, line = item

`api/routing/event_stream.py` sends what `follow` yields as server-sent events.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gap:
    """Events that a reader asked for and that are not kept any more, by their numbers, both included."""

    first: int
    last: int


class EventLog[T]:
    """The last events of one sequence. Bound to no event loop until somebody follows it."""

    def __init__(self, *, max_size: int, max_events: int = 10_000, last: int = 0) -> None:
        """`max_size` is for the sizes of all events that are kept, together, in whatever unit `append` is told. The
        newest event is kept however large it is. `last` is the number of the last event before this log."""
        self._max_size = max_size
        self._max_events = max_events
        self._kept: deque[tuple[T, int]] = deque()
        self._size = 0
        self._last = last
        self._ended = False
        self._more = asyncio.Event()
        """Set when there are more events or the log has ended, and then replaced."""

    @property
    def last(self) -> int:
        """The number of the newest event, 0 before the first."""
        return self._last

    @property
    def ended(self) -> bool:
        return self._ended

    def append(self, event: T, size: int = 1) -> int:
        """Add an event, and drop the oldest ones beyond the bounds. Returns its number."""
        if self._ended:
            raise RuntimeError("the log has ended")
        self._kept.append((event, size))
        self._size += size
        self._last += 1
        while len(self._kept) > self._max_events or (self._size > self._max_size and len(self._kept) > 1):
            self._size -= self._kept.popleft()[1]
        self._wake_readers()
        return self._last

    def end(self) -> None:
        """No more events come."""
        self._ended = True
        self._wake_readers()

    async def follow(self, after: int = 0) -> AsyncIterator[tuple[int, T] | Gap]:
        """The events behind the one with the number `after`, with their numbers: those that are kept, then new ones as
        they come, until the log has ended."""
        async for piece in self.pieces(after, 1):
            yield piece if isinstance(piece, Gap) else piece[0]

    async def pieces(self, after: int, most: int) -> AsyncIterator[list[tuple[int, T]] | Gap]:
        """Yield the events that `follow` yields, in lists of all that are there at the time, but `most` at most."""
        while True:
            more = self._more
            while after < self._last:
                dropped = self._last - len(self._kept)
                if after < dropped:
                    gap = Gap(after + 1, dropped)
                    after = dropped
                    yield gap
                    continue
                first, after = after + 1, min(after + most, self._last)
                yield [(number, self._kept[number - 1 - dropped][0]) for number in range(first, after + 1)]
            if self._ended:
                return
            if more is self._more:
                await more.wait()

    def _wake_readers(self) -> None:
        self._more.set()
        self._more = asyncio.Event()
