"""Finding a session's row, and noting that the session was called.

A row is *present* until its session expires or is deleted. Then it is *removed*: `deleted_at` is set, the id is free,
and it can be restored within the grace period. A session whose ttl has gone by counts as expired from that moment on,
though its row may not be marked yet.

The statements on the path of every run are precompiled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Concatenate

from sqlalchemy import Connection, bindparam, exists, select, update

from era.core.metadata import Retention
from era.core.models import MICROS, OwnedId, Session, StoredCode, now
from era.core.sessions.expiry import is_due, wants_touch
from era.errors import EraError, Expired, NoSession, NotFound, SessionMoved
from era.store.engine.database import Database
from era.store.engine.dialects import Answer, Asked, Precompiled, together
from era.store.engine.tables import has_status, homes, hosts, processes, runs, sessions, versions
from era.store.records import snapshot_from_row

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
    "record_code",
    "history_bytes",
)
IN_FORCE = (versions.c.session_key == sessions.c.key) & (versions.c.n == sessions.c.version)
"""Joins a session with its current version."""

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
).join_from(sessions, versions, IN_FORCE)
"""Sessions with the content of their current version, as `session_from_row` reads them."""

IS_PRESENT = sessions.c.deleted_at.is_(None)
OF_OWNER = (sessions.c.id == bindparam("session_id")) & (sessions.c.owner == bindparam("owner"))
IS_ACTIVE = exists().where(runs.c.session_key == sessions.c.key, has_status(runs, "running")) | exists().where(
    processes.c.session_key == sessions.c.key, has_status(processes, "running")
)
"""Whether a run or a process of a session is under way."""

EXPIRES_AT = bindparam("at", type_=sessions.c.expires_at.type) + sessions.c.ttl * MICROS
"""When a session expires that is called at `:at`; NULL where it has no ttl."""

_BY_OWNED_ID = SESSIONS.where(OF_OWNER, IS_PRESENT)
_find_by_owned_id = Precompiled(_BY_OWNED_ID)
_find_by_id = Precompiled(SESSIONS.where(sessions.c.id == bindparam("session_id"), IS_PRESENT))
_find_by_key = Precompiled(SESSIONS.where(sessions.c.key == bindparam("session")))
_touch = Precompiled(
    update(sessions).where(sessions.c.key == bindparam("session"), IS_PRESENT).values(expires_at=EXPIRES_AT)
)
_OTHER_HOME = (
    select(hosts.c.id)
    .join(homes, homes.c.host_id == hosts.c.id)
    .where(homes.c.session_key == bindparam("session"), ~hosts.c.dead, hosts.c.id != bindparam("host"))
)
_IS_RUNNING = select(sessions.c.key).where(sessions.c.key == bindparam("session"), IS_ACTIVE)
_LAST_REMOVED_OF_ANY_OWNER = (
    select(sessions.c.key, sessions.c.expired)
    .where(sessions.c.id == bindparam("session_id"), ~IS_PRESENT, sessions.c.deleted_at > bindparam("since"))
    .order_by(sessions.c.key.desc())
    .limit(1)
)
_LAST_REMOVED = _LAST_REMOVED_OF_ANY_OWNER.where(OF_OWNER)


def find_session(connection: Connection, retention: Retention, session_id: OwnedId) -> Session:
    """The owner's session with this id. Raises NotFound, Expired, SessionMoved."""
    return find_session_and(connection, retention, session_id)[0]


def find_session_and(
    connection: Connection, retention: Retention, session_id: OwnedId, *asked: Asked
) -> tuple[Session, Sequence[Answer]]:
    """The same with the answers to other statements, which wait for the database together with this one."""
    found, *answers = together(connection, (_find_by_owned_id, owned_id_values(session_id)), *asked)
    if found.row is None:
        raise missing_session(connection, retention, session_id)
    return _checked(connection, session_from_row(found.row)), answers


def find_public_session(connection: Connection, retention: Retention, session_id: str) -> Session:
    """The session with this id, whoever owns it. Raises NotFound, Expired, SessionMoved."""
    session = session_with_id(connection, session_id)
    if session is None:
        values = {"session_id": session_id, "since": restorable_since(retention)}
        removed = connection.execute(_LAST_REMOVED_OF_ANY_OWNER, values).one_or_none()
        raise _expired(session_id) if removed is not None and removed.expired else NoSession(session_id)
    return _checked(connection, session)


def session_with_id(connection: Connection, session_id: str) -> Session | None:
    """The session whose row holds this id, whoever owns it. It may have expired without being marked."""
    row = _find_by_id.first(connection, {"session_id": session_id})
    return None if row is None else session_from_row(row)


def session_with_key(connection: Connection, key: int) -> Session:
    """The session with this key, present or removed. Raises NotFound where it was purged meanwhile."""
    row = _find_by_key.first(connection, {"session": key})
    if row is None:
        raise NotFound("This session was purged meanwhile.")
    return session_from_row(row)


def has_expired(connection: Connection, session: Session, at: int) -> bool:
    """Whether a session has expired by `at`, marked or not. A run or process in progress keeps it alive."""
    if not is_due(session, at):
        return False
    return connection.execute(_IS_RUNNING, {"session": session.key}).first() is None


def last_removed(connection: Connection, retention: Retention, session_id: OwnedId) -> Any:
    """`key` and `expired` of the restorable session that was the last to lose this id, or None."""
    values = owned_id_values(session_id) | {"since": restorable_since(retention)}
    return connection.execute(_LAST_REMOVED, values).one_or_none()


def missing_session(connection: Connection, retention: Retention, session_id: OwnedId) -> EraError:
    """The error for an id under which the owner has no present session: Expired, or NotFound with a hint to restore."""
    removed = last_removed(connection, retention, session_id)
    if removed is None:
        return NoSession(session_id.id)
    if removed.expired:
        return _expired(session_id.id)
    return NotFound(
        f"There is no session '{session_id}'.",
        hint="It was deleted. POST /api/sessions/{id}/restore brings it back.",
    )


def restorable_since(retention: Retention) -> int:
    """Sessions removed after this time, in microseconds since 1970, can be restored."""
    return now() - int(retention.grace_seconds * MICROS)


async def read_session[T](
    database: Database,
    retention: Retention,
    session_id: OwnedId,
    job: Callable[Concatenate[Connection, Session, ...], T],
    *asked: Asked,
) -> T:
    """The result of `job(connection, session, …)`, which gets the answers to what is `asked` besides, and note the call
    if that is due. Raises NotFound or Expired."""

    def read(connection: Connection) -> tuple[Session, T]:
        session, answers = find_session_and(connection, retention, session_id, *asked)
        return session, job(connection, session, *answers)

    return await _read_and_touch(database, read)


async def read_public_session(database: Database, retention: Retention, session_id: str) -> Session:
    """`find_public_session` as a call, which is noted if that is due. Raises NotFound or Expired."""

    def read(connection: Connection) -> tuple[Session, Session]:
        session = find_public_session(connection, retention, session_id)
        return session, session

    return await _read_and_touch(database, read)


async def read_session_of_site(database: Database, key: int) -> Session:
    """The present session with this key as a call, which is noted if that is due. Raises NotFound or Expired."""

    def read(connection: Connection) -> tuple[Session, Session]:
        row = _find_by_key.first(connection, {"session": key})
        session = None if row is None else session_from_row(row)
        if session is None or session.removal is not None:
            raise NotFound("The session of this site is gone.")
        session = _checked(connection, session)
        return session, session

    return await _read_and_touch(database, read)


async def _read_and_touch[T](database: Database, read: Callable[[Connection], tuple[Session, T]]) -> T:
    """Read a session, and what is asked of it, in one transaction. If the call must put off the session's expiry, do so
    in a second one and read again: the session may have ended in between."""

    def touch_and_read(connection: Connection, key: int) -> tuple[Session, T]:
        note_call(connection, key, now())
        return read(connection)

    session, result = await database.read_promptly(read)
    if wants_touch(session, now()):
        _, result = await database.write(touch_and_read, session.key)
    return result


def note_call(connection: Connection, key: int, at: int) -> None:
    """Put off the expiry of the session with this key, which was called at `at`, in microseconds."""
    _touch.execute(connection, {"session": key, "at": at})


def owned_id_values(session_id: OwnedId) -> dict[str, Any]:
    """The parameters of `OF_OWNER`."""
    return {"session_id": session_id.id, "owner": session_id.owner}


def session_from_row(row: Iterable[Any]) -> Session:
    """Convert a row of `SESSIONS`."""
    columns = iter(row)
    values = {name: next(columns) for name in _FIELDS}
    metadata, limits, egress, service, code, description, code_updated_at, root, file_count, total_bytes, data = columns
    for name in ("persistent", "allow_internet", "allow_public", "expired", "storage", "record_code"):
        values[name] = bool(values[name])
    return Session(
        **values,
        metadata=json.loads(metadata),
        limits=json.loads(limits),
        egress=json.loads(egress),
        service=service and json.loads(service),
        stored=None if code is None else StoredCode(code, description, code_updated_at),
        snapshot=snapshot_from_row(root, file_count, total_bytes),
        data=data,
    )


def _checked(connection: Connection, session: Session) -> Session:
    """The session itself. Raises Expired; SessionMoved where this host answered for its id as that of a session that is
    gone, and this one is at home at another."""
    if has_expired(connection, session, now()):
        raise _expired(session.id)
    fence = connection.info["fence"]
    if fence.is_another(session.id, session.key):
        home = {"session": session.key, "host": fence.host_id}
        if connection.execute(_OTHER_HOME, home).first() is not None:
            raise SessionMoved("The session that has this id now is at home at another host.")
    return session


def _expired(session_id: str) -> Expired:
    return Expired(f"Session '{session_id}' has expired.")
