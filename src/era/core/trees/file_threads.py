"""The threads on which files are scanned, read and stored, and whose turn it is there.

Theory of operation. What is small must not wait for what is large, so the two have threads of their own. Work on a tree
of few entries and bytes is small. Where that is known only once it has begun, it begins as small work, raises
TreeNotSmall, and is done anew as large work. Where many wait, each owner gets a thread in turn. Of small work each of
his sessions has its turn, too, and no more than half of the threads. An owner's large work has all threads but one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Protocol

from era.core.concurrency.fair_limiter import FairLimiter
from era.core.concurrency.tasks import free_on, to_its_end
from era.core.models import OwnedId
from era.core.totals import Totals
from era.core.trees.tree_objects import TreeNotSmall

LARGE_BYTES = 32 << 20
"""Work on more bytes at once is large."""

LARGE_ENTRIES = 10_000
"""Work on a tree of more entries is large, too."""

_SMALL_THREADS = 4
LARGE_THREADS = 3
_LARGE_OF_OWNER = 2
"""So an owner whose large work takes very long leaves others a thread."""


def check_small(totals: Totals) -> None:
    """Raises TreeNotSmall where work on a tree that holds so much is large."""
    if totals.entries > LARGE_ENTRIES or totals.total_bytes > LARGE_BYTES:
        raise TreeNotSmall


class RunOnThread(Protocol):
    """Runs a job on a thread, at once. Where the call is cancelled, the job has ended before."""

    def __call__[T](self, job: Callable[[], T], /) -> Awaitable[T]: ...


class FileThreads:
    """The threads of a host's snapshots. `close` them at the end."""

    def __init__(self) -> None:
        self._small = ThreadPoolExecutor(_SMALL_THREADS, thread_name_prefix="era-files")
        self._small_slots = FairLimiter(_SMALL_THREADS, each=_SMALL_THREADS // 2)
        self._large = ThreadPoolExecutor(LARGE_THREADS, thread_name_prefix="era-bulk")
        self._large_slots = FairLimiter(LARGE_THREADS, of_owner=_LARGE_OF_OWNER)
        self._sweep = ThreadPoolExecutor(1, thread_name_prefix="era-sweep")  # nobody waits for garbage
        # Calls wait for these with their session's turn, so not behind large work.
        self._free = ThreadPoolExecutor(2, thread_name_prefix="era-free")

    async def by_size[T](self, job: Callable[[bool], T], session_id: OwnedId, *, is_large: bool = False) -> T:
        """Run a job as a small one, called with True; and anew as a large one, with False, if it raises TreeNotSmall
        then. Where it is known to be large (`is_large`), only so. Where the call is cancelled, the job has ended or
        never begins: whoever cancels it may remove the directory that it works on next."""
        if not is_large:
            with suppress(TreeNotSmall):
                async with self.slot(session_id, is_large=False) as run:
                    return await run(lambda: job(True))
        async with self.slot(session_id, is_large=True) as run:
            return await run(lambda: job(False))

    @asynccontextmanager
    async def slot(self, session_id: OwnedId, *, is_large: bool) -> AsyncIterator[RunOnThread]:
        """Keep a thread free for the block. The context's value runs jobs on it, one at a time."""
        slots, threads = (self._large_slots, self._large) if is_large else (self._small_slots, self._small)

        def run[T](job: Callable[[], T], /) -> Awaitable[T]:
            return to_its_end(asyncio.get_running_loop().run_in_executor(threads, job))

        async with slots.slot(session_id.owner, session_id):
            yield run

    def soon(self, job: Callable[[], None]) -> None:
        """Have a short job done for which nobody waits."""
        self._small.submit(job)

    async def sweep[T](self, job: Callable[[], T]) -> T:
        """Run a job of garbage collection."""
        return await asyncio.get_running_loop().run_in_executor(self._sweep, job)

    async def free(self, job: Callable[[], None]) -> None:
        """See tasks.free_on."""
        await free_on(self._free, job)

    async def close(self) -> None:
        """Wait for jobs under way."""
        for threads in (self._small, self._large, self._sweep, self._free):
            await asyncio.to_thread(threads.shutdown)
