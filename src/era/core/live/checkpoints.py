"""Checkpoints: what the tree of a live session holds becomes the session's next version.

In a checkpoint everything in the sandbox stands still, where that can be (Sandbox.frozen), so that it is the tree of
one moment. A run's own commit is one, too (session_run.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from era.core.files.snapshots import Snapshots
from era.core.files.trees import SnapshotRefused
from era.core.history import HistoryBound
from era.core.metadata import MetadataStore
from era.core.pool import SandboxPool
from era.core.turns import Turns
from era.errors import CommitFailed

if TYPE_CHECKING:
    from era.core.live.live_session import LiveSession

type Occasion = Literal["process_ended", "time", "put_away"]


class Checkpoints(Protocol):
    """Makes what the tree of a live session holds durable."""

    async def checkpoint(self, live: LiveSession, occasion: Occasion) -> None:
        """Commit the tree as it is. The caller has the session's turn when a session is put away, and then nothing runs
        in the sandbox any more; else it hasn't. Raises EraError where that can't be."""
        ...


class CommitWhenPutAway:
    """Commits the tree when the session is put away, and when a process has ended while no run has the turn."""

    def __init__(
        self, store: MetadataStore, pool: SandboxPool, turns: Turns, snapshots: Snapshots, history: HistoryBound
    ) -> None:
        self._store, self._pool, self._turns = store, pool, turns
        self._snapshots, self._history = snapshots, history

    async def checkpoint(self, live: LiveSession, occasion: Occasion) -> None:
        if occasion == "put_away":
            await self._commit(live)
        elif occasion == "process_ended" and not self._turns.taken(live.session_id):
            async with self._turns.take(live.session_id):
                if live.is_open:
                    await self._commit(live)

    async def _commit(self, live: LiveSession) -> None:
        session = await self._store.session(live.session_id)
        if not session.persistent:
            return
        try:
            async with live.sandbox.frozen():
                snapshot = await self._snapshots.take(live.sandbox, session.snapshot)
        except SnapshotRefused as error:
            raise CommitFailed(
                f"What the processes of session '{session.id}' left can't be kept: {error}.",
                hint="Have them leave less, or raise the session's 'limits'.",
            ) from None
        if snapshot.root != session.snapshot.root:
            trim = await self._history.trim(session, snapshot)
            await self._store.commit(
                session.owned_id, "checkpoint", data=None, snapshot=snapshot, key=live.session_key, trim=trim
            )
        self._pool.committed(live.session_key, snapshot)
