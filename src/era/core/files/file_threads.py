"""The threads on which files are scanned, read and stored, and whose turn it is there.

Theory of operation. What is small must not wait for what is large, so the two have threads of their own. How large
something is may be known only once it has begun: then it begins as small work does, with a `Budget`, and is given up
and done anew as large work once that is spent. Where many wait, each owner gets a thread in turn. Of small work each of
his sessions has its turn, too, and no more than half of the threads; of large work a session seldom has more than one
piece.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Protocol

from era.core.fair_limiter import FairLimiter
from era.core.files.trees import FILE_BYTES, TreeNotSmall
from era.core.models import OwnedId
from era.core.tasks import free_on, to_its_end

LARGE_BYTES = 32 << 20
"""Work on more bytes at once is large. Files and tree objects count as trees.FILE_BYTES at least."""

LARGE_ENTRIES = 10_000
"""To look at more entries, or to move them, is large, too."""

_LIST_WEIGHT = 8
"""To read or make a list of entries takes as long as to copy and hash so many times its bytes."""

_BYTES_A_SECOND = LARGE_BYTES
"""As how much it counts to wait for a second."""

_QUICK_SECONDS = 0.01
"""What is on this machine is there within this time, also while other threads have the interpreter."""

_SMALL_THREADS = 4
LARGE_THREADS = 3
_LARGE_OF_OWNER = 2
"""So an owner whose large work takes very long leaves others a thread."""


class Budget:
    """How many bytes a piece of small work may still read or write."""

    def __init__(self) -> None:
        self._left = LARGE_BYTES

    def spend(self, size: int) -> None:
        """Note a file of so many bytes. Raises TreeNotSmall where it is too much."""
        self._left -= max(size, FILE_BYTES)
        if self._left < 0:
            raise TreeNotSmall

    def spend_list(self, size: int, seconds: float) -> None:
        """Note a tree object of so many bytes that it took so long to get: from elsewhere, that may be longer than all
        else. Raises as `spend` does."""
        waited = max(seconds - _QUICK_SECONDS, 0.0)
        self.spend(max(_LIST_WEIGHT * size, int(waited * _BYTES_A_SECOND)))

    def check_room(self, objects: int) -> None:
        """Raises TreeNotSmall where so many files or tree objects, which are about to be made or read, will be too
        much."""
        if objects * FILE_BYTES > self._left:
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

    async def small[T](self, job: Callable[[], T], session_id: OwnedId) -> T:
        """Run a job for a session on a thread, of which a session gets no more than half."""
        return await _in_turn(self._small_slots, session_id, self._small, job)

    async def large[T](self, job: Callable[[], T], session_id: OwnedId) -> T:
        """The same for a job that takes long, with threads of which an owner gets all but one at most."""
        return await _in_turn(self._large_slots, session_id, self._large, job)

    async def by_size[T](self, job: Callable[[Budget | None], T], session_id: OwnedId, *, is_large: bool = False) -> T:
        """Run a job as a small one, called with a budget; and anew as a large one, with None, if it raises TreeNotSmall
        then. Where it is known to be large (`is_large`), only so."""
        if not is_large:
            with suppress(TreeNotSmall):
                return await self.small(lambda: job(Budget()), session_id)
        return await self.large(lambda: job(None), session_id)

    async def to_its_end_by_size[T](
        self, job: Callable[[Budget | None], T], session_id: OwnedId, *, is_large: bool = False
    ) -> T:
        """The same for a job that writes into a working directory. Where the call is cancelled, the job has ended or
        never begins: whoever cancels it removes the directory next."""
        if not is_large:
            with suppress(TreeNotSmall):
                async with self.slot(session_id, is_large=False) as run:
                    return await run(lambda: job(Budget()))
        async with self.slot(session_id, is_large=True) as run:
            return await run(lambda: job(None))

    @asynccontextmanager
    async def slot(self, session_id: OwnedId, *, is_large: bool) -> AsyncIterator[RunOnThread]:
        """Keep a thread free for the block. The context's value runs jobs on it, one at a time."""
        slots, threads = (self._large_slots, self._large) if is_large else (self._small_slots, self._small)
        async with slots.slot(session_id.owner, session_id):
            yield _run_on(threads)

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


def _run_on(threads: Executor) -> RunOnThread:
    """What runs a job on one of these threads, of which one is known to be free."""

    def run[T](job: Callable[[], T], /) -> Awaitable[T]:
        return to_its_end(asyncio.get_running_loop().run_in_executor(threads, job))

    return run


async def _in_turn[T](slots: FairLimiter, session_id: OwnedId, threads: Executor, job: Callable[[], T]) -> T:
    """What a job returns. It has its slot until it has ended, though its caller may be gone before."""
    release = await slots.take(session_id.owner, session_id)
    try:
        running = asyncio.get_running_loop().run_in_executor(threads, job)
    except BaseException:
        release()
        raise

    def ended(done: asyncio.Future[T]) -> None:
        release()
        if not done.cancelled():
            done.exception()  # nobody else looks at it where the caller has gone

    running.add_done_callback(ended)
    return await asyncio.shield(running)
