"""How many bytes of large bodies are held in memory at a time, by all requests together.

A body of JSON is read as a whole, its caller may take any time for that, and its request may wait for long after that,
such as for its session's turn. Ordinary ones are small, and nothing of this concerns them. One that is larger waits
until there is room for all of it, and has that room until its request is let go. So those who wait for room hold next
to nothing, and whoever has some never waits for more. Those who wait are refused after a while, since runs may be what
the others wait for. Owners share the room (core/shares.py).
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
        self.is_passed_on = False
        """Another request holds the body once it is complete, here or at another host."""

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
            raise Unavailable("There are too many large bodies at a time.") from None
        self._taken = size

    def complete(self, size: int) -> None:
        """The body is complete, and has this size: it holds no more than that."""
        self._keep(0 if self.is_passed_on or size <= SMALL_BYTES else size)

    def give_back(self) -> None:
        """The request is let go."""
        self._keep(0)

    def _keep(self, size: int) -> None:
        if self._taken > size:
            self._all.shares.give_back(self._holder, self._taken - size)
            self._taken = size
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
