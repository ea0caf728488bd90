"""Threads for calls that would block the event loop, or hold it up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from era.core.fair_limiter import FairLimiter
from era.core.tasks import free_on, to_its_end


class Threads:
    """A pool of threads for blocking calls. `close` it at the end."""

    def __init__(self, how_many: int, name: str, limiter: FairLimiter | None = None) -> None:
        """`limiter` bounds the calls `in_turn`."""
        self._executor = ThreadPoolExecutor(how_many, thread_name_prefix=name)
        self._limiter = limiter or FairLimiter(how_many)

    async def __call__[T](self, job: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, job, *arguments)

    async def in_turn[T](self, owner: str, job: Callable[..., T], *arguments: Any, session: Hashable = "") -> T:
        """Make a call that may take long, as where a bucket doesn't answer. It keeps its slot until it has ended,
        though its caller may be cancelled before."""
        async with self._limiter.slot(owner, session):
            return await to_its_end(self(job, *arguments))

    async def free(self, job: Callable[[], None]) -> None:
        """See tasks.free_on."""
        await free_on(self._executor, job)

    async def close(self) -> None:
        """Wait for calls under way."""
        await asyncio.to_thread(self._executor.shutdown)


def transfer_threads() -> Threads:
    """Threads for content that is received, sent, or fetched from the blob store. Calls `in_turn` are fewer than the
    threads, so that transfers under way go on where a bucket doesn't answer: a call then takes most of a minute."""
    return Threads(8, "era-transfer", FairLimiter(6, of_owner=3))


computing = Threads(2, "era-computing", FairLimiter(2, of_owner=1)).in_turn
"""Runs on a thread what takes long in Python itself and is done for an owner as often as he asks. The loop's own
executor is left to what is short: what watches the memory and the disk of runs waits there."""
