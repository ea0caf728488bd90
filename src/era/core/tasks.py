"""Running coroutines at once, and tasks for which nobody waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import Executor
from typing import Any

import structlog

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
