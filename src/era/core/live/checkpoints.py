"""Checkpoints: what the tree of a live session holds becomes the session's next version.

Theory of operation. A checkpoint is a commit like any other: it is made in the session's turn, and is a version, with a
cause of its own. What it holds is the tree of one moment, where the sandbox can be frozen (files/live_snapshots.py) or
no process is left in it. Where the tree is what the version in force says already, there is no new one. A run's own
commit takes the tree in the same way (session_run.py), so nothing needs a checkpoint while a run has the turn.

They are made on request and by themselves: when a process has ended, from time to time while something may change, and
when the session is put away, which is also what the stop of the service does (live_sessions.py). One that can't be made
says why, and the last one stands. They push out older checkpoints, and no other versions (store/versions.py).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from era.core.concurrency.turns import Turns
from era.core.metadata import MetadataStore
from era.core.models import Cause, Session
from era.core.pool.pool import SandboxPool
from era.core.sessions.sessions import keeping_files
from era.core.sessions.versions import HistoryBound
from era.core.trees.live_snapshots import LiveSnapshot, LiveSnapshots
from era.core.trees.trees import SnapshotRefused, WorkspaceFull
from era.errors import CommitFailed, Conflict, EraError, Fenced, RunUnderWay, SandboxFailed, TooLarge, Unavailable

if TYPE_CHECKING:
    from era.core.live.live_session import LiveSession

_PATIENCE = 60.0
"""Seconds for which a request for a checkpoint waits for the runs before it."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A version that holds a session's tree as it was."""

    version: int
    consistent: bool
    """Whether all of it is of one moment."""


class Checkpoints:
    """Makes what the trees of live sessions hold durable."""

    def __init__(
        self, store: MetadataStore, pool: SandboxPool, turns: Turns, moments: LiveSnapshots, history: HistoryBound
    ) -> None:
        self._store = store
        self._pool = pool
        self._turns = turns
        self._moments = moments
        self._history = history
        self._tasks: set[asyncio.Task[Checkpoint]] = set()

    async def last(self, live: LiveSession) -> None:
        """Commit the tree of a session that is put away, whose turn the caller has, and in whose sandbox nothing runs
        any more. Raises EraError where that can't be."""
        session = await self._store.session(live.session_id)
        if session.persistent:
            await self._committed(live, session, "checkpoint", ended=True)

    async def checkpoint(self, live: LiveSession) -> bool:
        """Commit the tree as it is, in the session's turn; False where that gives way to a run. Raises EraError where
        that can't be."""
        if not live.session.persistent:
            return True
        try:
            async with self._turns.take(live.session_id, patience=0):
                if live.is_open:
                    await self._committed(live, await self._store.session(live.session_id), "checkpoint")
        except RunUnderWay:
            return False  # its commit keeps what the tree holds then, if it makes one
        return True

    async def request(self, live: LiveSession) -> Checkpoint:
        """Commit the tree on request. Raises NotFound where the session is gone, Conflict where it keeps no files or
        isn't live any more, RunUnderWay, TooLarge beyond the session's limits, CommitFailed. It goes on when the caller
        is cancelled."""
        task = asyncio.create_task(self._requested(live))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def commit_edit(self, live: LiveSession) -> int:
        """Commit the tree, which a client has changed, in the session's turn. Returns how many old versions had to go
        for it. Raises as `request` does; CommitFailed also where the database can't be had."""
        try:
            session = keeping_files(await self._store.session(live.session_id))
            return (await self._committed(live, session, "files", changed=True))[1]
        except (Fenced, SandboxFailed):
            raise  # the change is gone with the sandbox
        except Unavailable as error:
            raise CommitFailed(
                f"{error.message.rstrip('.')}: the change was made in the live session, but isn't kept yet; "
                "whether it will be is decided by the next checkpoint.",
                hint="Look whether it is there before you send it again.",
            ) from error
        finally:
            live.is_changed = True  # a checkpoint that gave way to this one has taken note of it already

    async def _requested(self, live: LiveSession) -> Checkpoint:
        async with self._turns.take(live.session_id, patience=_PATIENCE):
            session = keeping_files(await self._store.session(live.session_id))
            if not live.is_open:
                raise Conflict(
                    f"Session '{session.id}' was put away meanwhile, or lost its sandbox.",
                    hint="What it held when it was put away is its newest version.",
                )
            try:
                return (await self._committed(live, session, "checkpoint"))[0]
            except EraError:
                live.is_changed = True  # as below
                raise

    async def _committed(
        self,
        live: LiveSession,
        session: Session,
        cause: Cause,
        *,
        changed: bool = False,
        ended: bool = False,
    ) -> tuple[Checkpoint, int]:
        """Commit the tree with a cause: `checkpoint` becomes `loose_checkpoint` where the tree isn't of one moment.

        Also returns how many old versions were dropped. `session` is the row as it is in the session's turn. `changed`
        is as for LiveSnapshots.take; `ended` says that no process is left, which is asked only for checkpoints.
        """
        trim, starts = None, live.starts
        is_still = ended or (cause == "checkpoint" and await live.is_still())
        with self._moments.naming():
            moment = await self._taken(live, session, changed=changed)
            snapshot, consistent = moment.snapshot, moment.consistent or (is_still and live.starts == starts)
            if snapshot.root != session.snapshot.root:
                trim = await self._history.trim(session, snapshot)
                session = await self._store.commit(
                    session.owned_id,
                    cause if consistent or cause != "checkpoint" else "loose_checkpoint",
                    data=None,
                    snapshot=snapshot,
                    key=live.session_key,
                    trim=trim,
                )
            self._pool.committed(live.session_key, snapshot)
            return Checkpoint(session.version, consistent), 0 if trim is None else len(trim.drop)

    async def _taken(self, live: LiveSession, session: Session, *, changed: bool) -> LiveSnapshot:
        """Take the tree. Raises TooLarge or Conflict where it can't be kept, CommitFailed."""
        try:
            return await self._moments.take(
                live.sandbox,
                session.snapshot,
                changed=changed,
                session_id=session.owned_id,
            )
        except SnapshotRefused as refused:
            message = f"There is no checkpoint of session '{session.id}': {refused}. The last version stands."
            if isinstance(refused, WorkspaceFull):
                raise TooLarge(
                    message, hint="Have its processes leave less, or raise the session's 'limits'."
                ) from None
            raise Conflict(message, hint="Try again, or stop what changes it.", code="no_checkpoint") from None
