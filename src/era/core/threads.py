"""Threads for calls that would block the event loop, or hold it up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from era.core.fair_slots import FairSlots
from era.core.tasks import free_on, to_its_end


class Threads:
    """A pool of threads for blocking calls. `close` it at the end."""

    def __init__(self, how_many: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(how_many, thread_name_prefix=name)

    async def __call__[T](self, job: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, job, *arguments)

    async def free(self, job: Callable[[], None]) -> None:
        """See tasks.free_on."""
        await free_on(self._executor, job)

    async def close(self) -> None:
        """Wait for calls under way."""
        await asyncio.to_thread(self._executor.shutdown)


class FairThreads:
    """Threads for calls that may take long, as where a bucket doesn't answer: each holder has a few at a time, so one
    keeps none of the others waiting."""

    def __init__(self, threads: Threads, most: int, most_each: int) -> None:
        """`most` is how many threads such calls have, `most_each` those of one holder."""
        self._threads = threads
        self._slots: FairSlots[str] = FairSlots(most, most_each)

    async def __call__[T](self, holder: str, job: Callable[..., T], *arguments: Any) -> T:
        """What a call returns. It has its slot until it has ended, though its caller may be gone before."""
        async with self._slots.slot(holder):
            return await to_its_end(self._threads(job, *arguments))


computing = FairThreads(Threads(2, "era-computing"), 2, 1)
"""For what takes long in Python itself and is done for an owner as often as he asks. The loop's own executor is left to
what is short: what watches the memory and the disk of runs waits there."""
