"""Records of runs: begun, ended together with the state they leave, listed, dropped.

`begin_run` and `end_run` are on the path of every run, so their statements are precompiled. Of the 0.35 ms that each
takes, half is the commit's fsync and a third the way to the thread and back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Select, bindparam, delete, func, insert, select, update

from era.core.execution.run_messages import setup_error
from era.core.metadata import RunFilter
from era.core.models import (
    Answered,
    Claim,
    JsonObject,
    KeptOutputs,
    OwnedId,
    RecordedProgram,
    RunRecord,
    Session,
    Snapshot,
    Trim,
    Use,
    no_program,
    now,
)
from era.core.setup.setups import UNDER_WAY
from era.errors import CommitFailed, Conflict, NotFound, SessionDeleted, SetupUnderWay, Unavailable
from era.store.engine.database import DatabaseAway
from era.store.engine.dialects import Asked, Precompiled, together, violates_unique
from era.store.engine.tables import has_status, outputs, runs, sessions
from era.store.engine.tables import idempotency_keys as keys
from era.store.homes import check_home
from era.store.idempotency import ClaimRows, answering_run, bytes_of, claiming, raising_if_claimed
from era.store.outputs import NEWEST_TOO_OLD, keeping_outputs, outputs_of_run
from era.store.records import LISTED_RUNS, RUN_FIELDS, RUNS, listed_from_row, record_from_row, without_nul
from era.store.rows import GROWN, reads, writes
from era.store.session_lookup import EXPIRES_AT, IS_PRESENT, find_session, read_session
from era.store.usage import adding, begin_use, count_lost
from era.store.versions import adding_version, incrementing, prune_kinds, pruning, trim_history
from era.store.webhooks import tell, tell_lost

DELETED = "the session was deleted while this run was under way"
LOST = "the service stopped while this run was under way"
OUTCOME_UNKNOWN = "Once the database is back, GET /api/sessions/{id}/runs/{run_id} tells; the session is as that says."

_PRUNED_AT_ONCE = 500
"""Records dropped in one transaction: few, since others want to write, too."""

_LAST_KEY = (1 << 63) - 1

_FROM_THE_BEGINNING = ("key", "id", "session_key", "code", "invocation")
"""Columns that a run's end leaves as its begin wrote them."""

_insert = Precompiled(
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
        setup_error=bindparam("setup_error"),
        code=bindparam("code"),
        invocation=bindparam("invocation"),
    )
    .inline()  # The new key isn't wanted.
)
_finish = Precompiled(
    update(runs)
    .where(runs.c.id == bindparam("run_id"), runs.c.status == "running")  # not one that counts as lost by now
    .values({name: bindparam(f"new_{name}") for name in RUN_FIELDS if name not in _FROM_THE_BEGINNING})
    .returning(runs.c.key)
)
_note_run = Precompiled(
    update(sessions)
    .where(sessions.c.key == bindparam("session"), IS_PRESENT)
    .values(last_run_at=bindparam("at"), expires_at=EXPIRES_AT)
    .returning(sessions.c.version)
)
_NEWEST = (
    LISTED_RUNS.where(runs.c.session_key == bindparam("session"), runs.c.key < bindparam("before"))
    .order_by(runs.c.key.desc())
    .limit(bindparam("how_many"))
)
_RUN = RUNS.where(runs.c.session_key == bindparam("session"), runs.c.id == bindparam("run_id"))
_BY_ID = RUNS.where(runs.c.id == bindparam("run_id"))
_IS_RUNNING = has_status(runs, "running")
_RUNNING = _RUN.where(_IS_RUNNING)
_MARK_LOST = update(runs).where(_IS_RUNNING).values(status="lost", ended_at=bindparam("at"), reason=LOST)
_COUNTS = select(runs.c.status, func.count()).where(~runs.c.imported).group_by(runs.c.status)
_HAVE_TOO_MANY = select(runs.c.session_key).group_by(runs.c.session_key).having(func.count() > bindparam("kept"))
_TOO_OLD = (
    select(runs.c.key)
    .where(
        runs.c.session_key == bindparam("session"),
        runs.c.key <= NEWEST_TOO_OLD,
        runs.c.status != "running",
        # The record of a run is part of the answer to its idempotency key, for as long as that is kept.
        runs.c.id.not_in(
            select(keys.c.run_id).where(
                keys.c.session_key == bindparam("session"),
                keys.c.run_id.is_not(None),
                keys.c.answer.is_(None) | (keys.c.answer != ""),
            )
        ),
    )
    .order_by(runs.c.key)
    .limit(bindparam("how_many"))
)
_DROP = delete(runs).where(runs.c.key.in_(bindparam("run_keys", expanding=True)))
_DROP_OUTPUTS = delete(outputs).where(
    outputs.c.session_key == bindparam("session"), outputs.c.run_key.in_(bindparam("run_keys", expanding=True))
)


class NotRunning(CommitFailed):
    """The run was never begun, or has ended; what its end was to write is not written."""


class RunRows(ClaimRows):
    async def begin_run(
        self,
        session_id: OwnedId,
        run_id: str,
        claim: Claim | None = None,
        *,
        program: Callable[[Session], RecordedProgram] = no_program,
        durably: bool = True,
        known: Callable[[Session], object] | None = None,
    ) -> Session:
        return await self.database.write_once(
            self._begin, session_id, run_id, claim, program, syncs=durably, patient=False, known=known
        )

    def _begin(
        self,
        connection: Connection,
        session_id: OwnedId,
        run_id: str,
        claim: Claim | None,
        program: Callable[[Session], RecordedProgram],
        *,
        again: bool,
    ) -> Session:
        """Begin a run. See Database.write_once for `again`: where an earlier try hasn't ended yet, the insert waits for
        it."""
        session = find_session(connection, self.retention, session_id)
        if again or session.setup_status in UNDER_WAY:
            check_home(connection, session.key)
        if session.setup_status in UNDER_WAY:
            raise SetupUnderWay(f"The setup of session '{session_id}' is under way.")
        if again and connection.execute(_RUNNING, {"session": session.key, "run_id": run_id}).first() is not None:
            return session
        try:
            with raising_if_claimed():
                begun = (_insert, _begun(run_id, session, program(session)))
                check_home(connection, session.key, begun, *claiming(claim, session, run_id=run_id))
        except Exception as error:
            if violates_unique(error, runs) and not again:
                raise Conflict(f"Run '{run_id}' already exists.", hint="Run ids are used once.") from None
            raise
        return session

    async def end_run(
        self,
        record: RunRecord,
        *,
        data: str | None,
        snapshot: Snapshot | None,
        outputs: KeptOutputs | None = None,
        answered: Answered | None = None,
        trim: Trim | None = None,
        who: OwnedId | None = None,
        use: Use | None = None,
    ) -> RunRecord:
        try:
            async with self.reporting_quotas():
                ended: RunRecord | None = await self.database.write_once(
                    self._end_within_quotas,
                    record,
                    patient=True,
                    who=who,
                    data=data,
                    snapshot=snapshot,
                    outputs=outputs,
                    answered=answered,
                    trim=trim,
                    use=use,
                )
        except CommitFailed:
            raise
        except DatabaseAway as error:
            if not error.may_have_committed:
                raise CommitFailed("the run ended, but its result could not be stored") from error
            raise CommitFailed(
                "the run ended, but whether its result was stored is not known", hint=OUTCOME_UNKNOWN
            ) from error
        except Unavailable as error:
            raise CommitFailed("the run ended, but its result could not be stored") from error
        if ended is None:
            raise SessionDeleted(DELETED)
        if answered is not None and answered.data is not None:
            added = bytes_of(answered.data, answered.outputs)
            await self.bound_answers(answered.claim, record.session_key, added)
        return ended

    def _end_within_quotas(
        self, connection: Connection, record: RunRecord, *, who: OwnedId | None, snapshot: Snapshot | None, **rest: Any
    ) -> RunRecord | None:
        """Raises Passed, and what `_end` does."""
        names = () if snapshot is None else GROWN
        with self.bounded(connection, who, "" if who is None else who.id, *names):
            return self._end(connection, record, who=who, snapshot=snapshot, **rest)

    def _end(
        self,
        connection: Connection,
        record: RunRecord,
        *,
        who: OwnedId | None,
        data: str | None,
        snapshot: Snapshot | None,
        outputs: KeptOutputs | None,
        answered: Answered | None,
        trim: Trim | None,
        use: Use | None,
        again: bool,
    ) -> RunRecord | None:
        """End a run; None where the session isn't present: then the run's record is all that is written. See
        Database.write_once for `again`.

        Raises NotRunning where the run was never begun, has ended or counts as lost, Fenced where the session has
        another home.
        """
        if again and (stored := _stored_end(connection, record)) is not None:
            return None if stored.reason == DELETED else stored
        key, at = record.session_key, record.ended_at or now()
        is_new = record.committed and (data is not None or snapshot is not None)
        counting = incrementing(key, at, snapshot, of_run=True) if is_new else (_note_run, {"session": key, "at": at})
        counted, *used = check_home(
            connection, key, counting, *([] if use is None else [adding(connection, use)]), goes_on=True
        )
        if use is not None:
            begin_use(connection, use, used[0])
        version: int | None = counted.row and counted.row[0]
        ended = replace(record, version=version)
        adds: Sequence[Asked] = ()
        prunes: Sequence[Asked] = ()
        if version is None:
            ended = replace(ended, committed=False, reason=DELETED)
        elif is_new:
            adds = (adding_version(key, version, "run", at, data=data, snapshot=snapshot, run_id=record.id),)
            prunes = pruning(self.retention, key, version)
        if version is not None and trim is not None:
            together(connection, *adds)
            adds = ()
            ended = replace(ended, versions_dropped=trim_history(connection, key, trim))
        keeps: Sequence[Asked] = ()
        if version is not None:
            answering = answering_run(key, answered, _bytes_of(ended))
            keeps = (*keeping_outputs(self.retention, key, record.id, outputs), *answering)
        finish = (_finish, _finish_values(ended))
        finished, *others = together(connection, *adds, finish, *prunes, *keeps)[len(adds) :]
        if prunes and others[0].row is not None:
            prune_kinds(connection, self.retention, key)
        if who is not None and finished.row is not None:
            tell(connection, who.owner, "run.ended", _told(who.id, ended))
        if version is None:
            if finished.row is None and _stored_end(connection, record) is not None:
                raise SessionDeleted(DELETED)  # by an earlier call, which has counted its use
            return None  # The record stays, for the session may be restored.
        if finished.row is None:
            raise NotRunning(f"run {record.id!r} was never begun or has ended")
        return replace(ended, key=finished.row[0])

    @reads
    def runs(
        self, connection: Connection, session_key: int, limit: int, before: int | None = None
    ) -> Sequence[RunRecord]:
        values = {"session": session_key, "before": _LAST_KEY if before is None else before, "how_many": limit}
        return [listed_from_row(row) for row in connection.execute(_NEWEST, values)]

    async def runs_of_owner(self, which: RunFilter) -> Sequence[tuple[str, RunRecord]]:
        return await self.database.read_for(which.owner, list_runs_of_owner, which)

    async def run(self, session_id: OwnedId, run_id: str) -> tuple[RunRecord, KeptOutputs | None]:
        def job(connection: Connection, session: Session) -> tuple[RunRecord, KeptOutputs | None]:
            row = connection.execute(_RUN, {"session": session.key, "run_id": run_id}).one_or_none()
            if row is None:
                raise NotFound(
                    f"Session '{session.id}' has had no run '{run_id[:80]}'.",
                    hint="GET /api/sessions/{id}/runs lists those it has had.",
                    code="no_such_run",
                )
            record = record_from_row(row)
            return record, outputs_of_run(connection, session.key, record.key)

        return await read_session(self.database, self.retention, session_id, job)

    @reads
    def run_of_any(self, connection: Connection, run_id: str) -> RunRecord | None:
        return _find(connection, run_id)

    @writes
    def mark_lost(self, connection: Connection) -> int:
        tell_lost(connection, _IS_RUNNING)
        count_lost(connection, _IS_RUNNING)
        return connection.execute(_MARK_LOST, {"at": now()}).rowcount

    async def prune_runs(self) -> int:
        removed = 0
        for session_key in await self._sessions_with_too_many():
            while count := await self._prune_some(session_key):
                removed += count
        return removed

    @reads
    def _sessions_with_too_many(self, connection: Connection) -> Sequence[int]:
        return list(connection.execute(_HAVE_TOO_MANY, {"kept": self.retention.runs}).scalars())

    @writes
    def _prune_some(self, connection: Connection, session_key: int) -> int:
        """Drop some of the records that are too many for a session, with their outputs; how many went."""
        values = {"session": session_key, "kept": self.retention.runs, "how_many": _PRUNED_AT_ONCE}
        run_keys = list(connection.execute(_TOO_OLD, values).scalars())
        if run_keys:
            connection.execute(_DROP_OUTPUTS, {"session": session_key, "run_keys": run_keys})
            connection.execute(_DROP, {"run_keys": run_keys})
        return len(run_keys)


def _find(connection: Connection, run_id: str) -> RunRecord | None:
    row = connection.execute(_BY_ID, {"run_id": run_id}).one_or_none()
    return None if row is None else record_from_row(row)


def _begun(run_id: str, session: Session, program: RecordedProgram) -> dict[str, Any]:
    """The parameters of `_insert`."""
    return {
        "run_id": run_id,
        "session": session.key,
        "at": now(),
        "setup_error": setup_error(session),
        "code": without_nul(program.code),
        "invocation": json.dumps(program.invocation),
    }


def _bytes_of(record: RunRecord) -> int:
    """What a record takes that may be long of it."""
    long = (record.egress, record.artifacts, record.reason, record.code, record.invocation)
    return sum(len(str(part)) for part in long if part)


def _stored_end(connection: Connection, record: RunRecord) -> RunRecord | None:
    """The record of this run if an earlier try to end it was committed. A try that hasn't ended yet holds what the next
    statements want to write, so they wait for it and then have the whole transaction run again."""
    stored = _find(connection, record.id)
    if stored is None or (stored.status, stored.ended_at) != (record.status, record.ended_at):
        return None
    return stored


def _finish_values(record: RunRecord) -> dict[str, Any]:
    """The parameters of `_finish`."""
    return {
        "run_id": record.id,
        "new_status": record.status,
        "new_started_at": record.started_at,
        "new_ended_at": record.ended_at,
        "new_exit_code": record.exit_code,
        "new_duration_us": record.duration_us,
        "new_stdout_bytes": record.stdout_bytes,
        "new_stderr_bytes": record.stderr_bytes,
        "new_stdout_truncated": record.stdout_truncated,
        "new_stderr_truncated": record.stderr_truncated,
        "new_committed": record.committed,
        "new_reason": without_nul(record.reason),
        "new_version": record.version,
        "new_peak_memory_bytes": record.peak_memory_bytes,
        "new_cpu_us": record.cpu_us,
        "new_reaped": record.reaped,
        "new_enforced": json.dumps(record.enforced),
        "new_egress": json.dumps(record.egress),
        "new_artifacts": json.dumps(record.artifacts),
        "new_versions_dropped": record.versions_dropped,
        "new_pieces": record.pieces,
        "new_setup_error": record.setup_error,
    }


_FEW_SESSIONS = 1000
"""Of an owner, whose runs are at most some hundred thousand then, and mostly far fewer."""

_LOOKED_THROUGH = 20_000
"""Of the newest runs of all owners, for those of one who has many sessions."""


def list_runs_of_owner(connection: Connection, which: RunFilter) -> Sequence[tuple[str, RunRecord]]:
    """List runs, each with the id of its session.

    Of an owner with few sessions, theirs are collected and sorted. Where there are many, the newest runs of all owners
    are looked through first. Where so many of them don't have enough, the owner's are collected: others may have any
    number. Expressions in place of columns keep the database from doing it another way.
    """
    mine = select(sessions.c.key).where(sessions.c.owner == which.owner, IS_PRESENT).limit(_FEW_SESSIONS + 1)
    if which.session_id is not None:
        mine = mine.where(sessions.c.id == which.session_id)
    keys = connection.execute(mine).scalars().all()
    query = LISTED_RUNS.add_columns(sessions.c.id).join(sessions, sessions.c.key == runs.c.session_key)
    query = query.limit(which.limit)
    if which.status == "running":  # Few are, of all that there are.
        query = query.where(runs.c.key.in_(select(runs.c.key).where(_IS_RUNNING)))
    elif which.status is not None:
        query = query.where(runs.c.status + "" == which.status)  # or all owners' with this status would be collected
    if which.since is not None:
        query = query.where(runs.c.started_at >= which.since)
    if which.before_key is not None:
        query = query.where(runs.c.key < which.before_key)
    by_key, collected = query.order_by(runs.c.key.desc()), query.order_by((runs.c.key + 0).desc())
    if len(keys) <= _FEW_SESSIONS:
        ordered = by_key if len(keys) == 1 else collected  # an index has those of one session in order
        return _with_session_ids(connection, ordered.where(runs.c.session_key.in_(keys)))
    of_owner = by_key.where(sessions.c.owner + "" == which.owner, IS_PRESENT)
    if which.status == "running":
        return _with_session_ids(connection, of_owner)
    newest = which.before_key or connection.execute(select(func.max(runs.c.key))).scalar() or 0
    found = _with_session_ids(connection, of_owner.where(runs.c.key >= newest - _LOOKED_THROUGH))
    if len(found) == which.limit:
        return found
    return _with_session_ids(connection, collected.where(sessions.c.owner == which.owner, IS_PRESENT))


def _with_session_ids(connection: Connection, query: Select[Any]) -> Sequence[tuple[str, RunRecord]]:
    return [(session_id, listed_from_row(values)) for *values, session_id in connection.execute(query)]


def _told(session_id: str, record: RunRecord) -> JsonObject:
    """What is told of a run's end."""
    return {
        "run_id": record.id,
        "session_id": session_id,
        "status": record.status,
        "exit_code": record.exit_code,
        "duration_ms": None if record.duration_us is None else record.duration_us // 1000,
        "committed": record.committed,
        "version": record.version,
    }


def count_runs(connection: Connection) -> dict[str, int]:
    """How many runs there were on this server, by status; counted in an index alone."""
    return {row[0]: row[1] for row in connection.execute(_COUNTS)}
