"""What sessions have installed, in their rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, select, update

from era.core.metadata import SetupJob
from era.core.models import OwnedId, Session, Snapshot, now
from era.errors import NotFound
from era.store.commits import IS_LIVE, Commits
from era.store.tables import SETUP_UNDER_WAY, sessions

_TO_DO = (
    select(sessions.c.key, sessions.c.owner, sessions.c.id, sessions.c.setup, sessions.c.setup_lock)
    .where(SETUP_UNDER_WAY, IS_LIVE)
    .order_by(sessions.c.key)
    .limit(1000)
)
_IN_FORCE = select(sessions.c.version, sessions.c.setup).where(sessions.c.key == bindparam("session"), IS_LIVE)
_OF_JOB = (
    update(sessions)
    .where(sessions.c.key == bindparam("session"), sessions.c.setup == bindparam("job"), SETUP_UNDER_WAY)
    .values(setup_status=bindparam("status"))
)
_END = _OF_JOB.values(
    setup_result=bindparam("result"), package_set=bindparam("new_package_set"), updated_at=bindparam("at")
)
_COMPLETE = _END.values(setup_lock=None)
_PACKAGE_SETS = select(sessions.c.package_set).where(sessions.c.package_set.is_not(None)).distinct()
PENDING: dict[str, Any] = {"setup_status": "pending", "setup_result": None, "package_set": None}
"""What else a row says whose setup has just been asked for."""


class SetupRows(Commits):
    """The part of SqlStore that deals in setups."""

    async def setups_to_do(self) -> Sequence[SetupJob]:
        def job(connection: Connection) -> Sequence[SetupJob]:
            rows = connection.execute(_TO_DO)
            return [SetupJob(row.key, OwnedId(row.owner, row.id), row.setup, row.setup_lock) for row in rows]

        return await self._read(job)

    async def begin_setup(self, job: SetupJob) -> None:
        values = {"session": job.session_key, "job": job.setup, "status": "running"}
        await self._write(lambda connection: connection.execute(_OF_JOB, values))

    async def end_setup(
        self,
        job: SetupJob,
        *,
        status: str,
        result: str,
        package_set: str | None,
        left: tuple[int, Snapshot] | None = None,
    ) -> bool:
        at = now()
        values = {"session": job.session_key, "job": job.setup, "status": status}
        values |= {"result": result, "new_package_set": package_set, "at": at}

        def end(connection: Connection) -> bool:
            if left is not None:
                version, snapshot = left
                row = connection.execute(_IN_FORCE, {"session": job.session_key}).one_or_none()
                if row is None or tuple(row) != (version, job.setup):
                    return False
                if snapshot != self._of_key(connection, job.session_key).snapshot:
                    self._next_version(connection, job.session_key, "setup", at, data=None, snapshot=snapshot)
            if status == "completed":
                return connection.execute(_COMPLETE, values).rowcount > 0
            return connection.execute(_END, values).rowcount > 0

        return await self._write(end)

    async def set_up_again(self, session_id: OwnedId) -> Session:
        def job(connection: Connection) -> Session:
            session = self._live(connection, session_id)
            if session.setup is None:
                raise NotFound(f"Session '{session_id}' has no setup.")
            values = PENDING | {"updated_at": now()}
            connection.execute(update(sessions).where(sessions.c.key == session.key).values(values))
            return self._of_key(connection, session.key)

        return await self._write(job)

    async def package_sets(self) -> Sequence[str]:
        return await self._read(lambda connection: list(connection.execute(_PACKAGE_SETS).scalars()))

    async def package_set_lost(self, digest: str) -> int:
        again = update(sessions).where(sessions.c.package_set == digest).values(PENDING)
        return await self._write(lambda connection: connection.execute(again).rowcount)
