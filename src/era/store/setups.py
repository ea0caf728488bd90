"""Setups, which install a session's packages: their status and result, in the session's own row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, func, select, update

from era.core.metadata import SetupJob
from era.core.models import OwnedId, Session, Snapshot, Trim, now
from era.errors import NotFound
from era.store.blobs.condemned import keep_named
from era.store.engine.tables import SETUP_UNDER_WAY, sessions
from era.store.homes import check_home
from era.store.rows import GROWN, Rows, reads, writes
from era.store.session_lookup import IS_PRESENT, find_session, session_with_key
from era.store.versions import next_version, trim_history

PENDING: dict[str, Any] = {"setup_status": "pending", "setup_result": None, "package_set": None}
"""The columns of a session of which another setup has just been asked for."""

_MOST_JOBS = 1000

_UNFINISHED = (
    select(sessions.c.key, sessions.c.owner, sessions.c.id, sessions.c.setup, sessions.c.setup_lock)
    .where(SETUP_UNDER_WAY, IS_PRESENT)
    .order_by(func.row_number().over(partition_by=sessions.c.owner, order_by=sessions.c.key), sessions.c.key)
    .limit(_MOST_JOBS)
)
_IN_FORCE = select(sessions.c.version, sessions.c.setup).where(sessions.c.key == bindparam("session"), IS_PRESENT)
_SET_STATUS = (
    update(sessions)
    .where(sessions.c.key == bindparam("session"), sessions.c.setup == bindparam("job"), SETUP_UNDER_WAY)
    .values(setup_status=bindparam("status"))
)
_FAIL = _SET_STATUS.values(setup_result=bindparam("result"), updated_at=bindparam("at"))
_COMPLETE = _FAIL.values(package_set=bindparam("new_package_set"), setup_lock=None)
PACKAGE_SETS = select(sessions.c.package_set).where(sessions.c.package_set.is_not(None)).distinct()


class SetupRows(Rows):
    @reads
    def unfinished_setups(self, connection: Connection) -> Sequence[SetupJob]:
        rows = connection.execute(_UNFINISHED)
        return [SetupJob(row.key, OwnedId(row.owner, row.id), row.setup, row.setup_lock) for row in rows]

    @writes
    def begin_setup(self, connection: Connection, job: SetupJob) -> bool:
        check_home(connection, job.session_key)
        values = {"session": job.session_key, "job": job.setup, "status": "running"}
        return connection.execute(_SET_STATUS, values).rowcount > 0

    @writes
    def end_setup(
        self,
        connection: Connection,
        job: SetupJob,
        *,
        status: str,
        result: str,
        package_set: str | None,
        left: tuple[int, Snapshot] | None = None,
        trim: Trim | None = None,
    ) -> bool:
        check_home(connection, job.session_key, goes_on=True)
        at = now()
        if left is not None:
            version, snapshot = left
            row = connection.execute(_IN_FORCE, {"session": job.session_key}).one_or_none()
            if row is None or tuple(row) != (version, job.setup):
                return False
            if snapshot != session_with_key(connection, job.session_key).snapshot:
                with self.bounded(connection, job.session_id, job.session_id.id, *GROWN):
                    next_version(connection, self.retention, job.session_key, "setup", at, data=None, snapshot=snapshot)
                trim_history(connection, job.session_key, trim)
        keep_named(connection, package_set)
        values = {"session": job.session_key, "job": job.setup, "status": status, "result": result, "at": at}
        if status == "completed":
            return connection.execute(_COMPLETE, values | {"new_package_set": package_set}).rowcount > 0
        return connection.execute(_FAIL, values).rowcount > 0

    @writes
    def restart_setup(self, connection: Connection, session_id: OwnedId) -> Session:
        session = find_session(connection, self.retention, session_id)
        check_home(connection, session.key)
        if session.setup is None:
            raise NotFound(f"Session '{session_id}' has no setup.")
        # The packages that it has stay until others are there, and where that fails, they stay.
        values = {"setup_status": "pending", "setup_result": None, "updated_at": now()}
        connection.execute(update(sessions).where(sessions.c.key == session.key).values(values))
        return session_with_key(connection, session.key)

    @reads
    def package_sets(self, connection: Connection) -> Sequence[str]:
        return connection.execute(PACKAGE_SETS).scalars().all()

    @writes
    def package_set_lost(self, connection: Connection, digest: str) -> int:
        return connection.execute(update(sessions).where(sessions.c.package_set == digest).values(PENDING)).rowcount
