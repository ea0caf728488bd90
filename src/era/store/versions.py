"""Rows of versions: listed, read, and taken up again."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, bindparam

from era.core.models import Cause, OwnedId, Session, Snapshot, Version, VersionContent, now
from era.errors import NotFound
from era.store.commits import VERSIONS, Commits, version_of
from era.store.tables import versions

_NEWEST = VERSIONS.where(versions.c.n < bindparam("before")).order_by(versions.c.n.desc()).limit(bindparam("how_many"))


class VersionRows(Commits):
    """The part of SqlStore that deals in versions."""

    async def commit(
        self, session_id: OwnedId, cause: Cause, *, data: str | None, snapshot: Snapshot | None, key: int | None = None
    ) -> Session:
        def job(connection: Connection) -> Session:
            session = self._live(connection, session_id)
            if key is not None and session.key != key:
                raise NotFound(f"Session '{session_id}' was deleted, and another has its id.")
            self._next_version(connection, session.key, cause, now(), data=data, snapshot=snapshot)
            return self._of_key(connection, session.key)

        return await self._write(job)

    async def rollback(self, session_id: OwnedId, n: int) -> Session:
        def job(connection: Connection) -> Session:
            session = self._live(connection, session_id)
            old = self._content(connection, session, n)
            snapshot = old.version.snapshot
            self._next_version(connection, session.key, "rollback", now(), data=old.data, snapshot=snapshot)
            return self._of_key(connection, session.key)

        return await self._write(job)

    async def versions(self, session_id: OwnedId, *, limit: int, before: int | None) -> Sequence[Version]:
        def job(connection: Connection, session: Session) -> Sequence[Version]:
            values = {
                "session": session.key,
                "before": session.version + 1 if before is None else before,
                "how_many": limit,
            }
            return [version_of(row) for row in connection.execute(_NEWEST, values)]

        return await self._read_live(session_id, job)

    async def version(self, session_id: OwnedId, n: int) -> VersionContent:
        return await self._read_live(session_id, lambda connection, session: self._content(connection, session, n))
