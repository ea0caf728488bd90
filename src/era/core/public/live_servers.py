"""Connections to live servers: programs of a session that listen on a port while their run is under way.

Theory of operation
===================

A call first tries to connect to a process of the session, if that is live (core/live/), then to whatever run is under
way. If nothing listens and the session names a
*service* (a command), that is started as a background run, and the call waits until it listens. Otherwise the session's
stored code answers, as a run of its own (relay.py).

A service holds the session's turn as long as it runs, but others don't pay for that: it ends when somebody waits for
the turn (turns.py), when another session needs its sandbox's place in the pool, when nobody has called it for a while,
and at the server's longest timeout. Each time what it wrote is committed, and the next call starts it again.

However many calls come, only one start is under way for a session. It goes on when they have given up.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from era.core.concurrency.shares import Shares
from era.core.execution.active_runs import ActiveRun, ActiveRuns
from era.core.execution.run_messages import RunRequest
from era.core.live.live_sessions import LiveSessions
from era.core.models import Session
from era.core.pool.pool import SandboxPool
from era.core.runs.runs import Runs
from era.errors import RelayFailed, RelayTimeout, ServiceFailed, Unavailable

MAX_CALLERS = 256
"""Requests that one session's live server answers at a time."""

_CALL_DESCRIPTORS = 2
"""Of the service, that the connection of a call to the program takes."""

_START_SECONDS = 30.0
"""How long a call waits for a service to listen."""

_BACKGROUND_START_SECONDS = 5.0
"""How long after its start a background run may take to listen while a call waits for it."""

_CONNECT_EVERY = 0.02
"""Seconds between two attempts to connect."""

_CHECK_IDLE_SECONDS = 1.0
_FAILED_SECONDS = 1.0
"""How long a service that failed isn't started again."""


@dataclass(frozen=True, slots=True)
class LiveConnection:
    """A connection to a program of a session, and the id of its run."""

    socket: socket.socket
    run_id: str | None
    """None where it is a process beside runs."""


class LiveServers:
    """Connects callers to live servers, and starts and ends services."""

    def __init__(
        self,
        runs: Runs,
        active_runs: ActiveRuns,
        live_sessions: LiveSessions,
        pool: SandboxPool,
        descriptors: Shares[str],
        *,
        idle_seconds: float,
        service_seconds: float,
    ) -> None:
        """`descriptors` are those of the service that calls to an owner's sessions may take. A service ends when nobody
        has called it for `idle_seconds`, and at the latest after `service_seconds`."""
        self._runs = runs
        self._active_runs = active_runs
        self._live_sessions = live_sessions
        self._pool = pool
        self._descriptors = descriptors
        self._calls: Counter[int] = Counter()
        """By session: those that are connected, or wait for that."""

        self._idle_seconds = idle_seconds
        self._service_seconds = service_seconds
        self._starting: dict[int, asyncio.Task[ActiveRun]] = {}
        self._failed: dict[int, tuple[float, ServiceFailed]] = {}
        self._idle_watchers: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def connection(self, session: Session, port: int, base_url: str) -> AsyncIterator[LiveConnection | None]:
        """A connection to what listens on this port in the session, open within the block; None where the session's
        stored code is to answer. `base_url` is this server's, for a service that is started, which serves other callers
        too.

        Raises Unavailable, RelayFailed or RelayTimeout where the session's service can't be reached.
        """
        with self._counted(session), self._live_sessions.in_use(session.key) as held:
            if held is not None and (sock := await held.sandbox.connect(port)) is not None:
                with sock:
                    yield LiveConnection(sock, None)
                return
            connected: tuple[ActiveRun, socket.socket] | None
            if session.service is not None:
                connected = await self._connect_to_service(session, port, base_url)
            else:
                connected = await self._connect_to_run(session, port)
            if connected is not None:
                async with self._open(*connected) as live:
                    yield live
                return
        yield None

    @contextmanager
    def _counted(self, session: Session) -> Iterator[None]:
        """A call to a session, as long as the block lasts. A session's calls may take as many descriptors as are left
        to its owner. Raises Unavailable."""
        calls = self._calls[session.key] + 1
        if calls > MAX_CALLERS:
            raise Unavailable(f"This session answers {MAX_CALLERS} requests already.")
        if calls * _CALL_DESCRIPTORS > self._descriptors.left(session.owner):
            raise Unavailable(f"This session answers {calls - 1} requests already, and this server can take no more.")
        self._descriptors.take(session.owner, _CALL_DESCRIPTORS)
        self._calls[session.key] = calls
        try:
            yield
        finally:
            self._descriptors.give_back(session.owner, _CALL_DESCRIPTORS)
            self._calls[session.key] -= 1
            if not self._calls[session.key]:
                del self._calls[session.key]

    @asynccontextmanager
    async def _open(self, run: ActiveRun, sock: socket.socket) -> AsyncIterator[LiveConnection]:
        """A connection to a run, counted as one of its callers."""
        run.callers += 1
        run.reached = True
        self._offer(run)
        try:
            yield LiveConnection(sock, run.run_id)
        finally:
            sock.close()
            run.callers -= 1
            run.called_at = time.monotonic()
            self._offer(run)

    async def _connect_to_run(self, session: Session, port: int) -> tuple[ActiveRun, socket.socket] | None:
        """A connection to a run of a session without a service; None where nothing listens. A background run that has
        just begun gets a moment."""
        run = self._active_runs.of_session(session.key)
        if run is None:
            return None
        asked_at = time.monotonic()
        while True:
            # Read before connecting: another call may reach the run meanwhile, when it begins to listen.
            reached = run.reached
            if sock := await run.connect(port):
                return run, sock
            late = time.monotonic() > (
                asked_at + _START_SECONDS  # it has no room or no sandbox yet
                if run.begun_at is None
                else run.begun_at + _BACKGROUND_START_SECONDS
            )
            if not run.background or reached or late:
                return None
            if await run.has_ended(_CONNECT_EVERY):
                return None

    async def _connect_to_service(self, session: Session, port: int, base_url: str) -> tuple[ActiveRun, socket.socket]:
        """A connection to the session's service, started if need be. Raises as `connection` does."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            run = self._active_runs.of_session(session.key)
            if run is not None and run.service is None and (sock := await run.connect(port)):
                return run, sock  # an ordinary run that listens itself
            if run is None or run.service != session.service or run.is_stopping:
                run = await self._started(session, port, base_url, deadline)
            while not run.is_stopping:
                reached = run.reached  # read before connecting, as above
                if sock := await run.connect(port):
                    return run, sock
                if reached:
                    raise RelayFailed(
                        f"The session's service does not listen on port {port}.", details={"run_id": run.run_id}
                    )
                if time.monotonic() > deadline:
                    raise RelayTimeout(
                        f"The session's service did not listen on port {port} within {_START_SECONDS:g} seconds.",
                        details={"run_id": run.run_id},
                    )
                if await run.has_ended(_CONNECT_EVERY):
                    break
            if not run.is_stopping:  # it has ended by itself
                raise self._note_failure(session, run)

    async def _started(self, session: Session, port: int, base_url: str, deadline: float) -> ActiveRun:
        """The run of the session's service, started once for all callers that wait for it.

        Raises Unavailable where the session's turn doesn't come before `deadline` (monotonic), and the last failure
        again where the service has just failed.
        """
        at, failure = self._failed.get(session.key, (0.0, None))
        if failure is not None and time.monotonic() < at + _FAILED_SECONDS:
            raise failure
        task = self._starting.get(session.key)
        if task is None:
            task = self._starting[session.key] = asyncio.create_task(self._start(session, port, base_url))
            task.add_done_callback(lambda _: self._starting.pop(session.key))
        await asyncio.wait({task}, timeout=max(deadline - time.monotonic(), 0))
        if not task.done():
            # Retrieve its exception, so that asyncio doesn't log one that nobody waits for any more.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise Unavailable("The session's service waits for a run that is under way.")
        return task.result()

    async def _start(self, session: Session, port: int, base_url: str) -> ActiveRun:
        """Start the session's service, in the place of one with another command."""
        if (old := self._active_runs.of_session(session.key)) and old.service is not None:
            await old.stop()
        request = RunRequest(
            base_url,
            env={"PORT": str(port), "PYTHONUNBUFFERED": "1"},
            timeout=self._service_seconds,
            background=True,
            service=session.service,
            public=True,
            session_key=session.key,
        )
        run = await self._runs.start(session.owned_id, request)
        task = asyncio.create_task(self._stop_when_idle(run))
        self._idle_watchers.add(task)
        task.add_done_callback(self._idle_watchers.discard)
        return run

    async def _stop_when_idle(self, run: ActiveRun) -> None:
        """Stop a service once nobody has called it for `idle_seconds`."""
        while not await run.has_ended(min(_CHECK_IDLE_SECONDS, self._idle_seconds / 4)):
            if not run.callers and time.monotonic() > run.called_at + self._idle_seconds:
                await run.stop()

    def _offer(self, run: ActiveRun) -> None:
        """Allow the pool to end a service that nobody is calling, should it need the place."""
        if run.service is not None and not run.ended.is_set():
            self._pool.offer(run.session_key, None if run.callers else run.stop)

    def _note_failure(self, session: Session, run: ActiveRun) -> ServiceFailed:
        """The error for a service that ended before it listened, remembered for _FAILED_SECONDS."""
        at = time.monotonic()
        self._failed = {key: failed for key, failed in self._failed.items() if at < failed[0] + _FAILED_SECONDS}
        failure = ServiceFailed("The session's service ended before it listened.", details={"run_id": run.run_id})
        self._failed[session.key] = (at, failure)
        return failure
