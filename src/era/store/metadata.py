"""Rows: sessions and the records of their runs.

Theory of operation. Writes go through one thread and one connection, so they never wait for each other's locks and
SQLite is never asked to arbitrate; reads have a few threads and connections of their own and, thanks to the
write-ahead log, neither block the writer nor are blocked by it. Each public method is one job, and each job is one
transaction: it is durable when the method returns, or an error is raised and nothing of it happened.

`begin_run` and `end_run` are on the path of every run, so their statements are compiled once and skip SQLAlchemy's
execution. Of the 0.35 ms that each takes, half is the commit's fsync and a third the way to the thread and back.

Errors of the database are translated here, at the edge. Their text may hold SQL, so it goes to the log only. The
writer's connection is dropped after each, since what state it is in is anybody's guess.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

from sqlalchemy import Connection, Select, bindparam, delete, func, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from era.core.models import EMPTY, JsonObject, NewSession, RunRecord, Session, Snapshot, StoredCode, now
from era.core.ports import SessionChange, SessionFilter
from era.errors import CommitFailed, Conflict, NotFound, SessionDeleted, Unavailable
from era.store import dialects
from era.store.migrations import upgrade
from era.store.tables import runs, session_pairs, sessions

LOST = "the service stopped while this run was under way"

_log = logging.getLogger(__name__)

_SESSION_BY_ID = select(sessions).where(sessions.c.id == bindparam("session_id"))
_NEW_SESSION = insert(sessions).returning(sessions.c.key)
_NEW_PAIRS = insert(session_pairs)
_DROP_PAIRS = delete(session_pairs).where(session_pairs.c.session_key == bindparam("session"))
_DELETE_SESSION = delete(sessions).where(sessions.c.id == bindparam("session_id")).returning(sessions)
_STORE_CODE = (
    update(sessions)
    .where(sessions.c.id == bindparam("session_id"))
    .values(
        code=bindparam("new_code"),
        code_description=bindparam("new_description"),
        code_updated_at=bindparam("at"),
        updated_at=bindparam("at"),
    )
)
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
    .where(runs.c.session_key == bindparam("session"))
    .order_by(runs.c.key.desc())
    .limit(bindparam("how_many"))
)
_FINISH_RUN = (
    update(runs)
    .where(runs.c.id == bindparam("run_id"))
    .values({name: bindparam(f"new_{name}") for name in _RUN_FIELDS if name not in ("id", "session_key")})
)
_MARK_LOST = update(runs).where(runs.c.status == "running").values(status="lost", ended_at=bindparam("at"), reason=LOST)
_SNAPSHOT_ROOTS = select(sessions.c.snapshot_root).where(sessions.c.snapshot_root.is_not(None)).distinct()
_COUNT_SESSIONS = select(func.count()).select_from(sessions)
_COUNT_RUNS = select(runs.c.status, func.count()).group_by(runs.c.status)

_AFTER_RUN = update(sessions).where(sessions.c.key == bindparam("session")).returning(sessions.c.version)
_KEEP_STATE = _AFTER_RUN.values(last_run_at=bindparam("at"))
_NEXT_VERSION: dict[Any, Any] = {
    "version": sessions.c.version + 1,
    "updated_at": bindparam("at"),
    "last_run_at": bindparam("at"),
}
_NEW_DATA: dict[Any, Any] = {"data": bindparam("new_data")}
_NEW_SNAPSHOT: dict[Any, Any] = {
    name: bindparam(f"new_{name}") for name in ("snapshot_root", "file_count", "total_bytes")
}
# By what the new version brings: (data, snapshot).
_COMMIT = {
    (False, False): _AFTER_RUN.values(_NEXT_VERSION),
    (True, False): _AFTER_RUN.values(_NEXT_VERSION | _NEW_DATA),
    (False, True): _AFTER_RUN.values(_NEXT_VERSION | _NEW_SNAPSHOT),
    (True, True): _AFTER_RUN.values(_NEXT_VERSION | _NEW_DATA | _NEW_SNAPSHOT),
}


class SqlStore:
    """A MetadataStore in an SQL database. `open` before anything, `close` when done."""

    def __init__(self, url: str) -> None:
        self._engines = dialects.connect(url)
        self._errors = (SQLAlchemyError, dialects.driver_error(self._engines.writer))
        self._connection: Connection | None = None
        """The writer thread's own."""

        self._writer = ThreadPoolExecutor(1, thread_name_prefix="era-write")
        self._readers = ThreadPoolExecutor(dialects.READERS, thread_name_prefix="era-read")

        dialect = self._engines.writer.dialect
        self._session_by_id = dialects.Prepared(_SESSION_BY_ID, dialect)
        self._new_run = dialects.Prepared(_NEW_RUN, dialect)
        self._finish_run = dialects.Prepared(_FINISH_RUN, dialect)
        self._keep_state = dialects.Prepared(_KEEP_STATE, dialect)
        self._commit = {brings: dialects.Prepared(statement, dialect) for brings, statement in _COMMIT.items()}

    async def open(self) -> None:
        """Connect and bring the schema up to date."""
        await self._on(self._writer, lambda: upgrade(self._engines.writer))

    async def close(self) -> None:
        """Let what is under way finish, then disconnect."""
        with suppress(RuntimeError):  # Closed before.
            await asyncio.get_running_loop().run_in_executor(self._writer, self._disconnect)
        for executor, engine in ((self._writer, self._engines.writer), (self._readers, self._engines.reader)):
            await asyncio.to_thread(executor.shutdown)
            engine.dispose()

    async def create_session(self, new: NewSession) -> Session:
        at = now()
        values = {
            "id": new.id,
            "language": new.language,
            "persistent": new.persistent,
            "data": new.data,
            "metadata": json.dumps(new.metadata),
            "allow_internet": new.allow_internet,
            "allow_public": new.allow_public,
            "default_timeout": new.default_timeout,
            "version": 1,
            "file_count": 0,
            "total_bytes": 0,
            "created_at": at,
            "updated_at": at,
        }

        def job(connection: Connection) -> Session:
            try:
                key = connection.execute(_NEW_SESSION, values).scalar_one()
            except self._errors as error:
                if dialects.is_taken(error):
                    raise Conflict(f"Session '{new.id}' already exists.") from None
                raise
            _add_pairs(connection, key, new.metadata)
            return Session(
                key=key,
                id=new.id,
                language=new.language,
                persistent=new.persistent,
                data=new.data,
                metadata=new.metadata,
                allow_internet=new.allow_internet,
                allow_public=new.allow_public,
                default_timeout=new.default_timeout,
                stored=None,
                version=1,
                snapshot=EMPTY,
                created_at=at,
                updated_at=at,
                last_run_at=None,
            )

        return await self._write(job)

    async def session(self, session_id: str) -> Session:
        def job(connection: Connection) -> Session:
            row = connection.execute(_SESSION_BY_ID, {"session_id": session_id}).one_or_none()
            if row is None:
                raise _no_session(session_id)
            return _session(row)

        return await self._read(job)

    async def sessions(self, which: SessionFilter) -> Sequence[Session]:
        query = _list_query(which)
        return await self._read(lambda connection: [_session(row) for row in connection.execute(query)])

    async def change_session(self, session_id: str, change: SessionChange) -> Session:
        values: dict[str, Any] = {
            name: value
            for name in ("default_timeout", "allow_internet", "allow_public", "data")
            if (value := getattr(change, name)) is not None
        }
        if change.metadata is not None:
            values["metadata"] = json.dumps(change.metadata)
        if change.data is not None:
            values["version"] = sessions.c.version + 1
        values["updated_at"] = now()
        statement = update(sessions).where(sessions.c.id == session_id).values(values).returning(sessions)

        def job(connection: Connection) -> Session:
            row = connection.execute(statement).one_or_none()
            if row is None:
                raise _no_session(session_id)
            session = _session(row)
            if change.metadata is not None:
                connection.execute(_DROP_PAIRS, {"session": session.key})
                _add_pairs(connection, session.key, change.metadata)
            return session

        return await self._write(job)

    async def store_code(self, session_id: str, code: StoredCode) -> None:
        values = {
            "session_id": session_id,
            "new_code": code.code,
            "new_description": code.description,
            "at": code.updated_at,
        }

        def job(connection: Connection) -> None:
            if connection.execute(_STORE_CODE, values).rowcount == 0:
                raise _no_session(session_id)

        await self._write(job)

    async def delete_session(self, session_id: str) -> Session:
        def job(connection: Connection) -> Session:
            row = connection.execute(_DELETE_SESSION, {"session_id": session_id}).one_or_none()
            if row is None:
                raise _no_session(session_id)
            return _session(row)

        return await self._write(job)

    async def begin_run(self, session_id: str, run_id: str) -> Session:
        def job(connection: Connection) -> Session:
            row = self._session_by_id.one(connection, {"session_id": session_id})
            if row is None:
                raise _no_session(session_id)
            session = _session(row)
            try:
                self._new_run.count(connection, {"run_id": run_id, "session": session.key, "at": now()})
            except self._errors as error:
                if dialects.is_taken(error):
                    raise Conflict(f"Run '{run_id}' already exists.", hint="Run ids are used once.") from None
                raise
            return session

        return await self._write(job)

    async def end_run(self, record: RunRecord, *, data: str | None, snapshot: Snapshot | None) -> RunRecord:
        after: dict[str, Any] = {"session": record.session_key, "at": record.ended_at or now()}
        if not record.committed:
            statement = self._keep_state
        else:
            statement = self._commit[data is not None, snapshot is not None]
            if data is not None:
                after["new_data"] = data
            if snapshot is not None:
                after["new_snapshot_root"] = snapshot.root
                after["new_file_count"] = snapshot.file_count
                after["new_total_bytes"] = snapshot.total_bytes

        def job(connection: Connection) -> RunRecord:
            row = statement.one(connection, after)
            if row is None:
                raise SessionDeleted("the session was deleted while this run was under way")
            ended = replace(record, version=row[0])
            if self._finish_run.count(connection, _finished(ended)) == 0:
                raise CommitFailed(f"run {record.id!r} was never begun")
            return ended

        try:
            return await self._write(job)
        except CommitFailed:
            raise
        except Unavailable as error:
            raise CommitFailed("the run ended, but its result could not be stored") from error

    async def runs(self, session_key: int, limit: int) -> Sequence[RunRecord]:
        values = {"session": session_key, "how_many": limit}
        return await self._read(lambda connection: [_run(row) for row in connection.execute(_NEWEST_RUNS, values)])

    async def mark_lost(self) -> int:
        return await self._write(lambda connection: connection.execute(_MARK_LOST, {"at": now()}).rowcount)

    async def snapshot_roots(self) -> Sequence[str]:
        return await self._read(lambda connection: list(connection.execute(_SNAPSHOT_ROOTS).scalars()))

    async def counts(self) -> dict[str, Any]:
        """`{"sessions": n, "runs": {status: n}}`, both counted in an index alone."""

        def job(connection: Connection) -> dict[str, Any]:
            by_status = {row[0]: row[1] for row in connection.execute(_COUNT_RUNS)}
            return {"sessions": connection.execute(_COUNT_SESSIONS).scalar_one(), "runs": by_status}

        return await self._read(job)

    async def _write[T](self, job: Callable[[Connection], T]) -> T:
        return await self._on(self._writer, lambda: self._in_writer(job))

    async def _read[T](self, job: Callable[[Connection], T]) -> T:
        return await self._on(self._readers, lambda: self._in_reader(job))

    async def _on[T](self, executor: ThreadPoolExecutor, job: Callable[[], T]) -> T:
        try:
            future = asyncio.get_running_loop().run_in_executor(executor, job)
        except RuntimeError as error:  # After `close`.
            raise Unavailable("the service is shutting down") from error
        try:
            return await future
        except self._errors as error:
            _log.error("the database failed: %s", getattr(error, "orig", None) or error)
            raise Unavailable("the database failed") from error

    def _in_writer[T](self, job: Callable[[Connection], T]) -> T:
        if self._connection is None:
            self._connection = self._engines.writer.connect()
        try:
            with self._connection.begin():
                return job(self._connection)
        except self._errors:
            self._disconnect()
            raise

    def _in_reader[T](self, job: Callable[[Connection], T]) -> T:
        with self._engines.reader.begin() as connection:
            return job(connection)

    def _disconnect(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.invalidate()
            connection.close()


def _no_session(session_id: str) -> NotFound:
    return NotFound(f"There is no session '{session_id}'.")


def _list_query(which: SessionFilter) -> Select[Any]:
    query = select(sessions).order_by(sessions.c.key.desc())
    if which.language is not None:
        query = query.where(sessions.c.language == which.language)
    for name, text in (which.metadata or {}).items():
        query = query.where(
            sessions.c.key.in_(select(session_pairs.c.session_key).where(session_pairs.c.pair == _pair(name, text)))
        )
    if which.before_key is not None:
        query = query.where(sessions.c.key < which.before_key)
    if which.limit is not None:
        query = query.limit(which.limit)
    return query


def _add_pairs(connection: Connection, session_key: int, metadata: JsonObject) -> None:
    if metadata:
        pairs = {_pair(name, _filter_text(value)) for name, value in metadata.items()}
        connection.execute(_NEW_PAIRS, [{"session_key": session_key, "pair": pair} for pair in pairs])


def _filter_text(value: object) -> str:
    """What a filter must say to find `value`: a string itself, anything else as JSON writes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _pair(name: str, text: str) -> str:
    return hashlib.sha256(json.dumps([name, text]).encode()).hexdigest()


def _session(row: Iterable[Any]) -> Session:
    (
        key,
        session_id,
        language,
        persistent,
        data,
        metadata,
        allow_internet,
        allow_public,
        default_timeout,
        code,
        code_description,
        code_updated_at,
        version,
        snapshot_root,
        file_count,
        total_bytes,
        created_at,
        updated_at,
        last_run_at,
    ) = row
    return Session(
        key=key,
        id=session_id,
        language=language,
        persistent=bool(persistent),
        data=data,
        metadata=json.loads(metadata),
        allow_internet=bool(allow_internet),
        allow_public=bool(allow_public),
        default_timeout=default_timeout,
        stored=None if code is None else StoredCode(code, code_description, code_updated_at),
        version=version,
        snapshot=EMPTY if snapshot_root is None else Snapshot(snapshot_root, file_count, total_bytes),
        created_at=created_at,
        updated_at=updated_at,
        last_run_at=last_run_at,
    )


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
