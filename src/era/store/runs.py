"""Records of runs: begun, ended together with the state they leave, listed.

`begin_run` and `end_run` are on the path of every run, so their statements are compiled once and skip SQLAlchemy's
execution. Of the 0.35 ms that each takes, half is the commit's fsync and a third the way to the thread and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from era.core.metadata import Retention
from era.core.models import Answered, Claim, KeptOutputs, OwnedId, RunRecord, Session, Snapshot, now
from era.core.setup.setups import UNDER_WAY
from era.errors import CommitFailed, Conflict, NotFound, SessionDeleted, SetupUnderWay, Unavailable
from era.store import dialects
from era.store.commits import EXPIRES_AT, IS_LIVE
from era.store.idempotency import IdempotencyRows
from era.store.outputs import FIRST_TOO_OLD, OutputRows
from era.store.records import RUN_FIELDS, RUNS, finished, record_of
from era.store.tables import idempotency_keys as keys
from era.store.tables import outputs, runs, sessions

DELETED = "the session was deleted while this run was under way"
LOST = "the service stopped while this run was under way"

_PRUNED_AT_ONCE = 500
"""Records dropped in one transaction: few, since others want to write, too."""

_NEW_RUN = (
    insert(runs)
    .values(
        id=bindparam("run_id"),
        session_key=bindparam("session"),
        status="running",
        started_at=bindparam("at"),
        stdout_bytes=0,
        stderr_bytes=0,
        stdout_truncated=False,
        stderr_truncated=False,
        committed=False,
        enforced="{}",
    )
    .inline()  # Nobody asks for the new key.
)
_NEWEST_RUNS = (
    RUNS.where(runs.c.session_key == bindparam("session"), runs.c.key < bindparam("before"))
    .order_by(runs.c.key.desc())
    .limit(bindparam("how_many"))
)
_LAST_KEY = (1 << 63) - 1
_RUN = RUNS.where(runs.c.session_key == bindparam("session"), runs.c.id == bindparam("run_id"))
_NOT_FINISHED = ("key", "id", "session_key")
_FINISH_RUN = (
    update(runs)
    .where(runs.c.id == bindparam("run_id"))
    .values({name: bindparam(f"new_{name}") for name in RUN_FIELDS if name not in _NOT_FINISHED})
    .returning(runs.c.key)
)
_MARK_LOST = update(runs).where(runs.c.status == "running").values(status="lost", ended_at=bindparam("at"), reason=LOST)
_HAVE_TOO_MANY = select(runs.c.session_key).group_by(runs.c.session_key).having(func.count() > bindparam("kept"))
_TOO_OLD = (
    select(runs.c.key)
    .where(
        runs.c.session_key == bindparam("session"),
        runs.c.key <= FIRST_TOO_OLD,
        runs.c.status != "running",
        # What a request with such a key is answered is in the run's record.
        runs.c.id.not_in(
            select(keys.c.run_id).where(keys.c.session_key == bindparam("session"), keys.c.run_id.is_not(None))
        ),
    )
    .order_by(runs.c.key)
    .limit(_PRUNED_AT_ONCE)
)
_DROP_RUNS = delete(runs).where(runs.c.key.in_(bindparam("run_keys", expanding=True)))
_DROP_OUTPUTS = delete(outputs).where(
    outputs.c.session_key == bindparam("session"), outputs.c.run_key.in_(bindparam("run_keys", expanding=True))
)
_KEEP_STATE = (
    update(sessions)
    .where(sessions.c.key == bindparam("session"), IS_LIVE)
    .values(last_run_at=bindparam("at"), expires_at=EXPIRES_AT)
    .returning(sessions.c.version)
)


class RunRows(OutputRows, IdempotencyRows):
    """The part of SqlStore that deals in runs."""

    def __init__(self, url: str, retention: Retention = Retention()) -> None:  # noqa: B008 - it is frozen
        super().__init__(url, retention)
        self._new_run = self._prepared(_NEW_RUN)
        self._finish_run = self._prepared(_FINISH_RUN)
        self._keep_state = self._prepared(_KEEP_STATE)

    async def begin_run(self, session_id: OwnedId, run_id: str, claim: Claim | None = None) -> Session:
        def job(connection: Connection) -> Session:
            session = self._live(connection, session_id)
            if session.setup_status in UNDER_WAY:
                raise SetupUnderWay(f"The setup of session '{session_id}' is under way.")
            try:
                self._new_run.count(connection, {"run_id": run_id, "session": session.key, "at": now()})
            except self._errors as error:
                if dialects.is_taken(error):
                    raise Conflict(f"Run '{run_id}' already exists.", hint="Run ids are used once.") from None
                raise
            self._claim(connection, claim, session, run_id=run_id)
            return session

        return await self._write(job)

    async def end_run(
        self,
        record: RunRecord,
        *,
        data: str | None,
        snapshot: Snapshot | None,
        outputs: KeptOutputs | None = None,
        answered: Answered | None = None,
    ) -> RunRecord:
        def job(connection: Connection) -> RunRecord | None:
            version = self._end_state(connection, record, data, snapshot)
            ended = replace(record, version=version)
            if version is None:
                ended = replace(ended, committed=False, reason=DELETED)
            row = self._finish_run.one(connection, finished(ended))
            if version is None:
                return None  # What happened stays on record, for the session may be restored.
            if row is None:
                raise CommitFailed(f"run {record.id!r} was never begun")
            self._keep_outputs(connection, record.session_key, row[0], outputs)
            self._answer_run(connection, record.session_key, answered)
            return replace(ended, key=row[0])

        try:
            ended = await self._write(job)
        except CommitFailed:
            raise
        except Unavailable as error:
            raise CommitFailed("the run ended, but its result could not be stored") from error
        if ended is None:
            raise SessionDeleted(DELETED)
        return ended

    async def runs(self, session_key: int, limit: int, before: int | None = None) -> Sequence[RunRecord]:
        values = {"session": session_key, "before": _LAST_KEY if before is None else before, "how_many": limit}
        return await self._read(lambda connection: [record_of(row) for row in connection.execute(_NEWEST_RUNS, values)])

    async def run(self, session_id: OwnedId, run_id: str) -> tuple[RunRecord, KeptOutputs | None]:
        def job(connection: Connection, session: Session) -> tuple[RunRecord, KeptOutputs | None]:
            row = connection.execute(_RUN, {"session": session.key, "run_id": run_id}).one_or_none()
            if row is None:
                raise NotFound(
                    f"Session '{session_id}' has had no run '{run_id[:80]}'.",
                    hint="GET /api/sessions/{id}/runs lists those it has had.",
                    code="no_such_run",
                )
            record = record_of(row)
            return record, self._outputs_of(connection, session.key, record.key)

        return await self._read_live(session_id, job)

    async def mark_lost(self) -> int:
        return await self._write(lambda connection: connection.execute(_MARK_LOST, {"at": now()}).rowcount)

    async def prune_runs(self) -> int:
        values = {"kept": self._retention.runs}
        sessions = await self._read(lambda connection: list(connection.execute(_HAVE_TOO_MANY, values).scalars()))
        removed = 0
        for session in sessions:
            while count := await self._prune_some(session):
                removed += count
        return removed

    async def _prune_some(self, session_key: int) -> int:
        def job(connection: Connection) -> int:
            values = {"session": session_key, "kept": self._retention.runs}
            found = list(connection.execute(_TOO_OLD, values).scalars())
            if found:
                connection.execute(_DROP_OUTPUTS, {"session": session_key, "run_keys": found})
                connection.execute(_DROP_RUNS, {"run_keys": found})
            return len(found)

        return await self._write(job)

    def _end_state(
        self, connection: Connection, record: RunRecord, data: str | None, snapshot: Snapshot | None
    ) -> int | None:
        """Commit what the run leaves; the version in force after it, None where the session is gone."""
        at = record.ended_at or now()
        if record.committed:
            return self._next_version(
                connection, record.session_key, "run", at, data=data, snapshot=snapshot, run_id=record.id
            )
        row = self._keep_state.one(connection, {"session": record.session_key, "at": at})
        return None if row is None else int(row[0])
