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
        self._waiting: dict[Hashable, deque[tuple[Callable[[], None], float]]] = {}
        """By source, the one whose turn is next first."""

        self._used: float = 0
        """What began without waiting in this iteration of the loop costs so much."""

    def begin_at_once(self, microseconds: float) -> bool:
        """Whether work of so much may begin in this iteration, without waiting for a slice."""
        if self._waiting or self._used >= SLICE_US:
            return False
        if not self._used:
            self._loop.call_soon(self._reset)
        self._used += microseconds
        return True

    def _reset(self) -> None:
        self._used = 0

    def call(self, source: Hashable, callback: Callable[[], None], microseconds: float = SLICE_US) -> None:
        """Call back in the source's next slice, for work that costs so much: little of it is only a part of one."""
        if not self._waiting:
            self._loop.call_soon(self._next)
        self._waiting.setdefault(source, deque()).append((callback, microseconds))

    def _next(self) -> None:
        left: float = SLICE_US
        granted = []
        while self._waiting and left > 0:
            source = next(iter(self._waiting))
            callbacks = self._waiting.pop(source)
            callback, cost = callbacks.popleft()
            if callbacks:
                self._waiting[source] = callbacks  # behind all others
            left -= cost
            granted.append(callback)
        if self._waiting:
            self._loop.call_soon(self._next)
        for callback in granted:
            try:
                callback()
            except Exception as error:  # those behind it would wait for ever
                self._loop.call_exception_handler({"message": "A callback of a slice has failed.", "exception": error})


_slices: WeakKeyDictionary[asyncio.AbstractEventLoop, _Slices] = WeakKeyDictionary()


def _slices_here() -> _Slices:
    loop = asyncio.get_running_loop()
    return _slices.get(loop) or _slices.setdefault(loop, _Slices(loop))


async def take_slice(source: Hashable, microseconds: float) -> None:
    """Wait until work may begin that costs so much. A slice's worth of it begins at once in an iteration of the loop;
    the rest waits for later ones, in turn between sources. So it bounds what very many connections do at the same
    moment, however little each of them does; a Budget bounds what one does."""
    slices = _slices_here()
    if not slices.begin_at_once(microseconds):
        granted = asyncio.Event()
        slices.call(source, granted.set, microseconds)
        await granted.wait()


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
        slices = _slices_here()

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
