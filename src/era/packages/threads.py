"""Work in other threads that is over when it seems to be, and work that goes on after it was asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from era.core.tasks import log_failure, to_its_end

_THREADS = ThreadPoolExecutor(4, thread_name_prefix="era-packages")
"""Packing, unpacking and copying large sets takes long, and what watches the memory and the disk of runs waits for a
thread of the loop's own executor."""


async def in_thread[**P, T](work: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
    """What `work` returns, done in another thread. Unlike asyncio.to_thread, being cancelled waits for the thread: it
    would go on making files in a scratch directory while that is removed."""
    return await to_its_end(asyncio.get_running_loop().run_in_executor(_THREADS, partial(work, *given, **named)))


def in_background(work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
    """Run a coroutine in a task of its own, which is in `tasks` until it has ended. If it fails, that is logged."""
    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    task.add_done_callback(partial(log_failure, event="package_work_failed"))
