"""The local host: this process owns the sandboxes of all sessions.

A session that runs keeps its sandbox until it has been idle for a while or another session needs the room; then rows
and blobs are all that is left of it. A few sandboxes that belong to nobody are kept ready for each language, with the
server's usual isolation and limits and without packages, so that a session's first run does not wait for one to be
made. A sandbox serves one session in its life, so nothing can be handed on from one to the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from era import languages
from era.core.limits import Rules
from era.core.models import EMPTY, Language, Session, Snapshot, WantedIsolation
from era.core.ports import Drivers, Environments, Limits, Sandbox, SnapshotStore
from era.errors import EraError, SandboxFailed, Unavailable

log = structlog.get_logger()

_SWEEP_SECONDS = 1.0
_REFILL_PAUSE = 5.0
"""Seconds before the pool tries again after a sandbox could not be made."""
_WAIT_FOR_ROOM = 30.0


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a sandbox is to be."""

    language: Language
    isolation: WantedIsolation
    limits: Limits
    environment: str | None = None


@dataclass(slots=True)
class _Live:
    sandbox: Sandbox
    made_for: _Wanted
    snapshot: Snapshot
    busy: bool
    used_at: float
    end: Callable[[], Awaitable[None]] | None = None
    """Ends the run under way, which may be ended."""


class LocalHost:
    """See ports.Host. `spares` sandboxes a language are kept ready; at most `max_live` belong to sessions at a time,
    and one that was idle for `idle_seconds` is closed."""

    def __init__(
        self,
        drivers: Drivers,
        snapshots: SnapshotStore,
        environments: Environments,
        *,
        rules: Rules,
        spares: int,
        max_live: int,
        idle_seconds: float,
    ) -> None:
        self._drivers = drivers
        self._snapshots = snapshots
        self._environments = environments
        self._rules = rules
        self._spares = spares
        self._idle_seconds = idle_seconds
        self._live: dict[int, _Live] = {}
        self._room = asyncio.Semaphore(max_live)
        self._ready: dict[Language, deque[Sandbox]] = {language: deque() for language in languages.LANGUAGES}
        self._used: dict[Language, asyncio.Event] = {language: asyncio.Event() for language in languages.LANGUAGES}
        self._tasks: list[asyncio.Task[None]] = []
        self._stopped = False

    async def start(self) -> None:
        for language in languages.runtimes():
            self._used[language].set()
            self._tasks.append(asyncio.create_task(self._keep_ready(language)))
        self._tasks.append(asyncio.create_task(self._sweep()))

    async def stop(self) -> None:
        """Kill every sandbox and make none any more. May be called again."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        ready = [sandbox for pool in self._ready.values() for sandbox in pool]
        await asyncio.gather(
            *(sandbox.close() for sandbox in [*ready, *(live.sandbox for live in self._live.values())])
        )
        self._live.clear()

    def counts(self) -> dict[str, int]:
        return {
            "live": len(self._live),
            "busy": sum(live.busy for live in self._live.values()),
            "ready": sum(len(pool) for pool in self._ready.values()),
        }

    async def acquire(self, session: Session) -> Sandbox:
        live = self._live.get(session.key)
        granted = self._rules.granted(session.limits)
        wanted = _Wanted(session.language, session.isolation, granted, session.environment)
        if live is not None:
            if live.made_for == wanted and live.sandbox.alive and await self._brought_up_to(live, session.snapshot):
                live.busy = True
                return live.sandbox
            await self.discard(live.sandbox)
        sandbox = await self._new(wanted)
        try:
            if session.snapshot != EMPTY:
                await self._snapshots.restore(session.snapshot, sandbox)
        except BaseException:
            await self._close(sandbox)
            raise
        self._live[session.key] = _Live(sandbox, wanted, session.snapshot, busy=True, used_at=time.monotonic())
        return sandbox

    async def acquire_temporary(
        self, language: Language, isolation: WantedIsolation = "auto", limits: Limits | None = None
    ) -> Sandbox:
        return await self._new(_Wanted(language, isolation, limits or self._rules.defaults))

    async def _new(self, wanted: _Wanted) -> Sandbox:
        """A sandbox that nobody has, and room for it taken: one of those that are ready, if they are of this kind."""
        if self._stopped:
            raise Unavailable("This server is about to stop.")
        await self._make_room()
        try:
            driver = await self._drivers.get(wanted.isolation)
            usual = wanted.limits == self._rules.defaults and wanted.environment is None
            if usual and driver is await self._drivers.get("auto"):
                ready = self._ready[wanted.language]
                self._used[wanted.language].set()
                while ready:
                    sandbox = ready.popleft()
                    if sandbox.alive:
                        return sandbox
                    await sandbox.close()
            if wanted.environment is not None:
                await self._environments.need(wanted.environment)
            return await driver.create(wanted.language, wanted.limits, wanted.environment)
        except BaseException:
            self._room.release()
            raise

    def committed(self, session_key: int, snapshot: Snapshot) -> None:
        if live := self._live.get(session_key):
            live.snapshot = snapshot
            live.busy = False
            live.end = None
            live.used_at = time.monotonic()

    async def discard(self, sandbox: Sandbox) -> None:
        for key, live in list(self._live.items()):
            if live.sandbox is sandbox:
                del self._live[key]
        await self._close(sandbox)

    def session_keys(self) -> list[int]:
        return [key for key, live in self._live.items() if not live.busy]

    def offer(self, session_key: int, end: Callable[[], Awaitable[None]] | None) -> None:
        if live := self._live.get(session_key):
            live.end = end
            live.used_at = time.monotonic()

    async def release(self, session_key: int) -> None:
        if live := self._live.pop(session_key, None):
            await self._close(live.sandbox)

    async def _brought_up_to(self, live: _Live, snapshot: Snapshot) -> bool:
        """Make a warm working directory what the session's files are now; False where that fails."""
        if live.snapshot == snapshot:
            return True
        live.busy = True
        try:
            await self._snapshots.restore(snapshot, live.sandbox)
        except SandboxFailed:
            return False
        live.snapshot = snapshot
        return True

    async def _close(self, sandbox: Sandbox) -> None:
        try:
            await sandbox.close()
        finally:
            self._snapshots.forget(sandbox.id)
            self._room.release()

    async def _make_room(self) -> None:
        """Take one place among the live sandboxes, from the longest idle session if none is free."""
        while self._room.locked():
            idle = [(live.used_at, key) for key, live in self._live.items() if not live.busy]
            offered = [(live.used_at, live.end) for live in self._live.values() if live.busy and live.end]
            if idle:
                await self.release(min(idle)[1])
            elif offered:
                await min(offered, key=lambda one: one[0])[1]()
            else:
                break
        try:
            async with asyncio.timeout(_WAIT_FOR_ROOM):
                await self._room.acquire()
        except TimeoutError:
            raise Unavailable(
                "Every sandbox of this server is busy.", hint="Try again later, or raise ERA_MAX_LIVE."
            ) from None

    async def _keep_ready(self, language: Language) -> None:
        ready, used = self._ready[language], self._used[language]
        while True:
            await used.wait()
            used.clear()
            while len(ready) < self._spares:
                try:
                    driver = await self._drivers.get("auto")
                    ready.append(await driver.create(language, self._rules.defaults))
                except (EraError, OSError) as error:
                    log.warning("sandbox_not_made", language=language, error=str(error))
                    await asyncio.sleep(_REFILL_PAUSE)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            horizon = time.monotonic() - self._idle_seconds
            for key, live in list(self._live.items()):
                if not live.busy and (live.used_at < horizon or not live.sandbox.alive):
                    with contextlib.suppress(SandboxFailed, OSError):
                        await self.release(key)
