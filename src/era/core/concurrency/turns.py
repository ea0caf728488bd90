"""One run at a time per session, the rest wait in order; and which sessions are live."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Hashable, Iterator
from contextlib import asynccontextmanager, contextmanager

from era.core.models import Session
from era.errors import RunUnderWay, SessionLive, TooManyWaiting

_MOST_WAITING = 64


class Turns:
    """Queues by key, in which one at a time has the turn. Queues that nobody waits in take no memory.

    The key of a session is an OwnedId, which names its owner too. So a caller who has no session of this id waits in a
    queue of his own, and holds up nobody.
    """

    def __init__(self, max_waiting: int = _MOST_WAITING) -> None:
        """`max_waiting` is how many may wait in one queue, besides the one that has the turn."""
        self.max_waiting = max_waiting
        self._locks: dict[Hashable, asyncio.Lock] = {}
        self._waiting: dict[Hashable, int] = {}
        """How many hold or wait for a turn."""

        self._long: dict[Hashable, int] = {}
        """How many of those hold or wait for a turn that may last long, such as a run."""

        self._on_waiting: dict[Hashable, Callable[[], None]] = {}
        """What to call when somebody waits, where the holder asked for it."""

    def taken(self, session_id: Hashable) -> bool:
        """Whether somebody holds or waits for the session's turn."""
        return session_id in self._waiting

    def is_full(self, session_id: Hashable) -> bool:
        """Whether as many wait for the session's turn as may."""
        # The first of those counted holds the turn, it does not wait.
        return self._waiting.get(session_id, 0) > self.max_waiting

    def all_taken(self) -> Collection[Hashable]:
        """The sessions whose turns somebody holds or waits for."""
        return self._waiting.keys()

    def check_free(self, session_id: Hashable) -> None:
        """Raises RunUnderWay where the session's turn is a long one, or is about to be."""
        if session_id in self._long:
            raise RunUnderWay(f"A run of session '{session_id}' is under way, and files change between runs.")

    @contextmanager
    def yielding(self, session_id: Hashable, on_waiting: Callable[[], None]) -> Iterator[None]:
        """For the holder of the turn: within the block `on_waiting` is called each time that somebody begins to wait,
        and at once if somebody waits already."""
        self._on_waiting[session_id] = on_waiting
        if self._waiting[session_id] > 1:
            on_waiting()
        try:
            yield
        finally:
            del self._on_waiting[session_id]

    @asynccontextmanager
    async def take(
        self, session_id: Hashable, *, bounded: bool = True, long: bool = False, patience: float | None = None
    ) -> AsyncIterator[None]:
        """Wait for the session's turn and hold it for the block. Raises TooManyWaiting where the queue is full;
        `bounded=False` waits in a full queue too.

        `long` says that the block may last. With `patience`, raises RunUnderWay after that many seconds; with none at
        all (0), at once where the turn is a long one, while short ones are waited for.
        """
        if patience == 0:
            self.check_free(session_id)
        lock = self._locks.setdefault(session_id, asyncio.Lock())
        waiting = self._waiting.get(session_id, 0)
        if bounded and self.is_full(session_id):
            raise TooManyWaiting(f"{self.max_waiting} runs wait for session '{session_id}' already.")
        self._waiting[session_id] = waiting + 1
        if long:
            self._long[session_id] = self._long.get(session_id, 0) + 1
        if session_id in self._on_waiting:
            self._on_waiting[session_id]()
        try:
            try:
                async with asyncio.timeout(patience or None):
                    await lock.acquire()
            except TimeoutError:
                raise RunUnderWay(
                    f"A run of session '{session_id}' is still under way after {patience:g} seconds, and files "
                    "change between runs."
                ) from None
            try:
                yield
            finally:
                lock.release()
        finally:
            if long:
                self._long[session_id] -= 1
                if not self._long[session_id]:
                    del self._long[session_id]
            self._waiting[session_id] -= 1
            if not self._waiting[session_id]:
                del self._waiting[session_id]
                del self._locks[session_id]


class Liveness:
    """The keys of the sessions that are live: their sandbox is held for processes beside runs (live/), and its tree is
    the truth. There is one of these a service.

    The pool notes it here when a sandbox is held, in the session's turn or during a run that has that. So the holder of
    the turn can rely on the answer, unless he runs something himself.
    """

    def __init__(self) -> None:
        self._keys: set[int] = set()

    def add(self, session_key: int) -> None:
        self._keys.add(session_key)

    def remove(self, session_key: int) -> None:
        self._keys.discard(session_key)

    def __contains__(self, session_key: int) -> bool:
        return session_key in self._keys

    def check_not(self, session: Session, what: str) -> None:
        """Raises SessionLive where the session is live. `what` can't be done then, such as "can't be rolled back"."""
        if session.key in self._keys:
            raise SessionLive(f"Session '{session.id}' is live, and {what} until it is put away.")
