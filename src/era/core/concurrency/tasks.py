"""Running coroutines at once, tasks for which nobody waits, and threads for calls that would hold up the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import structlog

from era.core.concurrency.fair_limiter import FairLimiter

log = structlog.get_logger()


async def until_one_ends(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run all at once until one has ended or failed, then cancel the rest. Exceptions are swallowed."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def to_its_end[T](call: Awaitable[T]) -> T:
    """What a call returns that can't be cut short, as one on a thread. Where this is cancelled, it has ended before."""
    ending = asyncio.ensure_future(call)
    cancelled = None
    while not ending.done():
        try:
            await asyncio.wait([ending])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        await asyncio.gather(ending, return_exceptions=True)  # nobody else looks at its failure
        raise cancelled
    return ending.result()


async def free_on(threads: Executor, job: Callable[[], None]) -> None:
    """Run on a thread what removes or closes files, to its end: to free the blocks of a large one takes long. Where the
    threads have ended with the service, it is done here, so that nothing is left."""
    try:
        freed = asyncio.get_running_loop().run_in_executor(threads, job)
    except RuntimeError:
        job()
    else:
        await to_its_end(freed)


async def all_ended(calls: Iterable[Awaitable[None]], event: str) -> None:
    """Wait for all of these at once. Those that fail are logged, and cut nothing off."""
    for problem in await asyncio.gather(*calls, return_exceptions=True):
        if problem is not None:
            log.warning(event, error=str(problem))


def in_background(jobs: Iterable[Coroutine[Any, Any, None]]) -> list[asyncio.Task[None]]:
    """Tasks of jobs that go on until they are cancelled. One that fails all the same is logged at once."""
    tasks = [asyncio.create_task(job) for job in jobs]
    for task in tasks:
        task.add_done_callback(_log_end)
    return tasks


def _log_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        log.error("background_job_ended", exc_info=task.exception())


def log_failure(task: asyncio.Task[None], event: str) -> None:
    """Log why a task for which nobody waits has failed, if it has."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning(event, error=str(error))


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
