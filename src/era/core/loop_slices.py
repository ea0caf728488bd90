"""Slices of the event loop: how long a connection may keep it busy before others have their turn.

Theory of operation. One loop serves everybody, and bytes from outside decide how much work they are: 64 KiB are one
piece of a body or ten thousand. So whatever parses such bytes charges what that costs to a Budget. One that is used up
waits for a slice, and of all who wait one gets a slice in each iteration of the loop, in turn between sources. So
however many connections keep the service busy, an iteration takes little longer than a slice, and nobody else's call
more than a few iterations. A source is whoever is behind connections, such as a session: many connections get it no
more.

Nothing is charged for bytes as such: reading and passing on what is large costs little, and waits for its receiver.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable
from weakref import WeakKeyDictionary

SLICE_US = 1000
"""Microseconds of work in a slice, by the rough costs that are charged."""


class _Slices:
    """Grants slices of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: dict[Hashable, deque[Callable[[], None]]] = {}
        """By source, the one whose turn is next first."""

    def call(self, source: Hashable, callback: Callable[[], None]) -> None:
        """Call back in the source's next slice."""
        if not self._waiting:
            self._loop.call_soon(self._next)
        self._waiting.setdefault(source, deque()).append(callback)

    def _next(self) -> None:
        source = next(iter(self._waiting))
        callbacks = self._waiting.pop(source)
        callback = callbacks.popleft()
        if callbacks:
            self._waiting[source] = callbacks  # behind all others
        if self._waiting:
            self._loop.call_soon(self._next)
        callback()


_slices: WeakKeyDictionary[asyncio.AbstractEventLoop, _Slices] = WeakKeyDictionary()


class Budget:
    """What one connection may do before it waits for its next slice."""

    def __init__(self, source: Hashable) -> None:
        self.source = source
        self._left: float = SLICE_US

    @property
    def used_up(self) -> bool:
        return self._left <= 0

    def charge(self, microseconds: float) -> None:
        """Charge work that was done, by what it costs roughly."""
        self._left -= microseconds

    def call_in_next_slice(self, callback: Callable[[], None]) -> None:
        """Call back once the budget is filled up, in a slice of this source's."""
        loop = asyncio.get_running_loop()
        slices = _slices.get(loop) or _slices.setdefault(loop, _Slices(loop))

        def begin() -> None:
            self._left += SLICE_US
            if self._left > 0:
                callback()
            else:  # what was done took longer than several slices
                slices.call(self.source, begin)

        slices.call(self.source, begin)

    async def next_slice(self) -> None:
        """Wait until the budget is filled up."""
        granted = asyncio.Event()
        self.call_in_next_slice(granted.set)
        await granted.wait()

    async def spend(self, microseconds: float) -> None:
        """Charge work that was done, and wait until the budget is filled up if it is used up."""
        self._left -= microseconds
        if self._left <= 0:
            await self.next_slice()
