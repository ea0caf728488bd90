"""Live sessions: which there are, how they come to be, what they hold, and how they end.

Theory of operation
===================

A session is *live* from its first process, context or terminal until it is put away. Meanwhile its sandbox is held in
the pool: it makes way for nobody, and runs get it as it is. What is in its working directory is the truth, of which
versions are checkpoints (checkpoints.py).

*It becomes live* in its turn, like a run, or joins the run that has the turn: then it gets that run's sandbox. It can't
join a run that may have to be undone (`atomic`), nor one after which the working directory is emptied, nor one whose
files are being looked at.

*It is in use* while a process runs, while somebody is attached, and during calls. Once it has not been for
`keep_alive` seconds, or on request, it is *put away*, in this order: its processes are ended; then whoever has added
something to `at_end` is told; then nothing is left in the sandbox but what runs need; then, in the session's turn, what
the tree holds is committed; then the sandbox is one like any other again, warm and with that very version. Where the
commit is refused the sandbox goes, and the session is what its last version says.

*While the database is away*, or where files are stored, a checkpoint is tried again, at intervals that grow, also in a
session that is idle. For being idle, one is put away only once a checkpoint has been made: until then it stays as it
is, with its contexts. Where it has to go, the commit is tried for as long as a run's would be, or as the service has
for its stop. A commit whose answer was lost makes no second version: the next try finds what it has in force already.

*It is lost* when its sandbox is closed by others: the session was deleted, a run's commit failed, the sandbox died. All
that are concerned are told why, once (`why_lost`).

Live sessions can't make way, so there is a bound of their own on them: three quarters of the sandboxes that sessions
may have, and of these each owner may have as many as are left.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import structlog

from era.core.concurrency.late_ends import LateEnds
from era.core.concurrency.meter import charge_to
from era.core.concurrency.turns import Turns
from era.core.execution.active_runs import ActiveRuns
from era.core.limits import Rules
from era.core.live.checkpoints import Checkpoints
from era.core.live.live_session import LAST_RECORDS_SECONDS, LiveSession
from era.core.metadata import MetadataStore
from era.core.models import OwnedId, Session
from era.core.owners.quotas import Quotas
from era.core.pool.pool import SERVICE_STOPPED, SandboxPool
from era.core.ports import Network, Sandbox, StorageAccesses
from era.core.setup.setups import UNDER_WAY
from era.errors import (
    BeingStopped,
    CommitFailed,
    EraError,
    Fenced,
    HostLost,
    NotFound,
    RunUnderWay,
    SandboxFailed,
    SessionMoved,
    SetupUnderWay,
    TooLarge,
    TooManyLive,
    Unavailable,
)

log = structlog.get_logger()

_LOOK_SECONDS = 1.0
_CHECKPOINT_SECONDS = 60.0
_PATIENCE = 30.0
"""Seconds for which a first process waits for a run that it can't join."""

_TRY_SECONDS = 0.2
"""How long it waits for the turn before it looks whether there is a run that it can join by now."""

_COMMIT_PATIENCE = 30.0
"""Seconds for which the commit of a session that is put away is tried, while the database is away."""

_AGAIN_SECONDS = 1.0
"""Between two such tries; and until a checkpoint is tried again, the first time."""

_AFTER_END_SECONDS = 0.05
"""Between the end of a process and the checkpoint made for it."""

_STOPPED = "The session was stopped."
_FAILED = "The session's sandbox failed."
_DIED = "The sandbox died before the session was live."


@dataclass(frozen=True, slots=True)
class LiveParts:
    """The parts of the service that live sessions work with."""

    store: MetadataStore
    pool: SandboxPool
    turns: Turns
    active_runs: ActiveRuns
    network: Network
    storage: StorageAccesses
    checkpoints: Checkpoints
    setup_ended: Callable[[OwnedId, float], Awaitable[bool]]
    """Waits for a session's setup, at most so many seconds; see Setups.settled."""

    quotas: Quotas
    rules: Rules
    late_ends: LateEnds = field(default_factory=LateEnds)


class LiveSessions:
    """The live sessions of this service. `start` before anything, `stop` when done."""

    def __init__(self, parts: LiveParts, *, keep_alive: float, checkpoint_seconds: float = _CHECKPOINT_SECONDS) -> None:
        """One that has been idle for `keep_alive` seconds is put away. Every
        `checkpoint_seconds`, one in which something may have changed gets a checkpoint."""
        self._parts = parts
        self._keep_alive = keep_alive
        self._checkpoint_seconds = checkpoint_seconds
        self._live: dict[int, LiveSession] = {}
        self._by_id: dict[OwnedId, LiveSession] = {}
        self._opening: dict[int, asyncio.Task[LiveSession]] = {}
        self._waiting_in_turn: set[int] = set()
        """Keys of sessions that become live for who has their turn."""

        self._owners: Counter[str] = Counter()
        """How many each owner has, those included that are becoming live."""

        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False

    def start(self) -> None:
        self._begin(self._look())

    async def stop(self, seconds: float, why: str = SERVICE_STOPPED) -> None:
        """Put all away, within so many seconds; processes end with `why` as the reason. May be called again."""
        self._stopped = True
        give_up_at = time.monotonic() + seconds
        closing = [asyncio.create_task(self._put_away(live, why, give_up_at)) for live in self._live.values()]
        if closing:
            await asyncio.wait(closing, timeout=seconds)
            for task in closing:
                if task.done() and not task.cancelled() and (error := task.exception()):
                    log.warning("live_session_not_kept", error=str(error))

    async def close(self) -> None:
        """End the tasks that are left, once the sandboxes are gone."""
        await asyncio.gather(*(live.processes.close(LAST_RECORDS_SECONDS) for live in self._live.values()))
        await self._parts.late_ends.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def get(self, session_key: int) -> LiveSession | None:
        """The live session with this key, if there is one in which something can be begun."""
        live = self._live.get(session_key)
        return live if live is not None and live.is_open else None

    def known(self, session_key: int) -> LiveSession | None:
        """The live session with this key, though it may be about to end. It knows the ends of its processes before
        these are on record, and is there until they are."""
        return self._live.get(session_key)

    def running(self, session_id: OwnedId) -> LiveSession | None:
        """The live session with this id, if a process of it runs: it is there then and hasn't expired, without a look
        into the database. One that is being deleted may be told until its deletion is answered."""
        live = self._by_id.get(session_id)
        return live if live is not None and live.is_open and live.processes.running else None

    def of_owner(self, owner: str) -> Sequence[LiveSession]:
        """Those of an owner's in which something can be begun."""
        return [live for live in self._live.values() if live.session.owner == owner and live.is_open]

    def count(self) -> int:
        return len(self._live)

    def has(self, session_key: int) -> bool:
        """Whether the session is live, or is about to be."""
        return session_key in self._live or session_key in self._opening

    @property
    def most(self) -> int:
        """How many may be live."""
        return self._parts.pool.places.count * 3 // 4

    def has_room(self, owner: str) -> bool:
        """Whether another session of this owner's may become live."""
        return self._owners[owner] < self.most - self._owners.total()

    def running_processes(self) -> int:
        """How many processes run in all of them."""
        return sum(len(live.processes.running) for live in self._live.values())

    @asynccontextmanager
    async def opened(self, session_id: OwnedId, *, in_turn: bool = False) -> AsyncIterator[LiveSession]:
        """The session, which becomes live if it isn't, in use within the block. `in_turn` is for who holds its turn,
        and so can't wait until it has been put away. Raises NotFound, Expired, SetupUnderWay, RunUnderWay, TooManyLive,
        QuotaReached, and as SandboxPool.acquire does; BeingStopped, with `in_turn` only."""
        live = await self._open(session_id, in_turn=in_turn)
        with live.in_use():
            yield live

    @contextmanager
    def in_use(self, session_key: int) -> Iterator[LiveSession | None]:
        """The live session, in use within the block; None where it isn't live, which it doesn't become."""
        live = self.get(session_key)
        if live is None:
            yield None
            return
        with live.in_use():
            yield live

    async def follow(self, session_id: OwnedId) -> None:
        """Let the processes of a live session connect to where its settings, which were changed, say now. Raises
        NotFound, Unavailable."""
        if (live := self._by_id.get(session_id)) is not None:
            await live.follow(partial(self._parts.store.session, session_id))

    def is_being_put_away(self, session_key: int) -> bool:
        """Whether a session is still live, but nothing can be begun in it any more."""
        live = self._live.get(session_key)
        return live is not None and not live.is_open and live.why_lost is None

    async def settled(self, session_key: int, seconds: float) -> None:
        """Wait until a session that is being put away has been, at most so many seconds."""
        live = self._live.get(session_key)
        if live is not None and not live.is_open:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await live.closed.wait()

    async def put_away(self, session_id: OwnedId) -> Session:
        """End all processes of a session, commit what they left, and return the session, which isn't live any more.
        Raises CommitFailed where that can't be kept."""
        session = await self._parts.store.session(session_id)
        if opening := self._opening.get(session.key):
            await asyncio.wait({opening})
        if live := self._live.get(session.key):
            await self._put_away(live, _STOPPED)
        return await self._parts.store.session(session_id)

    async def put_away_if_ended(self, session_id: OwnedId) -> None:
        """Suspend a session as `put_away` does, where it is live and neither a process nor a context runs in it."""
        live = self._by_id.get(session_id)
        if live is not None and not live.is_running:
            await self._put_away(live, _STOPPED)

    async def _open(self, session_id: OwnedId, *, in_turn: bool) -> LiveSession:
        if (live := self.running(session_id)) is not None:
            return live
        while True:
            session = await self._parts.store.session(session_id)
            if session.setup_status in UNDER_WAY:
                if not await self._parts.setup_ended(session_id, session.default_timeout):
                    raise SetupUnderWay(f"The setup of session '{session_id}' is under way.")
                continue
            live = self._live.get(session.key)
            if live is None:
                task = self._opening.get(session.key)
                if task is None:
                    task = self._opening[session.key] = asyncio.create_task(self._make(session_id, session))
                    task.add_done_callback(partial(self._made, session.key))
                with self._waiting(session.key, in_turn=in_turn):
                    try:
                        live = await asyncio.shield(task)
                    except SetupUnderWay:  # by now
                        continue
            if live.is_open:
                return live
            if in_turn and live.why_lost is None:
                # Its end waits for the turn, too.
                raise BeingStopped(f"Session '{session_id}' is being stopped.")
            await live.closed.wait()

    @contextmanager
    def _waiting(self, session_key: int, *, in_turn: bool) -> Iterator[None]:
        """Note within the block whether the session is made live for who has its turn."""
        if in_turn:
            self._waiting_in_turn.add(session_key)
        try:
            yield
        finally:
            if in_turn:
                self._waiting_in_turn.remove(session_key)

    def _made(self, session_key: int, task: asyncio.Task[LiveSession]) -> None:
        del self._opening[session_key]
        if not task.cancelled():
            task.exception()  # whoever waited for it has it

    async def _make(self, who: OwnedId, session: Session) -> LiveSession:
        """Make a session live, for the call of `who`. Raises as `opened` does."""
        parts = self._parts
        charge_to(session.owner, session.id)
        self._check_room(session)
        self._owners[session.owner] += 1
        try:
            release = await parts.quotas.hold(who, parts.rules.granted(session.limits).memory_bytes)
        except BaseException:
            self._owners[session.owner] -= 1
            raise
        made: list[LiveSession] = []

        def lost(why: str) -> None:
            for live in made:
                self._lost(live, why)

        try:
            session, sandbox = await self._sandbox(session, lost)
            live = LiveSession(session, sandbox, parts.store, parts.late_ends, parts.network, parts.storage)
            live.release = release
            made.append(live)
            self._live[session.key] = self._by_id[session.owned_id] = live
            try:
                await self.follow(session.owned_id)  # its settings may have changed since its row was read
                await live.supervisor()
                if live.why_lost is not None:
                    raise Unavailable(live.why_lost)
            except BaseException:
                if live.why_lost is None:
                    live.is_open = False
                    self._begin(self._put_away_at_once(live))
                raise
        except BaseException:
            if not made:
                self._owners[session.owner] -= 1
                await release()
            raise
        self._begin(self._keep(live))
        return live

    def _check_room(self, session: Session) -> None:
        """Raises TooManyLive where another live session would be too many, or Unavailable."""
        if self._stopped:
            raise Unavailable("This server is about to stop.")
        if self.has_room(session.owner):
            return
        own, most = self._owners[session.owner], self.most
        mine = [live.session.id for live in self._live.values() if live.session.owner == session.owner]
        raise TooManyLive(
            f"Session '{session.id}' can't be live: {self._owners.total()} sessions are, {own} of them yours, and this "
            f"server may have {most}, shared by who has any.",
            details={"live": mine},
        )

    async def _sandbox(self, session: Session, lost: Callable[[str], None]) -> tuple[Session, Sandbox]:
        """The session and its sandbox, which is held from now on. Raises as `opened` does."""
        parts, deadline = self._parts, time.monotonic() + _PATIENCE
        while True:
            run = parts.active_runs.of_session(session.key)
            if run is not None and run.joinable and run.sandbox is not None:
                sandbox = parts.pool.hold(session.key, lost)
                if sandbox is not None:
                    return session, sandbox
                if session.key in self._waiting_in_turn:  # which that run has, so it is to be made anew
                    raise SandboxFailed(_DIED)
            try:
                async with parts.turns.take(session.owned_id, patience=_TRY_SECONDS):
                    now = await parts.store.session(session.owned_id)
                    if now.key != session.key:
                        raise NotFound(f"Session '{session.id}' was deleted meanwhile.")
                    if now.setup_status in UNDER_WAY:  # since its turn was waited for, and it is to have the sandbox
                        raise SetupUnderWay(f"The setup of session '{session.id}' is under way.")
                    sandbox = await parts.pool.acquire(now)
                    held = parts.pool.hold(session.key, lost)
                    parts.pool.committed(session.key, now.snapshot)
                    if held is not None:
                        return now, sandbox
                if time.monotonic() > deadline:  # each new one dies at once
                    raise SandboxFailed(_DIED)
            except RunUnderWay:
                if time.monotonic() > deadline:
                    raise

    def _lost(self, live: LiveSession, why: str) -> None:
        """The sandbox of a live session is about to be closed."""
        if live.why_lost is None and not live.closed.is_set():
            live.why_lost = why
            live.is_open = False
            self._begin(self._clear_away(live, why))

    async def _clear_away(self, live: LiveSession, why: str) -> None:
        """Take away what a live session had, whose sandbox goes."""
        try:
            await live.end(why)
        finally:
            await self._forget(live)

    async def _forget(self, live: LiveSession) -> None:
        if not live.closed.is_set():
            live.closed.set()
            if self._live.get(live.session_key) is live:
                del self._live[live.session_key]
            if self._by_id.get(live.session_id) is live:
                del self._by_id[live.session_id]
            self._owners[live.session.owner] -= 1
            await live.release()

    async def _put_away_at_once(self, live: LiveSession) -> None:
        try:
            await self._put_away(live, live.why_full or _STOPPED)
        except EraError as error:
            log.warning("live_session_not_kept", session=live.session_key, error=error.message)

    async def _put_away(self, live: LiveSession, why: str, give_up_at: float | None = None) -> None:
        """End a live session, for `why`; see above. Raises EraError where what it left can't be committed: CommitFailed
        where that is tried until `give_up_at`, by the monotonic clock, since the reason may pass."""
        if give_up_at is None:
            give_up_at = time.monotonic() + _COMMIT_PATIENCE
        live.is_open = False
        try:
            await live.end(why)
        except Exception:  # nobody knows what of it goes on, so its sandbox can't be let go
            await self._parts.pool.discard(live.sandbox, _FAILED)
            raise
        while live.why_lost is None and not live.closed.is_set():
            async with self._parts.turns.take(live.session_id, bounded=False):
                # Once it is lost the turn may be that of a run in another sandbox.
                if live.why_lost is None and not live.closed.is_set():
                    await self._commit_and_let_go(live, give_up_at)
            with suppress(TimeoutError):
                async with asyncio.timeout(_AGAIN_SECONDS):
                    await live.closed.wait()
        await live.closed.wait()

    async def _commit_and_let_go(self, live: LiveSession, give_up_at: float) -> None:
        """Commit what the tree holds, in which nobody changes anything any more, and hold the sandbox no longer. Where
        that fails for a reason that may pass, all stays as it is while there is time for another try."""
        pool = self._parts.pool
        try:
            if not live.session.persistent:
                await self._forget(live)  # its files have lived as long as it was live
                await pool.discard(live.sandbox)
                return
            await self._parts.checkpoints.last(live)
        except BaseException as error:
            if _may_pass(error) and time.monotonic() + _AGAIN_SECONDS < give_up_at:
                return
            message = error.message if isinstance(error, EraError) else "the service failed"
            why = f"What the session's processes left could not be kept: {message}"
            await pool.discard(live.sandbox, why)
            if _may_pass(error):
                raise CommitFailed(why) from error  # or clients would send it again, and be told that it is put away
            raise
        pool.let_go(live.session_key, live.sandbox)
        await self._forget(live)

    async def _keep(self, live: LiveSession) -> None:
        """Have checkpoints made: when a process has ended, from time to time while something may change, and again
        where one failed for a reason that may pass."""
        while not live.closed.is_set():
            try:
                async with asyncio.timeout(live.retry_seconds or self._checkpoint_seconds):
                    # No end of a process hastens a try that is to wait.
                    await (live.closed if live.retry_seconds else live.wants_checkpoint).wait()
            except TimeoutError:
                if not live.is_changed and live.is_idle:
                    continue
            else:
                # Whoever waits for it has its end first, and those that end one behind the other share a checkpoint.
                await asyncio.sleep(_AFTER_END_SECONDS)
            if not live.is_open:
                return
            await self._checkpoint(live)

    async def _checkpoint(self, live: LiveSession) -> bool:
        """Make a checkpoint. False where that failed for a reason that may pass, or gave way: then `_keep` makes it."""
        live.wants_checkpoint.clear()
        live.is_changed = False
        try:
            await live.check_disk()
            if not await self._parts.checkpoints.checkpoint(live):
                live.is_changed = True
                return False
        except EraError as error:
            if not live.retry_seconds or not _may_pass(error):  # else the log has it
                log.warning("no_checkpoint", session=live.session_key, error=error.message)
            if _may_pass(error):
                live.retry_seconds = min(max(2 * live.retry_seconds, _AGAIN_SECONDS), self._checkpoint_seconds)
                live.is_changed = True
                live.wants_checkpoint.set()
                return False
            if isinstance(error, TooLarge):
                await live.check_disk(surely=True)
        live.retry_seconds = 0.0
        return True

    async def _look(self) -> None:
        """Put away what is idle, and let go what is dead, for ever."""
        while True:
            await asyncio.sleep(min(_LOOK_SECONDS, self._keep_alive / 2))
            for live in list(self._live.values()):
                if not live.is_open:
                    continue
                if not live.sandbox.alive:
                    self._begin(self._parts.pool.discard(live.sandbox, _FAILED))
                elif self._is_due(live):
                    self._begin(self._put_away_if_idle(live))

    def _is_due(self, live: LiveSession) -> bool:
        # The pool knows when a run was committed, be it of a cell or an ordinary one.
        used_at = max(live.used_at, self._parts.pool.used_at(live.session_key))
        is_idle = live.is_idle and time.monotonic() > used_at + self._keep_alive and not live.retry_seconds
        return not self._is_busy(live) and (live.why_full is not None or is_idle)

    def _is_busy(self, live: LiveSession) -> bool:
        return live.session_key in self._opening or self._parts.turns.taken(live.session_id)

    async def _put_away_if_idle(self, live: LiveSession) -> None:
        if not self._is_due(live) or not live.is_open:
            return
        used_at = live.used_at
        # Nothing is ended before it is known that what there is can be kept.
        if live.why_full is None and not await self._checkpoint(live):
            return
        is_idle = live.is_idle and live.used_at == used_at
        if live.is_open and not self._is_busy(live) and (live.why_full is not None or is_idle):
            await self._put_away_at_once(live)

    def _begin(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("live_session_failed", exc_info=error)


def _may_pass(error: BaseException) -> bool:
    """Whether what could not be kept for this error may be kept later: the database is away, or where files are stored;
    and not the sandbox, nor the session's home."""
    return isinstance(error, Unavailable) and not isinstance(error, SandboxFailed | Fenced | SessionMoved | HostLost)
