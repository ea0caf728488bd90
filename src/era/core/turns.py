"""One run at a time per session; the rest wait in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from contextlib import asynccontextmanager, contextmanager

from era.errors import TooManyWaiting


class Turns:
    """A queue a session, or whatever else is named. Queues that nobody waits in take no memory.

    What names a session names its owner, too: who has none of this id waits in a queue of his own, and is in nobody's
    way."""

    def __init__(self, max_waiting: int = 64) -> None:
        self._max_waiting = max_waiting
        self._locks: dict[Hashable, asyncio.Lock] = {}
        self._waiting: dict[Hashable, int] = {}
        self._wanted: dict[Hashable, Callable[[], None]] = {}

    def taken(self, session_id: Hashable) -> bool:
        """Whether somebody holds or waits for the session's turn."""
        return session_id in self._waiting

    @contextmanager
    def yielding(self, session_id: Hashable, wanted: Callable[[], None]) -> Iterator[None]:
        """For whoever holds the turn: `wanted` is called when somebody else waits for it, and at once if somebody
        does."""
        self._wanted[session_id] = wanted
        if self._waiting[session_id] > 1:
            wanted()
        try:
            yield
        finally:
            del self._wanted[session_id]

    @asynccontextmanager
    async def take(self, session_id: Hashable, *, bounded: bool = True) -> AsyncIterator[None]:
        """Hold the session's turn. Raises TooManyWaiting; `bounded=False` waits however many there are."""
        lock = self._locks.setdefault(session_id, asyncio.Lock())
        waiting = self._waiting.get(session_id, 0)
        # The first of those counted holds the turn, it does not wait.
        if bounded and waiting > self._max_waiting:
            raise TooManyWaiting(f"{self._max_waiting} runs wait for session '{session_id}' already.")
        self._waiting[session_id] = waiting + 1
        if session_id in self._wanted:
            self._wanted[session_id]()
        try:
            async with lock:
                yield
        finally:
            self._waiting[session_id] -= 1
            if not self._waiting[session_id]:
                del self._waiting[session_id]
                del self._locks[session_id]
