"""The runs under way in this process: what they have written so far, and how to stop and to reach them."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from era.core.models import OwnedId, ServiceCommand
from era.core.ports import Sandbox
from era.errors import EraError

_AGAIN = 0.2
"""Seconds after which a run is told to end once more: the first time its program may not have begun."""


@dataclass(eq=False)
class ActiveRun:
    """A run from its record's beginning to its commit. `begun_at` is of the monotonic clock."""

    run_id: str
    session_id: OwnedId
    session_key: int
    background: bool = False
    service: ServiceCommand | None = None
    """The service that it is, if it is one."""

    sandbox: Sandbox | None = None
    written: dict[str, list[bytes]] = field(default_factory=lambda: {"stdout": [], "stderr": []})
    begun_at: float = field(default_factory=time.monotonic)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    error: BaseException | None = None
    """Why it has no result, once it has ended."""

    callers: int = 0
    """Requests from outside that are being answered by it, of which the last ended at `called_at`."""

    called_at: float = field(default_factory=time.monotonic)
    reached: bool = False
    """Whether it has ever listened where somebody called."""

    _stopping: asyncio.Task[None] | None = None

    @property
    def is_stopping(self) -> bool:
        return self._stopping is not None

    def stop_soon(self) -> None:
        """Tell its program to end, which then has two seconds."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())

    async def stop(self) -> None:
        """End it, and wait until what it left is committed."""
        self.stop_soon()
        await self.ended.wait()

    async def connect(self, port: int) -> socket.socket | None:
        """A connection to what listens there; None where nothing does, or not yet."""
        return None if self.sandbox is None else await self.sandbox.connect(port)

    async def has_ended(self, seconds: float) -> bool:
        """Whether it ends within that time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.ended.wait()
        return self.ended.is_set()

    async def _stop(self) -> None:
        while not self.ended.is_set():
            if self.sandbox is not None:
                await self.sandbox.stop_run()
            await self.has_ended(_AGAIN)


class ActiveRuns:
    """One of a kind; at most one run for each session, since they take turns."""

    def __init__(self) -> None:
        self._runs: dict[str, ActiveRun] = {}
        self._of_session: dict[int, ActiveRun] = {}

    def get(self, run_id: str) -> ActiveRun | None:
        return self._runs.get(run_id)

    def of_session(self, key: int) -> ActiveRun | None:
        return self._of_session.get(key)

    @contextmanager
    def noted(self, run: ActiveRun) -> Iterator[None]:
        """It is under way as long as the block lasts."""
        self._runs[run.run_id] = self._of_session[run.session_key] = run
        try:
            yield
        except BaseException as error:
            run.error = error if isinstance(error, EraError) else EraError("The service failed.")
            raise
        finally:
            del self._runs[run.run_id], self._of_session[run.session_key]
            run.ended.set()

    async def stop_background(self, seconds: float) -> None:
        """End what runs in the background, and wait until that is committed, at most `seconds`."""
        tasks = [asyncio.create_task(run.stop()) for run in self._runs.values() if run.background]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
