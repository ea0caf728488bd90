"""Calls from outside that reach a live server: who answers a session's public URL, and connections to it.

Theory of operation
===================

Whatever run of the session is under way may listen, and is asked first: its sandbox gives a connection, or none. Where
none is to be had and the session names a *service*, that is started as a run in the background, and the call waits
until it listens. Otherwise the session's stored code answers, as a run of its own (relay.py).

A service holds the session's turn as long as it runs, but for nobody's cost: it ends when somebody waits for the turn
(turns.py), when another session needs the room, when nobody has called it for a while, and at the longest timeout
there is. Each time what it wrote is committed, and the next call starts it again.

However many calls come, one start is under way for a session. It goes on when they have given up.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from era.core.active_runs import ActiveRun, ActiveRuns
from era.core.models import Session
from era.core.pool import SandboxPool
from era.core.run_messages import RunRequest
from era.core.runs import Runs
from era.errors import RelayFailed, RelayTimeout, ServiceFailed, Unavailable

MAX_CALLERS = 256
"""Requests that one session answers at a time."""

_START_SECONDS = 30.0
"""In which a service must listen, once its call has come."""

_JUST_BEGUN = 5.0
"""Seconds for which a call waits for a run in the background to listen."""

_LOOK = 0.02
_TEND = 1.0
_FAILED_SECONDS = 1.0
"""For which a service that failed isn't started again."""


@dataclass(frozen=True, slots=True)
class Way:
    """A connection to a program of a session, and the run it belongs to."""

    connection: socket.socket
    run_id: str


class LiveServers:
    def __init__(
        self, runs: Runs, active_runs: ActiveRuns, pool: SandboxPool, *, idle_seconds: float, service_seconds: float
    ) -> None:
        """A service ends when nobody has called it for `idle_seconds`, and after `service_seconds` in any case."""
        self._runs = runs
        self._active_runs = active_runs
        self._pool = pool
        self._idle_seconds = idle_seconds
        self._service_seconds = service_seconds
        self._starting: dict[int, asyncio.Task[ActiveRun]] = {}
        self._failed: dict[int, tuple[float, ServiceFailed]] = {}
        self._tending: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def way(self, session: Session, port: int, base_url: str) -> AsyncIterator[Way | None]:
        """A connection to what listens on this port in the session, for as long as the block lasts; None where its
        stored code is to answer. Raises Unavailable, RelayFailed or RelayTimeout where its service doesn't."""
        if session.service is not None:
            run, found = await self._served(session, port, base_url)
        else:
            listening = await self._listening(session, port)
            if listening is None:
                yield None
                return
            run, found = listening
        if run.callers >= MAX_CALLERS:
            found.close()
            raise Unavailable(f"This session answers {MAX_CALLERS} requests already.")
        run.callers += 1
        run.reached = True
        self._offer(run)
        try:
            yield Way(found, run.run_id)
        finally:
            found.close()
            run.callers -= 1
            run.called_at = time.monotonic()
            self._offer(run)

    async def _listening(self, session: Session, port: int) -> tuple[ActiveRun, socket.socket] | None:
        """What listens, where no service is to be started for it."""
        run = self._active_runs.of_session(session.key)
        if run is None:
            return None
        while True:
            reached = run.reached  # before looking: it may begin to listen meanwhile, for another call
            if found := await run.connect(port):
                return run, found
            if not run.background or reached or time.monotonic() > run.begun_at + _JUST_BEGUN:
                return None
            if await run.has_ended(_LOOK):
                return None

    async def _served(self, session: Session, port: int, base_url: str) -> tuple[ActiveRun, socket.socket]:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            run = self._active_runs.of_session(session.key)
            if run is not None and run.service is None and (found := await run.connect(port)):
                return run, found  # a run of the owner's that listens itself
            if run is None or run.service != session.service or run.is_stopping:
                run = await self._started(session, port, base_url, deadline)
            while not run.is_stopping:
                reached = run.reached  # before looking, as above
                if found := await run.connect(port):
                    return run, found
                if reached:
                    raise RelayFailed(
                        f"The session's service does not listen on port {port}.", details={"run_id": run.run_id}
                    )
                if time.monotonic() > deadline:
                    raise RelayTimeout(
                        f"The session's service did not listen on port {port} within {_START_SECONDS:g} seconds.",
                        details={"run_id": run.run_id},
                    )
                if await run.has_ended(_LOOK):
                    break
            if not run.is_stopping:  # it has ended by itself
                raise self._note_failure(session, run)

    async def _started(self, session: Session, port: int, base_url: str, deadline: float) -> ActiveRun:
        """The session's service, begun. Raises Unavailable where the session's turn doesn't come in time."""
        at, failure = self._failed.get(session.key, (0.0, None))
        if failure is not None and time.monotonic() < at + _FAILED_SECONDS:
            raise failure
        task = self._starting.get(session.key)
        if task is None:
            task = self._starting[session.key] = asyncio.create_task(self._start(session, port, base_url))
            task.add_done_callback(lambda _: self._starting.pop(session.key))
        await asyncio.wait({task}, timeout=max(deadline - time.monotonic(), 0))
        if not task.done():
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # somebody has seen it
            raise Unavailable("The session's service waits for a run that is under way.")
        return task.result()

    async def _start(self, session: Session, port: int, base_url: str) -> ActiveRun:
        if (old := self._active_runs.of_session(session.key)) and old.service is not None:
            await old.stop()
        request = RunRequest(
            base_url,
            env={"PORT": str(port), "PYTHONUNBUFFERED": "1"},
            timeout=self._service_seconds,
            background=True,
            service=session.service,
        )
        run = await self._runs.start(session.owned_id, request)
        tending = asyncio.create_task(self._tend(run))
        self._tending.add(tending)
        tending.add_done_callback(self._tending.discard)
        return run

    async def _tend(self, run: ActiveRun) -> None:
        """Stop a service that nobody calls any more."""
        while not await run.has_ended(min(_TEND, self._idle_seconds / 4)):
            if not run.callers and time.monotonic() > run.called_at + self._idle_seconds:
                await run.stop()

    def _offer(self, run: ActiveRun) -> None:
        """Let the host end a service that nobody is calling, where it needs the room."""
        if run.service is not None and not run.ended.is_set():
            self._pool.offer(run.session_key, None if run.callers else run.stop)

    def _note_failure(self, session: Session, run: ActiveRun) -> ServiceFailed:
        at = time.monotonic()
        self._failed = {key: one for key, one in self._failed.items() if at < one[0] + _FAILED_SECONDS}
        failure = ServiceFailed("The session's service ended before it listened.", details={"run_id": run.run_id})
        self._failed[session.key] = (at, failure)
        return failure
