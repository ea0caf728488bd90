"""Versions: list them, compare them, go back to one, and copy a session from one; and how much of them is kept.

Theory of operation of the bound (`HistoryBound`). Versions share content, so what they hold together can only be
counted by reading the lists of all their directories. No commit should pay for that. So a session's row has an upper
bound of what is held: each commit adds what it has newly stored, and versions that go take nothing off. Only when
that sum is over the limit is it counted what is really held, before the commit and on a thread; the commit then drops
the oldest versions without a name, and of those checkpoints first.

Where anything must go, so much goes that an eighth of the limit is free. And the row never says after a count that
less were free. So an eighth of the limit must be stored anew before it is counted again, and a session holds at most
its limit, or what can't be dropped, and an eighth of the limit besides.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import structlog

from era.core.concurrency.tasks import computing
from era.core.concurrency.turns import Liveness, Turns
from era.core.limits import Rules
from era.core.metadata import MetadataStore
from era.core.models import (
    EMPTY,
    Claim,
    JsonObject,
    KeptVersion,
    NewCopy,
    OwnedId,
    Session,
    Snapshot,
    Trim,
    Version,
    VersionContent,
)
from era.core.sessions.idempotency import IdempotencyKeys, Once, create_once
from era.core.sessions.sessions import data_text_aside, without_view
from era.core.trees.diffs import DataChange, FileChange, Kind, data_changes
from era.core.trees.pages import change_pages
from era.core.trees.snapshots import Snapshots
from era.errors import TooLarge, Unavailable

log = structlog.get_logger()

MAX_ID_LENGTH = 128
MAX_NAME = 128
NAME = r"^[^\x00-\x1f\x7f-\x9f]{1,128}$"
"""What the name of a version matches: any characters but those that control a terminal."""


@dataclass(frozen=True, slots=True)
class Diff:
    """What version `n` changed."""

    n: int
    data: Sequence[DataChange]
    files: Callable[[Kind], AsyncIterator[Sequence[FileChange]]]
    """Those that were added, changed or removed, some at a time."""


class Versions:
    """The service of a session's versions."""

    def __init__(
        self,
        store: MetadataStore,
        snapshots: Snapshots,
        turns: Turns,
        idempotency: IdempotencyKeys,
        history: HistoryBound,
        liveness: Liveness,
    ) -> None:
        self._history = history
        self._liveness = liveness
        self._store = store
        self._idempotency = idempotency
        self._snapshots = snapshots
        self._turns = turns

    async def list(self, session_id: OwnedId, *, limit: int, before: int | None) -> Sequence[Version]:
        """Newest first, those before version `before`."""
        return await self._store.versions(session_id, limit=limit, before=before)

    async def get(self, session_id: OwnedId, n: int) -> VersionContent:
        """Raises NotFound where the version isn't kept."""
        return await self._store.version(session_id, n)

    async def diff(self, session_id: OwnedId, n: int) -> Diff:
        """What version `n` changed compared with the one before; version 1 with an empty session. Raises NotFound where
        either isn't kept."""
        new = await self._store.version(session_id, n)
        old_data, old_snapshot = "{}", EMPTY
        if n > 1:
            old = await self._store.version(session_id, n - 1)
            old_data, old_snapshot = old.data, old.version.snapshot
        files = partial(change_pages, self._snapshots, old_snapshot, new.version.snapshot, session_id)
        return Diff(n, await computing(session_id.owner, _changes, old_data, new.data, session=session_id), files)

    async def name(self, session_id: OwnedId, n: int, name: str) -> Version:
        """Name version `n`, which is kept from now on. It needs no turn: neither data nor files change.

        Raises NotFound where the version isn't kept, Conflict where another one has the name, TooLarge where the named
        versions would hold too much.
        """
        while True:
            session = await self._store.session(session_id)
            kept = await self._store.kept_versions(session.key)
            named = [version for version in kept if version.named]
            if n not in {version.n for version in named}:
                await self._history.check_names(session, [*named, *(version for version in kept if version.n == n)])
            version = await self._store.name_version(session_id, n, name, named={version.n for version in named})
            if version is not None:
                return version

    async def clear_name(self, session_id: OwnedId, n: int) -> None:
        """Take version `n` its name. Raises NotFound where it isn't kept or has none."""
        await self._store.clear_name(session_id, n)

    async def rollback(self, session_id: OwnedId, n: int) -> Session:
        """Make a new version with the content of version `n`, between runs. A warm sandbox then holds the wrong files;
        the pool sees that by the snapshot when the next run asks for it. Raises SessionLive."""
        async with self._turns.take(session_id):
            self._liveness.check_not(await self._store.session(session_id), "can't be rolled back")
            return await self._store.rollback(session_id, n)

    async def duplicate(
        self,
        session_id: OwnedId,
        *,
        new_id: str | None,
        data: JsonObject | None,
        from_version: int | None,
        claim: Claim | None = None,
    ) -> Once[Session]:
        """A new session with the content and settings of this one. It needs no turn: what is copied is a version, and
        those don't change. Raises Conflict where the id is taken."""
        text = None
        if data is not None:
            source = await self._store.session(session_id)
            text = await data_text_aside(await without_view(data, source))
        copy = NewCopy(session_id, new_id or _copy_id(session_id.id), from_version, text)
        return await create_once(self._idempotency, session_id, claim, lambda: self._store.duplicate(copy, claim))


def _changes(old: str, new: str) -> list[DataChange]:
    """The changes between two data as JSON text."""
    return data_changes(json.loads(old), json.loads(new))


def _copy_id(session_id: str) -> str:
    """An id for a copy: the old one, cut if need be, and the time in milliseconds."""
    suffix = f"-copy-{time.time_ns() // 1_000_000}"
    return session_id[: MAX_ID_LENGTH - len(suffix)] + suffix


DISKS = 4
"""The limit of a session's history where the server sets none, as a multiple of its disk limit."""

MAX_NAMED = 256
"""How many versions of a session may have a name."""


class HistoryBound:
    """Keeps the histories of sessions within their limit."""

    def __init__(self, store: MetadataStore, snapshots: Snapshots, rules: Rules, most_bytes: int = 0) -> None:
        """`most_bytes` is the limit of each session; 0 stands for `DISKS` times its own disk space."""
        self._store = store
        self._snapshots = snapshots
        self._rules = rules
        self._most_bytes = most_bytes

    def most(self, session: Session) -> int:
        """How many bytes the session's versions may hold."""
        return self._most_bytes or DISKS * self._rules.granted(session.limits).disk_bytes

    async def trim(self, session: Session, snapshot: Snapshot | None) -> Trim | None:
        """Return which versions a commit of this snapshot must drop, None where the row says that there is room. The
        caller has the session's turn; `session` is as it is before the commit."""
        if snapshot is None or snapshot.root in (None, session.snapshot.root):
            return None
        most = self.most(session)
        if session.history_bytes is not None and session.history_bytes + snapshot.stored_bytes <= most:
            return None
        try:
            return await self._counted(session, snapshot.root)
        except Unavailable as error:
            # The commit can do without: the next one counts again.
            log.warning("history_not_counted", session=session.key, error=error.message)
            return None

    async def check_names(self, session: Session, named: Sequence[KeptVersion]) -> None:
        """Raises TooLarge where these versions can't all have a name, Unavailable where the disk fails."""
        if len(named) > MAX_NAMED:
            raise TooLarge(
                f"Session '{session.id}' has {MAX_NAMED} named versions, and can't have more.",
                hint="DELETE /api/sessions/{id}/versions/{n}/name takes a version its name.",
            )
        most = self.most(session)
        held = await self._snapshots.held_bytes(_roots(named), most, session_id=session.owned_id)
        if held and held[-1] > most:
            raise TooLarge(
                f"The named versions of session '{session.id}' would hold over {most} bytes, which is the limit of its "
                "history.",
                hint="Take another version its name, or raise the server's ERA_HISTORY_MB or the session's disk_mb.",
            )

    async def not_imported(self, session: Session, older: Sequence[KeptVersion]) -> Sequence[int]:
        """Which of these versions must be left out of a session that is imported with them, and with the version in
        force besides. Raises as check_names does."""
        await self.check_names(session, [version for version in older if version.named])
        root = session.snapshot.root or next(iter(_roots(older)), None)
        if root is None:
            return ()
        return (await self._trimmed(session, older, root)).drop

    async def _counted(self, session: Session, root: str) -> Trim:
        """What a commit of the snapshot `root` must drop. Raises Unavailable where the disk fails."""
        return await self._trimmed(session, await self._store.kept_versions(session.key), root)

    async def _trimmed(self, session: Session, kept: Sequence[KeptVersion], root: str) -> Trim:
        """Which of these must go, so that the others and the snapshot `root` hold no more than the session may."""
        most = self.most(session)
        unnamed = sorted(
            (version for version in kept if not version.named), key=lambda version: (version.is_checkpoint, -version.n)
        )
        staying = [root, *_roots([version for version in kept if version.named])]
        totals = await self._snapshots.held_bytes(
            [*staying, *(version.root or root for version in unnamed)],
            most,
            at_least=len(staying),
            session_id=session.owned_id,
        )
        room = most - most // 8
        # What all that stay hold, then these and the newest without a name, these and the newest two, and so on.
        # Checkpoints come last: they go first.
        stay, *others = totals[len(staying) - 1 :]
        if len(others) == len(unnamed) and totals[-1] <= most:
            return Trim((), min(totals[-1], room))
        count = sum(total <= room for total in others)
        return Trim([version.n for version in unnamed[count:]], min([stay, *others][count], room))


def _roots(versions: Sequence[KeptVersion]) -> list[str]:
    """The roots of those that hold anything."""
    return [version.root for version in versions if version.root is not None]
