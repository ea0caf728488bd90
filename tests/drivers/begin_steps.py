"""What is done with a sandbox whose program has to wait before it begins. See Sandboxes.do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

from era.core.program import Ended, Output, Program
from tests.drivers.sandboxes import AnySandbox


async def begin_late(sandbox: AnySandbox, code: str, state: str, *, kill: bool = False) -> tuple[bytes, int, Ended]:
    """Run a program that may begin once its files are there: what it wrote, when it was allowed to begin, and its end.
    With `kill` the run is killed before."""
    allowed = 0

    async def may_begin() -> None:
        nonlocal allowed
        async with asyncio.timeout(60):
            while not (sandbox.workspace / state).exists():  # noqa: ASYNC110  nothing tells of it
                await asyncio.sleep(0.005)
        if kill:
            await sandbox.kill_run()
        allowed = time.time_ns()

    written, ended = await _run(sandbox, code, may_begin)
    return written, allowed, ended


async def begin_killed(sandbox: AnySandbox, code: str, state: str) -> tuple[bytes, int, Ended]:
    """The same with a run that is killed before."""
    return await begin_late(sandbox, code, state, kill=True)


async def never_begin(sandbox: AnySandbox, code: str) -> str:
    """Run a program that may not begin: what that raises."""

    async def may_begin() -> None:
        raise OSError("it may not")

    try:
        await _run(sandbox, code, may_begin)
    except OSError as problem:
        return str(problem)
    return ""


async def _run(sandbox: AnySandbox, code: str, may_begin: Callable[[], Awaitable[None]]) -> tuple[bytes, Ended]:
    program = Program(code.encode(), b"{}", {}, 60, False, {}, may_begin=may_begin)
    written, ended = b"", None
    events: Any = sandbox.run(program)
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Output):
                written += event.data
            else:
                ended = event
    assert ended is not None
    return written, ended
