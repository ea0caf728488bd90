"""Places of which there are only so many, and the queue of those who wait for one.

Theory of operation. A place that comes free goes to whoever has waited longest, by turns of their owners: the owner who
was served last is served again only after all others who wait. So nobody's place depends on who frees it, and an owner
who asks for a thousand delays another by no more than one who asks for one.

Nobody waits in vain. How long it takes is estimated by how quickly places have come free of late, and whoever would
have to wait for too long is told so at once. Where nothing at all comes free, those who wait are told after a moment;
but not while a place is on its way to them, since they can't know how long a busy machine takes to clear it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from era.errors import TooBusy

_LONGEST = 30.0
"""Seconds of waiting beyond which nobody is let into the queue."""

_WEIGHT = 0.2
"""How much the last interval counts in the mean of those between two places that came free."""

_COMING_SECONDS = 1.0
"""After which it is looked again whether a place is still on its way to those whose patience is over."""

_MOST_COMING_SECONDS = 30.0
"""For which they wait for that, and no longer: it may not come, or not to them."""


class FairQueue:
    """So many places, and who waits for them."""

    def __init__(
        self,
        count: int,
        *,
        hint: str,
        patience: float | None = None,
        on_waiting: Callable[[], None] | None = None,
        is_coming: Callable[[], bool] = lambda: False,
    ) -> None:
        """Whoever waits gives up once no place has come free for `patience` seconds, unless a place `is_coming`.
        `on_waiting` is called when somebody begins to wait. `hint` is that of TooBusy."""
        self._count = count
        self._hint = hint
        self._patience = patience
        self._on_waiting = on_waiting
        self._is_coming = is_coming
        self._taken = 0
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """Who waits, by owner, in the order of their turns."""

        self._served_last: str | None = None

        self._interval = 0.0
        """Mean seconds between two places that came free while somebody waited."""

        self._served_at = 0.0
        """When a place was last given to one who waited, or when the first of them began to wait."""

    @property
    def wanted(self) -> int:
        """How many places should come free: for those who wait, and because there are fewer places than are taken."""
        return self.waiting + max(self._taken - self._count, 0)

    @property
    def count(self) -> int:
        return self._count

    @property
    def taken(self) -> int:
        return self._taken

    @property
    def waiting(self) -> int:
        """How many wait for one."""
        return sum(map(len, self._queues.values()))

    def counts(self) -> dict[str, int]:
        """How many places there are, are taken, and are waited for."""
        return {"places": self.count, "taken": self.taken, "waiting": self.waiting}

    @property
    def is_free(self) -> bool:
        """Whether whoever takes one now doesn't wait."""
        return self._taken < self._count and not self._queues

    def resize(self, count: int) -> None:
        """Have so many places from now on. Where more are taken, they stay so until they are given back."""
        self._count = count
        self._serve()

    async def take(self, owner: str) -> None:
        """Take a place, which the caller gives back. Raises TooBusy where that would take too long."""
        if self.is_free:
            self._taken += 1
            return
        seconds = self._estimate(owner)
        if seconds > _LONGEST:
            raise self._too_busy(seconds)
        if not self._queues:
            self._served_at = time.monotonic()
        place = asyncio.get_running_loop().create_future()
        queue = self._queues.setdefault(owner, deque())
        queue.append(place)
        if self._on_waiting is not None:
            self._on_waiting()
        try:
            await self._wait(place, owner)
        except BaseException:
            if place.done() and not place.cancelled():
                self.give_back()  # it came at the moment at which the caller gave up
            else:
                queue.remove(place)
                if not queue and self._queues.get(owner) is queue:
                    del self._queues[owner]
            raise

    def give_back(self) -> None:
        """Give back a place; it goes to the next who waits."""
        self._taken -= 1
        self._serve()

    def _serve(self) -> None:
        """Give free places to those who wait."""
        while self._queues and self._taken < self._count:
            owner = next(iter(self._queues))
            if owner == self._served_last:  # the others come first
                self._queues.move_to_end(owner)
                owner = next(iter(self._queues))
            self._served_last = owner
            queue = self._queues[owner]
            place = queue.popleft()
            if not queue:
                del self._queues[owner]
            self._taken += 1
            place.set_result(None)
            now = time.monotonic()
            self._interval += _WEIGHT * (now - self._served_at - self._interval)
            self._served_at = now

    async def _wait(self, place: asyncio.Future[None], owner: str) -> None:
        """Wait for a place. Raises TooBusy once none has come free for too long, and none is coming."""
        began = time.monotonic()
        while not place.done():
            left = None if self._patience is None else max(began, self._served_at) + self._patience - time.monotonic()
            if left is not None and left <= 0:
                if not self._is_coming() or left < -_MOST_COMING_SECONDS:
                    raise self._too_busy(self._estimate(owner))
                left = _COMING_SECONDS
            await asyncio.wait({place}, timeout=left)

    def _estimate(self, owner: str) -> float:
        """Seconds until the next of this owner's has a place."""
        own = len(self._queues.get(owner, ()))
        before = own + sum(min(len(queue), own + 1) for other, queue in self._queues.items() if other != owner)
        since = time.monotonic() - self._served_at if self._queues else 0.0
        return before * self._interval + max(self._interval, since) if self._queues else 0.0

    def _too_busy(self, seconds: float) -> TooBusy:
        error = TooBusy("This server has more to do than it can do now.", hint=self._hint)
        error.retry_after = max(1, math.ceil(seconds))
        return error
