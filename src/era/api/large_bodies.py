"""How many bytes of large bodies are held in memory at a time, while the rest of them is awaited.

A body of JSON is read as a whole, and its caller may take any time for that. Ordinary ones are small, and nothing of
this concerns them. One that is larger waits until there is room for all of it: so those who wait hold next to nothing,
and none waits for room that another one has who waits as well. Owners share the room (core/shares.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from era.core.shares import Shares
from era.errors import Unavailable

SMALL_BYTES = 128 << 10
"""What a body may have without any room. One caller may have thousands of them under way."""

MOST_BYTES = 256 << 20


class Room:
    """The room of one body."""

    def __init__(self, all_: LargeBodies, holder: str) -> None:
        self._all, self._holder = all_, holder
        self._taken = 0

    async def take(self, size: int, seconds: float) -> None:
        """Wait until there is room for a body of this size, if it has none yet. Raises Unavailable where there is none
        within so many seconds."""
        if self._taken or size <= SMALL_BYTES:
            return
        try:
            async with asyncio.timeout(seconds):
                while not self._all.shares.take(self._holder, size):
                    await self._all.given_back.wait()
        except TimeoutError:
            raise Unavailable("There are too many large bodies at a time that aren't complete.") from None
        self._taken = size

    def give_back(self) -> None:
        """The body is complete, or nobody waits for it any more."""
        if self._taken:
            self._all.shares.give_back(self._holder, self._taken)
            self._taken = 0
            self._all.given_back.set()
            self._all.given_back = asyncio.Event()


class LargeBodies:
    """The room of all bodies of a service."""

    def __init__(self) -> None:
        self.shares: Shares[str] = Shares(MOST_BYTES)
        self.given_back = asyncio.Event()
        """Set once some room is given back; another one takes its place then."""

    @contextmanager
    def room(self, holder: str) -> Iterator[Room]:
        """For one body, within the block. `holder` is the owner who sends it."""
        room = Room(self, holder)
        try:
            yield room
        finally:
            room.give_back()
