"""Queues of deliveries: each queue in order, one attempt at a time, until a delivery succeeds or is given up.

Theory of operation. There are two uses. Notices go out to owners' webhooks (webhooks.py), and what came to the inbox of
a session goes to its stored code (public/inbox_worker.py). A delivery is a row, and so is all that decides when it is
attempted. So a crash loses nothing, and another host can go on.

A queue whose first delivery is due has a worker, a task. The worker waits for a slot, attempts the delivery, records
the outcome and looks again; it ends when nothing is due. A poll finds the queues that are due by now, and `wake` starts
a worker without waiting for the poll.

A failed attempt makes its delivery due later, or gives it up. Until then the delivery stays the first of its queue, so
it holds up this queue and no other. An outcome that can't be recorded holds up its queue as well: the row still says
that the delivery is due.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Hashable, Mapping
from typing import Literal

import structlog

from era.core.concurrency.fair_limiter import FairLimiter
from era.core.concurrency.late_ends import delay
from era.core.models import MICROS, now
from era.core.telemetry import origin
from era.errors import EraError, Fenced

log = structlog.get_logger()

type Record = Callable[[], Awaitable[None]]
"""Records the outcome of an attempt. It may be called again where it has failed."""

_POLL_SECONDS = 0.5
_LONGEST_PAUSE = 5.0
"""Seconds between two tries to record an outcome, at most."""


class Deliveries[Key: Hashable, Delivery](ABC):
    """Works off the queues of one use. Call `start` first and `stop` at the end."""

    stop_seconds = 0.0
    """Seconds for which `stop` waits for attempts under way before it cancels them."""

    def __init__(self, name: str, slots: FairLimiter) -> None:
        """
        Args:
            name: The use, as the log names it.
            slots: Bounds the attempts at a time, of all owners and of each.
        """
        self._name = name
        self._slots = slots
        self._workers: dict[Key, asyncio.Task[None]] = {}
        self._polling: asyncio.Task[None] | None = None
        self._is_stopping = False

    @abstractmethod
    async def due(self) -> Mapping[Key, str]:
        """Return the owners of the queues whose first delivery is due at this host, by key."""

    @abstractmethod
    async def next_due(self, key: Key) -> Delivery | None:
        """Return the first delivery of a queue, if it is due."""

    @abstractmethod
    async def attempt(self, delivery: Delivery) -> Record | None:
        """Attempt a delivery. Returns what records the outcome; None where the delivery is gone."""

    async def start(self) -> None:
        self._polling = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """Begin no more attempts. Those that are cancelled or not recorded are made again after the next start."""
        self._is_stopping = True
        workers = list(self._workers.values())
        if workers and self.stop_seconds:
            await asyncio.wait(workers, timeout=self.stop_seconds)
        tasks = [*workers, *([self._polling] if self._polling else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def wake(self, key: Key, owner: str) -> None:
        """Have a worker look at a queue now. One that has just had its last look is started anew by the next poll."""
        if self._is_stopping or key in self._workers:
            return
        task = self._workers[key] = asyncio.create_task(self._work(key, owner))
        task.add_done_callback(lambda _: self._workers.pop(key))

    def is_working(self, key: Key) -> bool:
        """Return whether deliveries of a queue are being attempted."""
        return key in self._workers

    async def _poll(self) -> None:
        while not self._is_stopping:  # or a host that stops would take homes of sessions for which it does nothing
            try:
                for key, owner in (await self.due()).items():
                    self.wake(key, owner)
            except EraError as error:
                log.warning("deliveries_not_looked_at", of=self._name, error=error.message)
            except Exception:  # the next look may succeed
                log.exception("bug", where=self._name)
            await asyncio.sleep(_POLL_SECONDS)

    async def _work(self, key: Key, owner: str) -> None:
        """Attempt the deliveries of a queue until none is due."""
        origin.set(None)  # the request that woke it is about one delivery of many
        try:
            while not self._is_stopping:
                async with self._slots.slot(owner, key):
                    # Only now: while it waited, the delivery may have gone.
                    if self._is_stopping or (delivery := await self.next_due(key)) is None:
                        return
                    if record := await self.attempt(delivery):
                        await self._recorded(key, record)
        except EraError as error:
            log.warning("deliveries_wait", of=self._name, queue=key, error=error.message)
        except Exception:
            log.exception("bug", where=self._name, queue=key)

    async def _recorded(self, key: Key, record: Record) -> None:
        """Record an outcome, now or once the database takes it."""
        failures = 0
        while True:
            try:
                await record()
                return
            except Fenced:
                return  # the host that has the queue now attempts it again
            except EraError as error:
                if not failures:
                    log.warning("attempt_not_recorded", of=self._name, queue=key, error=error.message)
                if self._is_stopping:
                    return
            failures += 1
            await asyncio.sleep(min(delay(failures), _LONGEST_PAUSE))


def after_failure(tries: int, retries: int) -> tuple[Literal["pending", "failed"], int | None]:
    """Return a delivery's status after so many failed tries, and when it is tried again (microseconds since 1970)."""
    if tries > retries:
        return "failed", None
    return "pending", now() + int(delay(tries) * MICROS)
