"""The pool of this machine's sandboxes: which session has which, which are kept warm, and who is evicted.

A session that runs keeps its sandbox warm until it has been idle for a while or another session needs the room; then
rows and blobs are all that is left of it. A few sandboxes that belong to nobody are kept ready, so that a session's
first run does not wait for one to be made (ready_sandboxes.py). A sandbox serves one session in its life, so nothing
can be handed on from one to the next.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakSet

import structlog

from era.core.concurrency.fair_limiter import FairLimiter, Release
from era.core.concurrency.outages import note_outage
from era.core.concurrency.tasks import all_ended, in_background, log_failure
from era.core.concurrency.turns import Liveness
from era.core.limits import Rules
from era.core.models import EMPTY, Language, OwnedId, Session, Snapshot, WantedIsolation
from era.core.pool.directory_cache import MOST_BYTES, CachedDirectory, DirectoryCache
from era.core.pool.ready_sandboxes import FIRST, ReadySandboxes, WarmLimit
from era.core.ports import Driver, Drivers, Sandbox
from era.core.program import Limits
from era.core.telemetry import Note, SandboxAcquired, SandboxClosed, SandboxStarted, ignore
from era.core.trees.snapshots import Snapshots
from era.errors import EraError, SandboxFailed, SessionDeleted, Unavailable

log = structlog.get_logger()

_SWEEP_SECONDS = 1.0
_PATIENCE = 5.0
"""Seconds that callers wait for room while none at all comes free. Those in which a sandbox makes way for them count
for nothing: a busy machine may take longer to close one."""

_MANY_FILES = 2000
"""To make a sandbox takes as long as to give so many files another owner."""

NEVER_BEGUN = "The session was deleted before its program began."
SERVICE_STOPPED = "The service stopped."
MOVED = "moved"
"""Why all that is live ends at a host of a cluster that stops, and why a sandbox is closed: the session goes on at
another host."""

_DELETED = "The session was deleted, or has expired."

type Lost = Callable[[str], None]
"""Is told that a held sandbox is about to be closed, and why."""


@dataclass(frozen=True, slots=True)
class _Spec:
    """What a sandbox is made with: one that differs in any of it can't be used instead."""

    language: Language
    isolation: WantedIsolation
    limits: Limits
    package_set: str | None = None


@dataclass(slots=True)
class _Warm:
    """A session's sandbox."""

    sandbox: Sandbox
    session_id: OwnedId
    spec: _Spec
    snapshot: Snapshot
    """What its working directory holds, unless it is busy."""

    busy: bool
    """A run or a setup has it."""

    used_at: float = field(default_factory=time.monotonic)
    """By the monotonic clock."""

    end: Callable[[], Awaitable[None]] | None = None
    """Ends the run that has it, where that run may be ended to make room."""

    lost: Lost | None = None
    """Set while it is held: what is in its working directory counts, and it makes way for nobody."""

    restoring: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while files are put back into it. What is still written to can't be removed."""


@dataclass(slots=True)
class _Acquiring:
    """A session that is being given a sandbox."""

    released: bool = False
    """It is to have none, since it was deleted meanwhile."""

    how: str = "made"
    """See SandboxAcquired."""

    use: str = "session"
    """See SandboxStarted."""


class SandboxPool:
    """The sandboxes of all sessions. `start` before anything, `stop` when done.

    Room that comes free goes to whoever has waited longest, whoever frees it: a sandbox that is closed or becomes idle
    while somebody waits makes way at once.

    Calls about a session come from whoever holds its turn or does its setup; only `release`, `release_soon` and
    `let_go` may come at any time. `hold` also comes while a run has the turn.
    """

    def __init__(
        self,
        drivers: Drivers,
        snapshots: Snapshots,
        ensure_packages: Callable[[str], Awaitable[None]],
        *,
        rules: Rules,
        liveness: Liveness,
        spares: int,
        max_warm: int | None,
        idle_seconds: float,
        kept_bytes: int = MOST_BYTES,
        note: Note = ignore,
    ) -> None:
        """`ensure_packages` has the package set with this digest on this machine, or raises Unavailable; see
        InstalledPackageSets. `spares` sandboxes a language are kept ready. At most `max_warm` belong to sessions at a
        time, temporary ones included; None: as many as memory allows. One that was idle for `idle_seconds` is
        put away, and its working directory kept as long as all such take at most `kept_bytes`."""
        self._drivers = drivers
        self._note = note
        self._liveness = liveness
        self._snapshots = snapshots
        self._ensure_packages = ensure_packages
        self._rules = rules
        self._spares = spares
        self._idle_seconds = idle_seconds
        self._warm: dict[int, _Warm] = {}
        """By the key of the session. Those that were used longest ago come first."""

        self._acquiring: dict[int, _Acquiring] = {}

        self._released: WeakSet[Sandbox] = WeakSet()
        """Sandboxes of deleted sessions. Runs may still have them."""

        self._kept = DirectoryCache(kept_bytes, snapshots.forget)
        self._limit = WarmLimit() if max_warm is None else None
        self.places = FairLimiter(
            FIRST if max_warm is None else max_warm,
            hint="Every sandbox of this server is busy. Try again later, or raise ERA_MAX_WARM.",
            patience=_PATIENCE,
            on_waiting=self._make_way,
            is_coming=lambda: bool(self._making_way),
        )
        """The room: its `count` says how many sandboxes may belong to sessions, as things are."""

        self._in_room: dict[str, Release] = {}
        """The sandboxes that have a place of the room, by id, and what gives it back."""

        self._making_way: set[asyncio.Task[None]] = set()
        """What makes room for those who wait, each a place."""

        self._putting_away: dict[int, asyncio.Task[None]] = {}
        """By the key of the session that loses its sandbox."""

        self._ready = ReadySandboxes(spares, self._spare, self._closed)
        self._tasks: list[asyncio.Task[None]] = []
        self.is_stopped = False

    async def start(self) -> None:
        self._ready.start()
        self._tasks += in_background([self._sweep()])

    async def stop(self, why: str = SERVICE_STOPPED) -> None:
        """Kill every sandbox and make none any more. `why` is told to who holds one. May be called again."""
        self.is_stopped = True
        for task in self._tasks:
            task.cancel()
        for key, warm in self._warm.items():
            self._tell_lost(key, warm, why)
        # At once: callers wait for the ends of runs, and a sandbox that is just being made may take a while.
        ending = [asyncio.create_task(warm.sandbox.close()) for warm in self._warm.values()]
        await asyncio.gather(*self._tasks, return_exceptions=True)
        closing = [warm.sandbox.close() for warm in self._warm.values()]
        await all_ended([self._ready.stop(), *ending, *closing], "sandbox_not_closed")
        self._warm.clear()
        if going := {*self._putting_away.values(), *self._making_way}:
            await asyncio.wait(going, timeout=_PATIENCE)  # or files are just put back; the driver closes what is left
        await self._kept.close_all()

    def counts(self) -> dict[str, int]:
        """How many are sessions' (`live`), and of those `busy`, and how many of the usual driver are `ready`."""
        return {
            "live": len(self._warm),
            "busy": sum(warm.busy for warm in self._warm.values()),
            "ready": self._ready.usual(),
        }

    async def acquire(self, session: Session) -> Sandbox:
        """The session's sandbox, its working directory holding `session.snapshot`. It is busy until `committed`,
        `discard` or `release`. Raises SandboxFailed, NoIsolation where the session's isolation can't be had, TooBusy
        where there is no room, and SessionDeleted where `release` was called meanwhile."""
        began = time.monotonic()
        acquiring = self._acquiring[session.key] = _Acquiring()
        try:
            sandbox = await self._acquired(session, acquiring)
        except EraError:
            if acquiring.released:
                raise SessionDeleted(NEVER_BEGUN) from None
            raise
        finally:
            if self._acquiring.get(session.key) is acquiring:
                del self._acquiring[session.key]
        if acquiring.released:
            await self.discard(sandbox, reason="deleted")
            raise SessionDeleted(NEVER_BEGUN)
        self._note(SandboxAcquired(acquiring.how, time.monotonic() - began))
        return sandbox

    async def _acquired(self, session: Session, acquiring: _Acquiring) -> Sandbox:
        warm = self._warm.get(session.key)
        granted = self._rules.granted(session.limits)
        spec = _Spec(session.language, session.isolation, granted, session.package_set)
        if warm is not None and warm.lost is not None and warm.sandbox.alive:
            warm.busy = True
            acquiring.how = "live"
            return warm.sandbox  # as it is: processes work on it
        if warm is not None:
            if warm.spec == spec and warm.sandbox.alive and await self._restored(warm, session.snapshot):
                warm.busy = True
                acquiring.how = "warm"
                return warm.sandbox
            await self.discard(warm.sandbox, reason="replaced" if warm.sandbox.alive else "died")
        if going := self._putting_away.get(session.key):
            await asyncio.wait({going})
        kept = self._kept.take(session.key)
        sandbox = await self._woken(kept, spec, session, acquiring) if kept else None
        if sandbox is None:
            sandbox = await self._new(spec, session.owner, acquiring)
            try:
                if session.snapshot != EMPTY:
                    await self._snapshots.restore(session.snapshot, sandbox, session_id=session.owned_id)
            except BaseException:
                await self._close(sandbox, "failed", session.owned_id)
                raise
        self._warm[session.key] = _Warm(sandbox, session.owned_id, spec, session.snapshot, busy=True)
        return sandbox

    async def _woken(
        self, kept: CachedDirectory, spec: _Spec, session: Session, acquiring: _Acquiring
    ) -> Sandbox | None:
        """A sandbox with what was kept of the session's directory, brought to its snapshot; None where that fails, and
        it has to be restored as a whole. Raises as `acquire` does."""
        sandbox: Sandbox | None = None
        try:
            sandbox = await self._new(spec, session.owner, acquiring, kept)
            await self._snapshots.move(kept.sandbox, sandbox, session_id=session.owned_id)
            if kept.snapshot != session.snapshot:
                await self._snapshots.restore(session.snapshot, sandbox, session_id=session.owned_id)
            acquiring.how = "kept"
            return sandbox
        except SandboxFailed as error:
            log.warning("directory_not_reused", error=error.message)
            if sandbox is not None:
                await self._close(sandbox, "failed", session.owned_id)
            return None
        except BaseException:
            if sandbox is not None:
                await self._close(sandbox, "failed", session.owned_id)
            raise
        finally:
            self._kept.close_soon(kept)

    async def acquire_temporary(
        self, language: Language, isolation: WantedIsolation = "auto", limits: Limits | None = None, *, owner: str
    ) -> Sandbox:
        """A sandbox with an empty working directory for use outside any session, with the server's default limits where
        none are given. The caller closes it with `discard`. Raises as `acquire` does."""
        spec = _Spec(language, isolation, limits or self._rules.defaults)
        return await self._new(spec, owner, _Acquiring(use="temporary"))

    async def _new(
        self, spec: _Spec, owner: str, acquiring: _Acquiring, kept: CachedDirectory | None = None
    ) -> Sandbox:
        """A sandbox that no session has, which takes one place of the room until `_close`; one into which `kept` can be
        moved quickly. Raises TooBusy, Unavailable where the server is about to stop."""
        if self.is_stopped:
            raise Unavailable("This server is about to stop.")
        release = await self.places.take(owner)
        try:
            sandbox = await self._ready_or_made(spec, kept, acquiring)
        except BaseException:
            release()
            raise
        self._in_room[sandbox.id] = release
        return sandbox

    async def _ready_or_made(self, spec: _Spec, kept: CachedDirectory | None, acquiring: _Acquiring) -> Sandbox:
        """One of the sandboxes that are ready, if they are of this kind and there is one; else one made now. So is one
        for a kept directory with many files: it takes over their uid, for to give each another owner takes longer."""
        driver = await self._drivers.get(spec.isolation)
        heir_to = None
        if kept is not None and kept.sandbox.uid is not None and kept.snapshot.file_count > _MANY_FILES:
            heir_to = kept.sandbox if kept.sandbox.enforced["driver"] == driver.name else None
        usual = heir_to is None and spec.limits == self._rules.defaults and spec.package_set is None
        if usual:
            is_default = driver is await self._drivers.get("auto")
            sandbox = await self._ready.take("auto" if is_default else spec.isolation, spec.language)
            if sandbox is not None:
                acquiring.how = "ready"
                return sandbox
        if spec.package_set is not None:
            await self._ensure_packages(spec.package_set)
        return await self._made(driver, spec, acquiring.use, heir_to)

    async def _spare(self, isolation: WantedIsolation, language: Language) -> Sandbox:
        """One that is to be ready. Raises as `_made` does."""
        driver = await self._drivers.get(isolation)
        return await self._made(driver, _Spec(language, isolation, self._rules.defaults), "spare")

    async def _closed(self, sandbox: Sandbox) -> None:
        """Close one that was ready and has died."""
        self._note(SandboxClosed(sandbox.id, "died"))
        await sandbox.close()

    async def _made(self, driver: Driver, spec: _Spec, use: str, heir_to: Sandbox | None = None) -> Sandbox:
        """A sandbox that is made now. Raises as Driver.create does."""
        began = time.monotonic()
        try:
            sandbox = await driver.create(spec.language, spec.limits, spec.package_set, heir_to)
        except (EraError, OSError) as error:
            if not self.is_stopped:  # a driver that is cancelled may fail at its cleanup instead
                message = error.message if isinstance(error, EraError) else str(error)
                self._note(SandboxStarted(spec.language, use, time.monotonic() - began, message=message))
            raise
        self._note(SandboxStarted(spec.language, use, time.monotonic() - began, sandbox.id, driver.name))
        return sandbox

    def committed(self, session_key: int, snapshot: Snapshot) -> None:
        """The session's working directory is now `snapshot`; its sandbox is kept warm."""
        if warm := self._warm.pop(session_key, None):
            self._warm[session_key] = warm
            warm.snapshot = snapshot
            warm.busy = False
            warm.end = None
            warm.used_at = time.monotonic()
            self._make_way()

    def used_at(self, session_key: int) -> float:
        """When the session's sandbox was last used, by `time.monotonic()`; 0 where it has none."""
        warm = self._warm.get(session_key)
        return 0.0 if warm is None else warm.used_at

    def hold(self, session_key: int, lost: Lost) -> Sandbox | None:
        """Hold the sandbox that the session has, until `let_go`: it makes way for nobody, and runs get it as it is.
        `lost` is called before it is closed all the same. None where the session has none that is alive."""
        warm = self._warm.get(session_key)
        if warm is None or not warm.sandbox.alive:
            return None
        warm.lost = lost
        self._liveness.add(session_key)
        return warm.sandbox

    def let_go(self, session_key: int, sandbox: Sandbox) -> None:
        """The session's sandbox is like any other again. Its working directory is what was last `committed`."""
        warm = self._warm.get(session_key)
        if warm is not None and warm.sandbox is sandbox:
            warm.lost = None
            warm.used_at = time.monotonic()
            self._liveness.remove(session_key)
            self._make_way()

    async def discard(self, sandbox: Sandbox, why: str = "Its sandbox failed.", *, reason: str = "failed") -> None:
        """Close a sandbox whose content must not be used again. `why` is told to who holds it. `reason` is
        SandboxClosed's, but for a temporary one."""
        session_id = None
        for key, warm in list(self._warm.items()):
            if warm.sandbox is sandbox:
                session_id = warm.session_id
                del self._warm[key]
                self._tell_lost(key, warm, why)
        await self._close(sandbox, reason if session_id else "temporary", session_id)

    def _tell_lost(self, session_key: int, warm: _Warm, why: str) -> None:
        lost, warm.lost = warm.lost, None
        if lost is not None:
            self._liveness.remove(session_key)
            lost(why)

    def has(self, session_key: int) -> bool:
        """Whether the session has a sandbox, or is about to have one."""
        return session_key in self._warm or session_key in self._acquiring or session_key in self._putting_away

    def was_released(self, sandbox: Sandbox) -> bool:
        """Whether this sandbox was removed by `release`, or is being removed."""
        return sandbox in self._released

    def is_busy(self, session_key: int) -> bool:
        """Whether the session's sandbox is in use or held, or just being made or closed."""
        warm = self._warm.get(session_key)
        changes = session_key in self._acquiring or session_key in self._putting_away
        return changes or (warm is not None and (warm.busy or warm.lost is not None))

    def session_keys(self) -> list[int]:
        """The keys of sessions that have a sandbox, or of which a directory is kept."""
        return [*self._warm, *self._kept.keys()]

    def offer(self, session_key: int, end: Callable[[], Awaitable[None]] | None) -> None:
        """Say that the run which this session has under way may be ended, by `end`, when another session needs the
        room; or, with None, that it may not any more."""
        if warm := self._warm.get(session_key):
            warm.end = end
            warm.used_at = time.monotonic()
            self._make_way()

    async def release(self, session_key: int) -> None:
        """Kill and remove the session's sandbox, if it has one, whatever runs in it, and what is kept of it. It is gone
        when this returns, or will be where this is cancelled. A session that is being given one gets none."""
        await asyncio.shield(self.release_soon(session_key))

    def release_soon(self, session_key: int, reason: str = "deleted") -> asyncio.Task[None]:
        """The same, for callers that mustn't wait while files are put back into it. Returns what ends when it is gone.
        `reason` is SandboxClosed's."""
        if acquiring := self._acquiring.get(session_key):
            acquiring.released = True
        if warm := self._warm.pop(session_key, None):
            self._released.add(warm.sandbox)
            self._tell_lost(session_key, warm, _DELETED if reason == "deleted" else reason)
        return self._goes(session_key, self._remove(session_key, warm, self._putting_away.get(session_key), reason))

    async def _remove(self, key: int, warm: _Warm | None, going: asyncio.Task[None] | None, reason: str) -> None:
        if going is not None:
            await asyncio.wait({going})
        if warm is not None:
            async with warm.restoring:
                await self._close(warm.sandbox, reason, warm.session_id)
        if kept := self._kept.take(key):
            await self._kept.close(kept)

    def _put_away(self, session_key: int, reason: str) -> asyncio.Task[None]:
        """Close the sandbox of a session that is idle, and keep its working directory if that is worth it."""
        return self._goes(session_key, self._close_and_keep(session_key, self._warm.pop(session_key), reason))

    def _goes(self, session_key: int, closing: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Have the session's sandbox closed so. Who wants one for the session waits for that."""
        task = self._putting_away[session_key] = asyncio.create_task(closing)
        task.add_done_callback(lambda done: self._gone(session_key, done))
        return task

    async def _close_and_keep(self, session_key: int, warm: _Warm, reason: str) -> None:
        entries = None
        if warm.sandbox.alive and self._kept.is_worth_it(warm.snapshot) and not self.is_stopped:
            try:
                await warm.sandbox.put_away()
                entries = self._snapshots.put_away(warm.sandbox, warm.snapshot)
            except OSError as error:
                log.warning("directory_not_kept", error=str(error))
        if entries is None:
            await self._close(warm.sandbox, reason, warm.session_id)
            return
        self._note_closed(warm.sandbox, reason, warm.session_id)
        self._give_place_back(warm.sandbox)
        self._kept.add(session_key, warm.sandbox, warm.snapshot, entries)

    def _gone(self, session_key: int, task: asyncio.Task[None]) -> None:
        if self._putting_away.get(session_key) is task:
            del self._putting_away[session_key]
        log_failure(task, "sandbox_not_closed")

    async def _restored(self, warm: _Warm, snapshot: Snapshot) -> bool:
        """Make a warm working directory hold `snapshot`; False where that fails, and the sandbox can't be used."""
        if warm.snapshot == snapshot:
            return True
        warm.busy = True
        try:
            async with warm.restoring:
                await self._snapshots.restore(snapshot, warm.sandbox, session_id=warm.session_id)
        except SandboxFailed:
            return False
        except BaseException:
            await self.discard(warm.sandbox)  # or it would be busy for ever, with something between two snapshots
            raise
        warm.snapshot = snapshot
        return True

    async def _close(self, sandbox: Sandbox, reason: str, session_id: OwnedId | None) -> None:
        """Close a sandbox, and give back its place in the room. May be called twice. `reason` is SandboxClosed's."""
        self._note_closed(sandbox, reason, session_id)
        try:
            await sandbox.close()
        finally:
            self._snapshots.forget(sandbox.id)
            self._give_place_back(sandbox)

    def _note_closed(self, sandbox: Sandbox, reason: str, session_id: OwnedId | None) -> None:
        if sandbox.id in self._in_room:  # or it was closed before
            who = (None, None) if session_id is None else (session_id.id, session_id.owner)
            self._note(SandboxClosed(sandbox.id, reason, *who))

    def _give_place_back(self, sandbox: Sandbox) -> None:
        """Once only: a run whose session is deleted finds its sandbox closed, and closes it again."""
        if (release := self._in_room.pop(sandbox.id, None)) is not None:
            release()

    def _make_way(self) -> None:
        """For each place that is wanted, begin to close the idle sandbox that was used longest ago; where none is idle,
        to end the run that was offered first."""
        while self.places.wanted > len(self._making_way):
            idle = next((key for key, warm in self._warm.items() if not warm.busy and warm.lost is None), None)
            if idle is not None:
                task = self._put_away(idle, "evicted")
            else:
                offered = [
                    (warm.used_at, key)
                    for key, warm in self._warm.items()
                    if warm.end is not None and warm.lost is None
                ]
                if not offered:
                    return
                task = asyncio.create_task(self._end_offered(self._warm[min(offered)[1]]))
                task.add_done_callback(partial(log_failure, event="no_room_made"))
            self._making_way.add(task)
            task.add_done_callback(self._made_way)

    async def _end_offered(self, warm: _Warm) -> None:
        """End a run that was offered. Its sandbox is idle then."""
        end, warm.end = warm.end, None
        if end is not None:
            await end()

    def _made_way(self, task: asyncio.Task[None]) -> None:
        self._making_way.discard(task)
        self._make_way()

    async def _sweep(self) -> None:
        """Close sandboxes that have been idle for too long or have died, and adapt the room, for ever."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            try:
                self._follow_memory()
            except OSError as error:  # such as EMFILE; what idle sandboxes have is then needed most
                note_outage("memory_not_followed", error)
            horizon = time.monotonic() - self._idle_seconds
            for key, warm in list(self._warm.items()):
                if warm.busy or warm.lost is not None:
                    continue
                if warm.used_at < horizon or not warm.sandbox.alive:
                    self._put_away(key, "idle" if warm.sandbox.alive else "died")

    def _follow_memory(self) -> None:
        """Have as much room as memory allows, unless a setting says how much there is."""
        if self._limit is not None:
            idle = [warm.sandbox for warm in self._warm.values() if not warm.busy]
            self._limit.measure([*idle, *self._ready.all()])
            self.places.resize(self._limit.limit(len(self._in_room)))
            self._make_way()
