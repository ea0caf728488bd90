"""Work in other threads that is over when it seems to be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial


async def in_thread[**P, T](work: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
    """What `work` returns, done in another thread. Unlike asyncio.to_thread, being cancelled waits for the thread: it
    would go on making files in a scratch directory while that is removed."""
    future = asyncio.get_running_loop().run_in_executor(None, partial(work, *given, **named))
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as problem:
            cancelled = problem
    if cancelled is not None:
        future.exception()  # or it would be logged that nobody has asked for it
        raise cancelled
    return future.result()
