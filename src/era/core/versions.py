"""Versions: list them, compare them, go back to one, and copy a session from one."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from era.core.files.diffs import DataChange, FileChange, Kind, data_changes
from era.core.files.pages import change_pages
from era.core.files.snapshots import Snapshots
from era.core.history import HistoryBound
from era.core.idempotency import IdempotencyKeys, Made, create_once
from era.core.metadata import MetadataStore
from era.core.models import EMPTY, Claim, JsonObject, NewCopy, OwnedId, Session, Version, VersionContent
from era.core.sessions import data_text_aside, without_view
from era.core.tasks import computing
from era.core.turns import Liveness, Turns

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
    ) -> Made:
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
