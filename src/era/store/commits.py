"""What all rows hang on: finding a session, and making its next version.

A session's data and snapshot stand in its newest row of `versions` and nowhere else. `_next_version` is the one way
to a new one; each statement of it is on the path of every run, so they are compiled once and skip SQLAlchemy's
execution.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import Connection, bindparam, delete, exists, insert, select, update

from era.core.expiry import MICROS, is_due, wants_touch
from era.core.metadata import Retention
from era.core.models import EMPTY, Cause, OwnedId, Session, Snapshot, StoredCode, Version, VersionContent, now
from era.errors import EraError, Expired, NotFound
from era.store.database import Database
from era.store.tables import runs, sessions, versions

_FIELDS = (
    "key",
    "id",
    "owner",
    "language",
    "persistent",
    "allow_internet",
    "allow_public",
    "default_timeout",
    "version",
    "created_at",
    "updated_at",
    "last_run_at",
    "ttl",
    "expires_at",
    "deleted_at",
    "expired",
    "isolation",
    "setup",
    "setup_status",
    "setup_result",
    "package_set",
    "setup_lock",
    "storage",
)
SESSIONS = select(
    *(sessions.c[name] for name in _FIELDS),
    sessions.c.metadata,
    sessions.c.limits,
    sessions.c.egress,
    sessions.c.service,
    sessions.c.code,
    sessions.c.code_description,
    sessions.c.code_updated_at,
    versions.c.snapshot_root,
    versions.c.file_count,
    versions.c.total_bytes,
    versions.c.data,
).join_from(sessions, versions, (versions.c.session_key == sessions.c.key) & (versions.c.n == sessions.c.version))
"""Sessions with the content of their version, as `session_of` reads them."""

VERSIONS = select(
    versions.c.n,
    versions.c.created_at,
    versions.c.cause,
    versions.c.run_id,
    versions.c.snapshot_root,
    versions.c.file_count,
    versions.c.total_bytes,
).where(versions.c.session_key == bindparam("session"))
"""A session's versions without their data, as `version_of` reads them."""

IS_LIVE = sessions.c.deleted_at.is_(None)

EXPIRES_AT = bindparam("at", type_=sessions.c.expires_at.type) + sessions.c.ttl * MICROS
"""When a session expires that is called at `:at`; NULL where it never does."""

OF_OWNER = (sessions.c.id == bindparam("session_id")) & (sessions.c.owner == bindparam("owner"))
_LIVE_BY_ID = SESSIONS.where(OF_OWNER, IS_LIVE)
_ANYBODYS = SESSIONS.where(sessions.c.id == bindparam("session_id"), IS_LIVE)
_VERSION = VERSIONS.add_columns(versions.c.data).where(versions.c.n == bindparam("number"))
_BY_KEY = SESSIONS.where(sessions.c.key == bindparam("session"))

_TOUCH = update(sessions).where(sessions.c.key == bindparam("session"), IS_LIVE).values(expires_at=EXPIRES_AT)
HAS_RUN_UNDER_WAY = exists().where(runs.c.session_key == sessions.c.key, runs.c.status == "running")
_IS_RUNNING = select(sessions.c.key).where(sessions.c.key == bindparam("session"), HAS_RUN_UNDER_WAY)
_NEWEST_GONE_OF_ANYBODY = (
    select(sessions.c.key, sessions.c.expired)
    .where(sessions.c.id == bindparam("session_id"), ~IS_LIVE, sessions.c.deleted_at > bindparam("since"))
    .order_by(sessions.c.key.desc())
    .limit(1)
)
_NEWEST_GONE = _NEWEST_GONE_OF_ANYBODY.where(OF_OWNER)
_STEP = (
    update(sessions)
    .where(sessions.c.key == bindparam("session"), IS_LIVE)
    .values(version=sessions.c.version + 1, updated_at=bindparam("at"), expires_at=EXPIRES_AT)
    .returning(sessions.c.version)
)
_STEP_OF_RUN = _STEP.values(last_run_at=bindparam("at"))
_SNAPSHOT_COLUMNS = ("snapshot_root", "file_count", "total_bytes")
_PRUNE = delete(versions).where(versions.c.session_key == bindparam("session"), versions.c.n <= bindparam("last"))


def _new_version(*, data: bool, snapshot: bool) -> Any:
    """The statement that adds a version; what isn't given is taken from the one before."""
    given = {"session_key", "n", "created_at", "cause", "run_id"}
    given |= {"data"} if data else set()
    given |= set(_SNAPSHOT_COLUMNS) if snapshot else set()
    values = {
        column.name: bindparam(f"new_{column.name}", type_=column.type) if column.name in given else column
        for column in versions.c
    }
    if data and snapshot:
        return insert(versions).values(values).inline()
    before = (versions.c.session_key == bindparam("new_session_key")) & (versions.c.n == bindparam("n_before"))
    return insert(versions).from_select(list(values), select(*values.values()).where(before))


class Commits(Database):
    """Finds sessions and commits versions, inside the jobs of the classes that build on it."""

    def __init__(self, url: str, retention: Retention = Retention()) -> None:  # noqa: B008 - it is frozen
        super().__init__(url, retention)
        self._live_by_id = self._prepared(_LIVE_BY_ID)
        self._anybodys = self._prepared(_ANYBODYS)
        self._by_key = self._prepared(_BY_KEY)
        self._step = self._prepared(_STEP)
        self._step_of_run = self._prepared(_STEP_OF_RUN)
        self._prune = self._prepared(_PRUNE)
        self._new_version = {
            (data, snapshot): self._prepared(_new_version(data=data, snapshot=snapshot))
            for data in (False, True)
            for snapshot in (False, True)
        }

    def _live(self, connection: Connection, session_id: OwnedId) -> Session:
        """Raises NotFound or Expired."""
        row = self._live_by_id.one(connection, values_of(session_id))
        if row is None:
            raise self._missing(connection, session_id)
        return self._not_over(connection, session_of(row))

    def _live_of_anybody(self, connection: Connection, session_id: str) -> Session:
        """Raises NotFound or Expired."""
        session = self._taken(connection, session_id)
        if session is None:
            values = {"session_id": session_id, "since": self._since()}
            gone = connection.execute(_NEWEST_GONE_OF_ANYBODY, values).one_or_none()
            raise _expired(session_id) if gone is not None and gone.expired else _none(session_id)
        return self._not_over(connection, session)

    def _not_over(self, connection: Connection, session: Session) -> Session:
        """Raises Expired."""
        if self._is_over(connection, session, now()):
            raise _expired(session.id)
        return session

    def _taken(self, connection: Connection, session_id: str) -> Session | None:
        """The session that has this id, whoever's it is, and though it may have expired."""
        row = self._anybodys.one(connection, {"session_id": session_id})
        return None if row is None else session_of(row)

    async def _read_live[T](self, session_id: OwnedId, job: Callable[[Connection, Session], T]) -> T:
        """A read of a session, noted as a call if that is due."""
        return await self._read_found(lambda connection: self._live(connection, session_id), job)

    async def _read_found[T](self, find: Callable[[Connection], Session], job: Callable[[Connection, Session], T]) -> T:
        def read(connection: Connection) -> tuple[Session, T]:
            session = find(connection)
            return session, job(connection, session)

        session, found = await self._read(read)
        if not wants_touch(session, now()):
            return found

        def touch(connection: Connection) -> tuple[Session, T]:
            connection.execute(_TOUCH, {"session": session.key, "at": now()})
            return read(connection)

        return (await self._write(touch))[1]

    def _is_over(self, connection: Connection, session: Session, at: int) -> bool:
        """Whether a session has expired, marked or not."""
        if not is_due(session, at):
            return False
        return connection.execute(_IS_RUNNING, {"session": session.key}).first() is None

    def _missing(self, connection: Connection, session_id: OwnedId) -> EraError:
        gone = self._newest_gone(connection, session_id)
        if gone is None:
            return _none(session_id.id)
        if gone.expired:
            return _expired(session_id.id)
        return NotFound(
            f"There is no session '{session_id}'.",
            hint="It was deleted. POST /api/sessions/{id}/restore brings it back.",
        )

    def _newest_gone(self, connection: Connection, session_id: OwnedId) -> Any:
        """`key` and `expired` of the session that was last gone from this id and can be restored, or None."""
        return connection.execute(_NEWEST_GONE, values_of(session_id) | {"since": self._since()}).one_or_none()

    def _since(self) -> int:
        """When the sessions were gone that can be restored."""
        return now() - int(self._retention.grace_seconds * MICROS)

    def _of_key(self, connection: Connection, key: int) -> Session:
        return session_of(self._by_key.one(connection, {"session": key}))

    def _content(self, connection: Connection, session: Session, n: int) -> VersionContent:
        """Version `n` of a session. Raises NotFound where it isn't kept."""
        row = connection.execute(_VERSION, {"session": session.key, "number": n}).one_or_none()
        if row is None:
            raise self._no_version(session, n)
        *header, data = row
        return VersionContent(version_of(header), data)

    def _no_version(self, session: Session, n: int) -> NotFound:
        if not 0 < n <= session.version:
            return NotFound(
                f"Session '{session.id}' has no version {n}.",
                hint="GET /api/sessions/{id}/versions lists those there are.",
                code="no_such_version",
            )
        return NotFound(
            f"Version {n} of session '{session.id}' is no longer kept.",
            hint=f"The newest {self._retention.versions} versions of a session are kept (ERA_VERSIONS_KEPT).",
            code="version_gone",
        )

    def _next_version(
        self,
        connection: Connection,
        session_key: int,
        cause: Cause,
        at: int,
        *,
        data: str | None,
        snapshot: Snapshot | None,
        run_id: str | None = None,
    ) -> int | None:
        """Add a version, drop what is too old; its number, or None where the session is gone."""
        step = self._step if run_id is None else self._step_of_run
        row = step.one(connection, {"session": session_key, "at": at})
        if row is None:
            return None
        n: int = row[0]
        self._add_version(connection, session_key, n, cause, at, data=data, snapshot=snapshot, run_id=run_id)
        if n > self._retention.versions:
            self._prune.count(connection, {"session": session_key, "last": n - self._retention.versions})
        return n

    def _add_version(
        self,
        connection: Connection,
        session_key: int,
        n: int,
        cause: Cause,
        at: int,
        *,
        data: str | None,
        snapshot: Snapshot | None,
        run_id: str | None = None,
    ) -> None:
        values: dict[str, Any] = {
            "new_session_key": session_key,
            "new_n": n,
            "new_created_at": at,
            "new_cause": cause,
            "new_run_id": run_id,
            "n_before": n - 1,
        }
        if data is not None:
            values["new_data"] = data
        if snapshot is not None:
            values["new_snapshot_root"] = snapshot.root
            values["new_file_count"] = snapshot.file_count
            values["new_total_bytes"] = snapshot.total_bytes
        self._new_version[data is not None, snapshot is not None].count(connection, values)


def values_of(session_id: OwnedId) -> dict[str, Any]:
    """What `OF_OWNER` is to be given."""
    return {"session_id": session_id.id, "owner": session_id.owner}


def session_of(row: Iterable[Any]) -> Session:
    """A row of `SESSIONS`."""
    columns = iter(row)
    values = {name: next(columns) for name in _FIELDS}
    metadata, limits, egress, service, code, description, code_updated_at, root, file_count, total_bytes, data = columns
    for name in ("persistent", "allow_internet", "allow_public", "expired", "storage"):
        values[name] = bool(values[name])
    return Session(
        **values,
        metadata=json.loads(metadata),
        limits=json.loads(limits),
        egress=json.loads(egress),
        service=service and json.loads(service),
        stored=None if code is None else StoredCode(code, description, code_updated_at),
        snapshot=snapshot_of(root, file_count, total_bytes),
        data=data,
    )


def version_of(row: Iterable[Any]) -> Version:
    """A row of `VERSIONS`."""
    n, created_at, cause, run_id, *snapshot = row
    return Version(n, created_at, cause, run_id, snapshot_of(*snapshot))


def snapshot_of(root: str | None, file_count: int, total_bytes: int) -> Snapshot:
    return EMPTY if root is None else Snapshot(root, file_count, total_bytes)


def _none(session_id: str) -> NotFound:
    return NotFound(f"There is no session '{session_id}'.")


def _expired(session_id: str) -> Expired:
    return Expired(f"Session '{session_id}' has expired.")
