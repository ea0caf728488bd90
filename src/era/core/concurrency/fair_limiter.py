"""Bounded slots for which owners and their sessions wait in turn: for runs, sandboxes, file work, SQL, packages.

Theory of operation. A free slot goes to the next owner in a round, and of that owner's sessions to the next in a round
of theirs. The one served last is served again only after all others who wait. So an owner with a thousand calls delays
another owner by no more than one with a single call, and a session delays its owner's other sessions no more either.
Caps for each owner and each session leave slots free for those who come later, where work may take long.

With a `hint`, waiting is bounded. How long it takes is estimated by how quickly slots have come free of late, and a
call that would wait for too long is refused at once. Where no slot at all comes free, callers are refused after
`patience` seconds; but not while a slot is being cleared for them, as a busy machine may take long for that.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from functools import partial

from era.errors import TooBusy

_LONGEST = 30.0
"""Seconds of waiting beyond which a call is refused."""

_WEIGHT = 0.2
"""Weight of the last interval in the mean interval between two slots that came free."""

_COMING_SECONDS = 1.0
"""Seconds between two looks at whether a slot is still being cleared, once `patience` is over."""

_MOST_COMING_SECONDS = 30.0
"""Seconds beyond `patience` after which a call is refused though a slot is being cleared: it may be for others."""

type Release = Callable[[], None]
"""Gives a slot back. Call it once."""


class _Round[Key: Hashable, Value](OrderedDict[Key, Value]):
    """Owners or sessions that wait, in the order of their turns. The one served last stays behind all newcomers."""

    _last: Key | None = None

    def add(self, key: Key, value: Value) -> None:
        self[key] = value
        if self._last is not None and self._last in self:
            self.move_to_end(self._last)

    def served(self, key: Key) -> None:
        self._last = key
        self.move_to_end(key)


type _Queue = OrderedDict[asyncio.Future[None], None]
type _Sessions = _Round[Hashable, _Queue]


class FairLimiter:
    """A bounded number of slots, given in turn by owner and, within one owner, by session."""

    def __init__(
        self,
        total: int,
        *,
        of_owner: int | None = None,
        each: int | None = None,
        hint: str | None = None,
        patience: float | None = None,
        on_waiting: Callable[[], None] = lambda: None,
        is_coming: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            total: Slots at a time.
            of_owner: Slots at a time of one owner, though others are free. None: all.
            each: Slots at a time of one session. None: all of its owner's.
            hint: The hint of TooBusy. None: callers wait for as long as it takes.
            patience: Seconds without any slot coming free after which callers are refused. None: no bound.
            on_waiting: Called when a call begins to wait.
            is_coming: Returns whether a slot is being cleared for those who wait.
        """
        self._count = total
        self._of_owner = math.inf if of_owner is None else of_owner
        self._each = math.inf if each is None else each
        self._hint = hint
        self._patience = patience
        self._on_waiting = on_waiting
        self._is_coming = is_coming
        self._taken = 0
        self._held: Counter[Hashable] = Counter()
        """Slots by owner, and by owner and session."""

        self._owners: _Round[str, _Sessions] = _Round()
        """The calls that wait, by owner and session."""

        self._waiting = 0
        self._interval = 0.0
        """Mean seconds between two slots that came free while a call waited."""

        self._served_at = 0.0
        """The time at which a slot was last given to a waiting call, or the first of them began to wait."""

    @property
    def count(self) -> int:
        return self._count

    @property
    def taken(self) -> int:
        return self._taken

    @property
    def waiting(self) -> int:
        """The number of calls that wait for a slot."""
        return self._waiting

    @property
    def wanted(self) -> int:
        """The number of slots that should come free: for waiting calls, and for what is taken beyond the total."""
        return self._waiting + max(self._taken - self._count, 0)

    @property
    def is_free(self) -> bool:
        """Whether a call of somebody who holds no slot wouldn't wait now."""
        return self._taken < self._count and not self._owners

    def counts(self) -> dict[str, int]:
        """The numbers of slots, of those taken, and of calls that wait."""
        return {"places": self.count, "taken": self.taken, "waiting": self.waiting}

    def resize(self, total: int) -> None:
        """Change the number of slots. Slots taken beyond it stay taken until they are given back."""
        self._count = total
        self._serve()

    @asynccontextmanager
    async def slot(self, owner: str, session: Hashable = "") -> AsyncIterator[None]:
        """Hold a slot for the block. Raises TooBusy, only with a `hint`."""
        release = await self.take(owner, session)
        try:
            yield
        finally:
            release()

    async def take(self, owner: str, session: Hashable = "") -> Release:
        """Wait for a slot. Raises TooBusy where that would take too long, only with a `hint`."""
        release = partial(self._release, owner, session)
        if self.is_free and self._may_have(owner, session):
            self._grant(owner, session)
            return release
        if self._hint is not None and (seconds := self._estimate(owner)) > _LONGEST:
            raise self._too_busy(self._hint, seconds)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._add(owner, session, turn)
        self._serve()
        if not turn.done():
            self._on_waiting()
        try:
            await self._wait(turn, owner)
        except BaseException:
            if turn.done() and not turn.cancelled():
                release()  # it was granted at the moment at which the caller gave up
            else:
                self._remove(owner, session, turn)
            raise
        return release

    def _release(self, owner: str, session: Hashable) -> None:
        self._taken -= 1
        for holder in (owner, (owner, session)):
            self._held[holder] -= 1
            if not self._held[holder]:
                del self._held[holder]
        self._serve()

    def _may_have(self, owner: str, session: Hashable) -> bool:
        """Whether neither the owner nor the session has as many slots as they may."""
        return self._held[owner] < self._of_owner and self._held[owner, session] < self._each

    def _grant(self, owner: str, session: Hashable) -> None:
        self._taken += 1
        self._held[owner] += 1
        self._held[owner, session] += 1

    def _add(self, owner: str, session: Hashable, turn: asyncio.Future[None]) -> None:
        if not self._owners:
            self._served_at = time.monotonic()
        if owner not in self._owners:
            self._owners.add(owner, _Round())
        sessions = self._owners[owner]
        if session not in sessions:
            sessions.add(session, OrderedDict())
        sessions[session][turn] = None
        self._waiting += 1

    def _remove(self, owner: str, session: Hashable, turn: asyncio.Future[None]) -> None:
        sessions = self._owners.get(owner)
        queue = sessions.get(session) if sessions is not None else None
        if sessions is None or queue is None or turn not in queue:
            return  # cancelled, and then passed over by `_serve`
        del queue[turn]
        self._waiting -= 1
        if not queue:
            del sessions[session]
        if not sessions:
            del self._owners[owner]

    def _next(self) -> tuple[str, Hashable] | None:
        """The owner and session to be served next. It passes over those at their caps: they have slots, so they are
        few, however many wait."""
        for owner, sessions in self._owners.items():
            if self._held[owner] < self._of_owner:
                for session in sessions:
                    if self._held[owner, session] < self._each:
                        return owner, session
        return None

    def _serve(self) -> None:
        """Give free slots to waiting calls."""
        while self._taken < self._count and (served := self._next()) is not None:
            owner, session = served
            sessions = self._owners[owner]
            turn = next(iter(sessions[session]))
            sessions.served(session)
            self._owners.served(owner)
            self._remove(owner, session, turn)
            if turn.done():  # cancelled; its caller finds it gone
                continue
            self._grant(owner, session)
            turn.set_result(None)
            now = time.monotonic()
            self._interval += _WEIGHT * (now - self._served_at - self._interval)
            self._served_at = now

    async def _wait(self, turn: asyncio.Future[None], owner: str) -> None:
        """Wait for a slot. Raises TooBusy once none has come free for too long and none is coming."""
        if self._hint is None or self._patience is None:
            await turn
            return
        began = time.monotonic()
        while not turn.done():
            left = max(began, self._served_at) + self._patience - time.monotonic()
            if left <= 0:
                if not self._is_coming() or left < -_MOST_COMING_SECONDS:
                    raise self._too_busy(self._hint, self._estimate(owner))
                left = _COMING_SECONDS
            await asyncio.wait({turn}, timeout=left)

    def _estimate(self, owner: str) -> float:
        """Seconds until the owner's next call would have a slot."""
        if not self._owners:
            return 0.0
        counts = {other: sum(map(len, sessions.values())) for other, sessions in self._owners.items()}
        own = counts.get(owner, 0)
        before = own + sum(min(count, own + 1) for other, count in counts.items() if other != owner)
        return before * self._interval + max(self._interval, time.monotonic() - self._served_at)

    def _too_busy(self, hint: str, seconds: float) -> TooBusy:
        error = TooBusy("This server has more to do than it can do now.", hint=hint)
        error.retry_after = max(1, math.ceil(seconds))
        return error
