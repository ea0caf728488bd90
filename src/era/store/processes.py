"""Records of processes beside runs: begun, ended, listed, dropped; and the names of contexts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, literal_column, select, update

from era.core.models import Claim, OwnedId, Session, now
from era.core.process import KEPT, ProcessRecord
from era.errors import NoProcess, NotFound
from era.store.engine.dialects import insert_if_absent
from era.store.engine.tables import contexts, has_status, processes
from era.store.homes import check_home
from era.store.idempotency import answer_claim, claim_key, free_key
from era.store.rows import Rows, writes
from era.store.session_lookup import note_call, read_session, session_with_key

LOST = "The service stopped while this process ran."

_SHOWN = (
    "id",
    "session_key",
    "command",
    "started_at",
    "status",
    "tag",
    "pid",
    "stdin",
    "pty",
    "ended_at",
    "exit_code",
    "signal",
    "reason",
    "output_bytes",
)
_KEPT_COLUMNS = (*_SHOWN, "tail")
_COLUMNS = [processes.c[name] for name in _SHOWN]
_OF_SESSION = select(*_COLUMNS).where(processes.c.session_key == bindparam("session")).order_by(processes.c.key.desc())
_NAMED = (
    select(*_COLUMNS, processes.c.tail)
    .where(
        processes.c.session_key == bindparam("session"),
        (processes.c.id == bindparam("name")) | (processes.c.tag == bindparam("name")),
    )
    .order_by((processes.c.id == bindparam("name")).desc(), processes.c.key.desc())
    .limit(1)
)
_IS_THERE = select(processes.c.key).where(processes.c.id == bindparam("process"))
_FINISH = update(processes).where(processes.c.id == bindparam("process"), has_status(processes, "running"))
_ENDED = (processes.c.session_key == bindparam("session")) & (processes.c.status != "running")
_TOO_OLD = (
    select(processes.c.key)
    .where(_ENDED)
    .order_by(processes.c.key.desc())
    .limit(1)
    .offset(literal_column(str(KEPT)))
    .scalar_subquery()
)
_PRUNE = delete(processes).where(_ENDED, processes.c.key <= _TOO_OLD)
_MARK_LOST = (
    update(processes)
    .where(has_status(processes, "running"))
    .values(status="lost", ended_at=bindparam("at"), reason=LOST)
)


class ProcessRows(Rows):
    async def begin_process(self, record: ProcessRecord, claim: Claim | None = None) -> None:
        await self.database.write_once(_begin, record, claim, patient=False, syncs=claim is not None)

    @writes
    def end_process(self, connection: Connection, record: ProcessRecord, freed: Claim | None = None) -> None:
        check_home(connection, record.session_key, goes_on=True)
        if not connection.execute(_FINISH.values(_values(record)), {"process": record.id}).rowcount:
            return  # It never was on record, or an earlier try was committed: its key may be another request's by now.
        if freed is not None:
            free_key(connection, freed, record.session_key)
        connection.execute(_PRUNE, {"session": record.session_key})
        note_call(connection, record.session_key, now())

    async def processes(self, session_id: OwnedId) -> Sequence[ProcessRecord]:
        def job(connection: Connection, session: Session) -> Sequence[ProcessRecord]:
            return [_record(row) for row in connection.execute(_OF_SESSION, {"session": session.key})]

        return await read_session(self.database, self.retention, session_id, job)

    async def process(self, session_id: OwnedId, name: str) -> ProcessRecord:
        def job(connection: Connection, session: Session) -> ProcessRecord:
            row = connection.execute(_NAMED, {"session": session.key, "name": name}).one_or_none()
            if row is None:
                raise NoProcess(f"Session '{session_id}' has no process '{name[:80]}' on record.")
            return _record(row)

        return await read_session(self.database, self.retention, session_id, job)

    @writes
    def mark_processes_lost(self, connection: Connection) -> int:
        return connection.execute(_MARK_LOST, {"at": now()}).rowcount

    @writes
    def note_context(self, connection: Connection, session_key: int, name: str) -> bool:
        check_home(connection, session_key)
        return not insert_if_absent(connection, contexts, {"session_key": session_key, "name": name})

    @writes
    def forget_context(self, connection: Connection, session_key: int, name: str) -> bool:
        check_home(connection, session_key)
        return connection.execute(delete(contexts).filter_by(session_key=session_key, name=name)).rowcount > 0


def _begin(connection: Connection, record: ProcessRecord, claim: Claim | None, *, again: bool) -> None:
    """Record a process. See Database.write_once for `again`: where an earlier try hasn't ended yet, the insert waits
    for it."""
    session = session_with_key(connection, record.session_key)
    check_home(connection, record.session_key)
    if again and connection.execute(_IS_THERE, {"process": record.id}).first() is not None:
        return
    if session.deleted_at is not None:
        raise NotFound(f"Session '{session.id}' was deleted meanwhile.")
    connection.execute(insert(processes).values(_values(record)))
    if claim is not None:
        claim_key(connection, claim, session)
        answer_claim(connection, claim, session, json.dumps(record.id))


def _values(record: ProcessRecord) -> dict[str, Any]:
    values = {name: getattr(record, name) for name in _KEPT_COLUMNS}
    return {**values, "command": json.dumps(record.command)}


def _record(row: Any) -> ProcessRecord:
    values = dict(row._mapping)
    values["command"] = json.loads(values["command"])
    return ProcessRecord(**values)
