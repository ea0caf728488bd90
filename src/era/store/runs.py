"""Records of runs: begun, ended together with the state they leave, listed.

`begin_run` and `end_run` are on the path of every run, so their statements are compiled once and skip SQLAlchemy's
execution. Of the 0.35 ms that each takes, half is the commit's fsync and a third the way to the thread and back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

from sqlalchemy import Connection, bindparam, insert, select, update

from era.core.models import KeptOutputs, RunRecord, Session, Snapshot, now
from era.core.ports import Retention
from era.errors import CommitFailed, Conflict, NotFound, SessionDeleted, Unavailable
from era.store import dialects
from era.store.commits import IS_LIVE
from era.store.outputs import OutputRows
from era.store.tables import runs, sessions

LOST = "the service stopped while this run was under way"

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
_RUN_FIELDS = tuple(field.name for field in fields(RunRecord))
_RUN_COLUMNS = [runs.c[name] for name in _RUN_FIELDS]
_NEWEST_RUNS = (
    select(*_RUN_COLUMNS)
    .where(runs.c.session_key == bindparam("session"), runs.c.key < bindparam("before"))
    .order_by(runs.c.key.desc())
    .limit(bindparam("how_many"))
)
_LAST_KEY = (1 << 63) - 1
_RUN = select(*_RUN_COLUMNS).where(runs.c.session_key == bindparam("session"), runs.c.id == bindparam("run_id"))
_NOT_FINISHED = ("key", "id", "session_key")
_FINISH_RUN = (
    update(runs)
    .where(runs.c.id == bindparam("run_id"))
    .values({name: bindparam(f"new_{name}") for name in _RUN_FIELDS if name not in _NOT_FINISHED})
    .returning(runs.c.key)
)
_MARK_LOST = update(runs).where(runs.c.status == "running").values(status="lost", ended_at=bindparam("at"), reason=LOST)
_KEEP_STATE = (
    update(sessions)
    .where(sessions.c.key == bindparam("session"), IS_LIVE)
    .values(last_run_at=bindparam("at"))
    .returning(sessions.c.version)
)


class RunRows(OutputRows):
    """The part of SqlStore that deals in runs."""

    def __init__(self, url: str, retention: Retention = Retention()) -> None:  # noqa: B008 - it is frozen
        super().__init__(url, retention)
        self._new_run = self._prepared(_NEW_RUN)
        self._finish_run = self._prepared(_FINISH_RUN)
        self._keep_state = self._prepared(_KEEP_STATE)

    async def begin_run(self, session_id: str, run_id: str) -> Session:
        def job(connection: Connection) -> Session:
            session = self._live(connection, session_id)
            try:
                self._new_run.count(connection, {"run_id": run_id, "session": session.key, "at": now()})
            except self._errors as error:
                if dialects.is_taken(error):
                    raise Conflict(f"Run '{run_id}' already exists.", hint="Run ids are used once.") from None
                raise
            return session

        return await self._write(job)

    async def end_run(
        self, record: RunRecord, *, data: str | None, snapshot: Snapshot | None, outputs: KeptOutputs | None = None
    ) -> RunRecord:
        def job(connection: Connection) -> RunRecord:
            version = self._end_state(connection, record, data, snapshot)
            if version is None:
                raise SessionDeleted("the session was deleted while this run was under way")
            ended = replace(record, version=version)
            row = self._finish_run.one(connection, _finished(ended))
            if row is None:
                raise CommitFailed(f"run {record.id!r} was never begun")
            self._keep_outputs(connection, record.session_key, row[0], outputs)
            return replace(ended, key=row[0])

        try:
            return await self._write(job)
        except CommitFailed:
            raise
        except Unavailable as error:
            raise CommitFailed("the run ended, but its result could not be stored") from error

    async def runs(self, session_key: int, limit: int, before: int | None = None) -> Sequence[RunRecord]:
        values = {"session": session_key, "before": _LAST_KEY if before is None else before, "how_many": limit}
        return await self._read(lambda connection: [_run(row) for row in connection.execute(_NEWEST_RUNS, values)])

    async def run(self, session_id: str, run_id: str) -> tuple[RunRecord, KeptOutputs | None]:
        def job(connection: Connection) -> tuple[RunRecord, KeptOutputs | None]:
            session = self._live(connection, session_id)
            row = connection.execute(_RUN, {"session": session.key, "run_id": run_id}).one_or_none()
            if row is None:
                raise NotFound(
                    f"Session '{session_id}' has had no run '{run_id[:80]}'.",
                    hint="GET /api/sessions/{id}/runs lists those it has had.",
                    code="no_such_run",
                )
            record = _run(row)
            return record, self._outputs_of(connection, session.key, record.key)

        return await self._read(job)

    async def mark_lost(self) -> int:
        return await self._write(lambda connection: connection.execute(_MARK_LOST, {"at": now()}).rowcount)

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


def _run(row: Iterable[Any]) -> RunRecord:
    values = dict(zip(_RUN_FIELDS, row, strict=True))
    values["enforced"] = json.loads(values["enforced"])
    return RunRecord(**values)


def _finished(record: RunRecord) -> dict[str, Any]:
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
        "new_reason": record.reason,
        "new_version": record.version,
        "new_peak_memory_bytes": record.peak_memory_bytes,
        "new_cpu_us": record.cpu_us,
        "new_reaped": record.reaped,
        "new_enforced": json.dumps(record.enforced),
    }
