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
from era.core.ports import Drivers, Limits, Sandbox, SnapshotStore
from era.core.setup.package_sets import InstalledPackageSets
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
    package_set: str | None = None


@dataclass(slots=True)
class _Warm:
    sandbox: Sandbox
    made_for: _Wanted
    snapshot: Snapshot
    busy: bool
    used_at: float
    end: Callable[[], Awaitable[None]] | None = None
    """Ends the run under way, which may be ended."""


class SandboxPool:
    """See ports.SandboxPool. `spares` sandboxes a language are kept ready; at most `max_warm` belong to sessions at a
    time, and one that was idle for `idle_seconds` is closed."""

    def __init__(
        self,
        drivers: Drivers,
        snapshots: SnapshotStore,
        package_sets: InstalledPackageSets,
        *,
        rules: Rules,
        spares: int,
        max_warm: int,
        idle_seconds: float,
    ) -> None:
        self._drivers = drivers
        self._snapshots = snapshots
        self._package_sets = package_sets
        self._rules = rules
        self._spares = spares
        self._idle_seconds = idle_seconds
        self._warm: dict[int, _Warm] = {}
        self._room = asyncio.Semaphore(max_warm)
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
            *(sandbox.close() for sandbox in [*ready, *(warm.sandbox for warm in self._warm.values())])
        )
        self._warm.clear()

    def counts(self) -> dict[str, int]:
        return {
            "live": len(self._warm),
            "busy": sum(warm.busy for warm in self._warm.values()),
            "ready": sum(len(pool) for pool in self._ready.values()),
        }

    async def acquire(self, session: Session) -> Sandbox:
        warm = self._warm.get(session.key)
        granted = self._rules.granted(session.limits)
        wanted = _Wanted(session.language, session.isolation, granted, session.package_set)
        if warm is not None:
            if warm.made_for == wanted and warm.sandbox.alive and await self._brought_up_to(warm, session.snapshot):
                warm.busy = True
                return warm.sandbox
            await self.discard(warm.sandbox)
        sandbox = await self._new(wanted)
        try:
            if session.snapshot != EMPTY:
                await self._snapshots.restore(session.snapshot, sandbox)
        except BaseException:
            await self._close(sandbox)
            raise
        self._warm[session.key] = _Warm(sandbox, wanted, session.snapshot, busy=True, used_at=time.monotonic())
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
            usual = wanted.limits == self._rules.defaults and wanted.package_set is None
            if usual and driver is await self._drivers.get("auto"):
                ready = self._ready[wanted.language]
                self._used[wanted.language].set()
                while ready:
                    sandbox = ready.popleft()
                    if sandbox.alive:
                        return sandbox
                    await sandbox.close()
            if wanted.package_set is not None:
                await self._package_sets.ensure(wanted.package_set)
            return await driver.create(wanted.language, wanted.limits, wanted.package_set)
        except BaseException:
            self._room.release()
            raise

    def committed(self, session_key: int, snapshot: Snapshot) -> None:
        if warm := self._warm.get(session_key):
            warm.snapshot = snapshot
            warm.busy = False
            warm.end = None
            warm.used_at = time.monotonic()

    async def discard(self, sandbox: Sandbox) -> None:
        for key, warm in list(self._warm.items()):
            if warm.sandbox is sandbox:
                del self._warm[key]
        await self._close(sandbox)

    def session_keys(self) -> list[int]:
        return [key for key, warm in self._warm.items() if not warm.busy]

    def offer(self, session_key: int, end: Callable[[], Awaitable[None]] | None) -> None:
        if warm := self._warm.get(session_key):
            warm.end = end
            warm.used_at = time.monotonic()

    async def release(self, session_key: int) -> None:
        if warm := self._warm.pop(session_key, None):
            await self._close(warm.sandbox)

    async def _brought_up_to(self, warm: _Warm, snapshot: Snapshot) -> bool:
        """Make a warm working directory what the session's files are now; False where that fails."""
        if warm.snapshot == snapshot:
            return True
        warm.busy = True
        try:
            await self._snapshots.restore(snapshot, warm.sandbox)
        except SandboxFailed:
            return False
        warm.snapshot = snapshot
        return True

    async def _close(self, sandbox: Sandbox) -> None:
        try:
            await sandbox.close()
        finally:
            self._snapshots.forget(sandbox.id)
            self._room.release()

    async def _make_room(self) -> None:
        """Take one place among the warm sandboxes, from the longest idle session if none is free."""
        while self._room.locked():
            idle = [(warm.used_at, key) for key, warm in self._warm.items() if not warm.busy]
            offered = [(warm.used_at, warm.end) for warm in self._warm.values() if warm.busy and warm.end]
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
                "Every sandbox of this server is busy.", hint="Try again later, or raise ERA_MAX_WARM."
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
            for key, warm in list(self._warm.items()):
                if not warm.busy and (warm.used_at < horizon or not warm.sandbox.alive):
                    with contextlib.suppress(SandboxFailed, OSError):
                        await self.release(key)
