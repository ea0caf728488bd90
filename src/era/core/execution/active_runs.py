"""The runs under way in this process: what they have written so far, and how to stop and to reach them."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from era.core.execution.transcript import Transcript
from era.core.models import OwnedId, ServiceCommand
from era.core.ports import Sandbox
from era.core.program import StopCell
from era.errors import EraError

_AGAIN = 0.2
"""Seconds until a run is told to end once more: the first time its program may not have begun."""


@dataclass(eq=False)
class ActiveRun:
    """A run from the moment it is on record to the end of its commit. Times are of the monotonic clock."""

    run_id: str
    session_id: OwnedId
    session_key: int
    transcript: Transcript = field(repr=False)
    background: bool = False
    service: ServiceCommand | None = None
    """The session's service command, if that is what runs."""

    sandbox: Sandbox | None = None
    """None until it has one."""

    joinable: bool = False
    """Whether its session may become live meanwhile: what it leaves is kept however it ends, and isn't yet."""

    begun_at: float | None = None
    """When its program might begin; None before that."""

    ended: asyncio.Event = field(default_factory=asyncio.Event)
    error: BaseException | None = None
    """Why it has no result, once it has ended."""

    callers: int = 0
    """How many requests from outside it is answering."""

    called_at: float = field(default_factory=time.monotonic)
    """When the last of them ended."""

    reached: bool = False
    """Whether it has ever accepted a connection from outside."""

    stop_cell: StopCell | None = None
    """How its cell is stopped, if it has one and that has begun."""

    _stopping: asyncio.Task[None] | None = None

    @property
    def is_stopping(self) -> bool:
        return self._stopping is not None

    def stop_soon(self) -> None:
        """Tell its program to end, without waiting for that; see Sandbox.stop_run."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())

    async def stop(self) -> None:
        """Tell its program to end, and wait until what it left is committed."""
        self.stop_soon()
        await self.ended.wait()

    async def connect(self, port: int) -> socket.socket | None:
        """A connection to what listens on a port inside; None where nothing does, or not yet. See Sandbox.connect."""
        return None if self.sandbox is None else await self.sandbox.connect(port)

    async def has_ended(self, seconds: float) -> bool:
        """Wait for its end, at most `seconds`; whether it has ended."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.ended.wait()
        return self.ended.is_set()

    async def _stop(self) -> None:
        """Tell its program to end, again and again, until it has ended."""
        while not self.ended.is_set():
            if self.stop_cell is not None:
                await self.stop_cell()
            elif self.sandbox is not None:
                await self.sandbox.stop_run()
            await self.has_ended(_AGAIN)


class ActiveRuns:
    """The runs under way, by their id and by their session, which has one at most. There is one of these a service."""

    def __init__(self) -> None:
        self._runs: dict[str, ActiveRun] = {}
        self._of_session: dict[int, ActiveRun] = {}

    def get(self, run_id: str) -> ActiveRun | None:
        return self._runs.get(run_id)

    def of_session(self, key: int) -> ActiveRun | None:
        """The run that the session with this key has under way."""
        return self._of_session.get(key)

    @contextmanager
    def registered(self, run: ActiveRun) -> Iterator[None]:
        """Count the run as under way within the block. Who waits for its end goes on after the block."""
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
        """Tell all background runs to end, and wait until they are committed, at most `seconds`."""
        tasks = [asyncio.create_task(run.stop()) for run in self._runs.values() if run.background]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
