"""Sessions: created, copied, listed, changed, removed, restored, purged.

A *removed* session has expired or was deleted, and can be restored within the grace period (session_lookup.py). A
*purged* one has no rows. An *incomplete* one is being imported (capsules.py): its row counts as removed too long ago to
be restored, so nobody sees it, and it is purged if its import is never completed.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, batched
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Delete,
    Update,
    bindparam,
    case,
    delete,
    exists,
    func,
    insert,
    select,
    union_all,
    update,
)

from era.core import limits
from era.core.metadata import KEEP, Retention, SessionChange, SessionFilter
from era.core.models import (
    EMPTY,
    MICROS,
    Claim,
    JsonObject,
    NewCopy,
    NewSession,
    OwnedId,
    Session,
    Snapshot,
    StoredCode,
    now,
)
from era.core.sessions.expiry import slack
from era.core.sessions.idempotency import session_to_json
from era.errors import Conflict, NoSession
from era.store.blobs.condemned import LOSE_HOME
from era.store.engine.database import Database
from era.store.engine.dialects import raising_if_taken, together
from era.store.engine.tables import deliveries, homes, hosts, outputs, runs, session_pairs, sessions, versions
from era.store.homes import check_home
from era.store.idempotency import ClaimRows, answer_claim, bytes_of, claim_key
from era.store.records import snapshot_from_row
from era.store.rows import MADE, reads, writes
from era.store.session_lookup import (
    EXPIRES_AT,
    IN_FORCE,
    IS_ACTIVE,
    IS_PRESENT,
    OF_OWNER,
    find_session,
    has_expired,
    last_removed,
    missing_session,
    owned_id_values,
    read_public_session,
    read_session,
    read_session_of_site,
    session_with_id,
    session_with_key,
)
from era.store.session_pages import list_sessions, pair, session_page
from era.store.setups import PENDING
from era.store.versions import adding_version, next_version, version_content
from era.store.webhooks import tell

_SETTINGS = (
    "language",
    "persistent",
    "allow_internet",
    "allow_public",
    "default_timeout",
    "isolation",
    "setup",
    "storage",
    "record_code",
    "ttl",
)
_STAY = (
    select(versions.c.n)
    .where(versions.c.session_key == bindparam("session"), versions.c.n == bindparam("number"))
    .with_for_update(read=True, key_share=True)
)
"""Nobody removes this version until the transaction ends."""
_STAY_SAME = select(sessions.c.key).where(sessions.c.key == bindparam("session")).with_for_update(read=True)
"""Nobody changes this session until the transaction ends."""

_LONG_AGO = -(1 << 62)
"""`deleted_at` of an incomplete session."""
_BEING_PURGED = _LONG_AGO - 1
"""`deleted_at` of a session of which rows may be gone."""

_INSERT = insert(sessions).returning(sessions.c.key)
_INSERT_PAIRS = insert(session_pairs)
_DROP_PAIRS = delete(session_pairs).where(session_pairs.c.session_key == bindparam("session"))
_STORE_CODE = (
    update(sessions)
    .where(sessions.c.key == bindparam("session"))
    .values(
        code=bindparam("new_code"),
        code_description=bindparam("new_description"),
        code_updated_at=bindparam("new_code_updated_at"),
        updated_at=bindparam("at"),
        expires_at=EXPIRES_AT,
    )
)
_REMOVE = (
    update(sessions)
    .where(sessions.c.key == bindparam("session"), IS_PRESENT)
    .values(deleted_at=bindparam("at"), expired=bindparam("has_expired"))
)
_RESTORE = (
    update(sessions)
    .where(sessions.c.key == bindparam("session"), ~IS_PRESENT, sessions.c.deleted_at > _LONG_AGO)
    .values(deleted_at=None, expired=False, expires_at=EXPIRES_AT)
)
_COMPLETE = (
    update(sessions)
    .where(sessions.c.key == bindparam("session"))
    .values(
        id=bindparam("new_id"),
        deleted_at=None,
        expires_at=bindparam("new_expires_at"),
        api_key_id=bindparam("new_key_id"),
    )
)
_SWEPT_AT_ONCE, _MARKED_AT_ONCE = 1000, 100
_MAY_BE_DUE = (
    select(sessions.c.key, sessions.c.ttl, sessions.c.expires_at, sessions.c.owner, sessions.c.id)
    .where(sessions.c.expires_at <= bindparam("at"), IS_PRESENT, ~IS_ACTIVE)
    .order_by(sessions.c.expires_at)
    .limit(_SWEPT_AT_ONCE)
)
_EXPIRE = _REMOVE.where(sessions.c.expires_at == bindparam("seen"), ~IS_ACTIVE).values(expired=True)
_IS_IMPORTED = (sessions.c.deleted_at == _LONG_AGO) & exists().where(
    homes.c.session_key == sessions.c.key, hosts.c.id == homes.c.host_id, ~hosts.c.dead
)
"""Whether an incomplete session is still being imported by a host of a cluster."""

_TO_PURGE = (
    select(sessions.c.key)
    .where(~IS_PRESENT, sessions.c.deleted_at <= bindparam("before"), ~_IS_IMPORTED)
    .order_by(sessions.c.deleted_at)
    .limit(_SWEPT_AT_ONCE)
)
_CAN_BE_RESTORED = ~IS_PRESENT & (sessions.c.deleted_at > _LONG_AGO)
_REMOVED_OF_OWNERS = (
    select(sessions.c.owner, func.count(), func.sum(versions.c.total_bytes))
    .join(versions, IN_FORCE)
    .where(_CAN_BE_RESTORED)
    .group_by(sessions.c.owner)
)
_REMOVED_OF_OWNER = (
    select(sessions.c.key, sessions.c.deleted_at, versions.c.total_bytes)
    .join(versions, IN_FORCE)
    .where(sessions.c.owner == bindparam("owner"), _CAN_BE_RESTORED)
    .order_by(sessions.c.deleted_at.desc(), sessions.c.key.desc())
)
_IS_REMOVED = exists().where(sessions.c.key == bindparam("session"), ~IS_PRESENT)
_NEWEST_IDS = (
    select(sessions.c.id).where(sessions.c.owner == bindparam("owner"), IS_PRESENT).order_by(sessions.c.key.desc())
)
_COUNT = select(func.count()).select_from(sessions).where(IS_PRESENT)


def _delete_batch(key: Column[int], limit: int) -> Delete:
    """The statement that deletes up to `limit` rows of a removed session from the table of the column `key`."""
    of_session = key.table.c.session_key == bindparam("session")
    return delete(key.table).where(of_session, key.in_(select(key).where(of_session, _IS_REMOVED).limit(limit)))


_PURGE_SOME = (
    _delete_batch(runs.c.key, 500),
    _delete_batch(outputs.c.run_key, 100),
    _delete_batch(versions.c.n, 5),
    _delete_batch(deliveries.c.key, 100),
)
_LOSE_HOME = LOSE_HOME.where(
    homes.c.session_key == bindparam("session"),
    exists().where(sessions.c.key == bindparam("session"), sessions.c.deleted_at == _LONG_AGO),
)
_BEGIN_PURGE = (
    update(sessions)
    .where(sessions.c.key == bindparam("session"), ~IS_PRESENT, sessions.c.deleted_at <= bindparam("seen"))
    .values(deleted_at=_BEING_PURGED)
)
"""Nobody can restore it from then on, nor complete it."""

_PURGE_KEY = delete(sessions).where(sessions.c.key == bindparam("session"), ~IS_PRESENT)
_PURGE_ID = (
    delete(sessions)
    .where(
        # Each of the two has an index, and both together have none.
        sessions.c.key.in_(
            union_all(
                select(sessions.c.key).where(OF_OWNER, IS_PRESENT), select(sessions.c.key).where(OF_OWNER, ~IS_PRESENT)
            )
        )
    )
    .returning(sessions.c.key)
)


class SessionRows(ClaimRows):
    def __init__(self, database: Database, retention: Retention) -> None:
        super().__init__(database, retention)
        self.incomplete: set[int] = set()
        """The keys of sessions that this process is importing."""

    async def create_session(self, new: NewSession, claim: Claim | None = None) -> Session:
        session = await self._create(new, claim)
        if claim is not None:
            await self.bound_answers(claim, new.id.owner, _bytes_of(session))
        return session

    @writes
    def _create(self, connection: Connection, new: NewSession, claim: Claim | None) -> Session:
        at = now()
        values = _settings(new) | {
            "id": new.id.id,
            "owner": new.id.owner,
            "setup_status": new.setup and "pending",
            "version": 1,
            "history_bytes": 0,
            "created_at": at,
            "updated_at": at,
            "api_key_id": new.id.key_id or None,
            "expires_at": _expiry(new.ttl, at),
        }
        claim_key(connection, claim, new.id.owner)
        with self.bounded(connection, new.id, new.id.id, *MADE):
            key = insert_session(connection, values)
            together(connection, adding_version(key, 1, "create", at, data=new.data, snapshot=EMPTY))
        _insert_pairs(connection, key, new.metadata)
        return _answer_with_session(connection, key, claim, new.id.owner)

    async def duplicate(self, copy: NewCopy, claim: Claim | None = None) -> Session:
        session, source_key = await self._copy(copy, claim)
        if claim is not None:
            await self.bound_answers(claim, source_key, _bytes_of(session))
        return session

    @writes
    def _copy(self, connection: Connection, copy: NewCopy, claim: Claim | None) -> tuple[Session, int]:
        """Copy a session; the copy, and the key of its source."""
        at = now()
        source = find_session(connection, self.retention, copy.source_id)
        claim_key(connection, claim, source)
        n = copy.version or source.version
        # So a collection of garbage that doesn't see the original's row any more sees the copy's.
        connection.execute(_STAY, {"session": source.key, "number": n})
        if source.package_set is not None:
            connection.execute(_STAY_SAME, {"session": source.key})
        content = version_content(connection, source, self.retention, n)
        times = {"created_at": at, "updated_at": at, "expires_at": _expiry(source.ttl, at)}
        # What is copied holds no more than all of the source does.
        own = {"id": copy.id, "history_bytes": source.history_bytes, "api_key_id": copy.source_id.key_id or None}
        data = content.data if copy.data is None else copy.data
        with self.bounded(connection, copy.source_id, copy.id, *MADE):
            key = insert_session(connection, settings_of(source) | times | own)
            snapshot = content.version.snapshot
            together(connection, adding_version(key, 1, "duplicate", at, data=data, snapshot=snapshot))
        _insert_pairs(connection, key, source.metadata)
        return _answer_with_session(connection, key, claim, source), source.key

    async def session(self, session_id: OwnedId) -> Session:
        def itself(_: Connection, session: Session) -> Session:
            return session

        return await read_session(self.database, self.retention, session_id, itself)

    async def public_session(self, session_id: str) -> Session:
        return await read_public_session(self.database, self.retention, session_id)

    async def session_of_site(self, key: int) -> Session:
        return await read_session_of_site(self.database, key)

    async def sessions(self, which: SessionFilter) -> Sequence[Session]:
        return await self.database.read_for(which.owner, list_sessions, self.retention, which)

    async def session_page(self, which: SessionFilter, most: int) -> tuple[Sequence[Session], bool]:
        return await self.database.read_for(which.owner, session_page, self.retention, which, most)

    @reads
    def newest_ids(self, connection: Connection, owner: str, limit: int) -> Sequence[str]:
        return list(connection.execute(_NEWEST_IDS.limit(limit), {"owner": owner}).scalars())

    @reads
    def present_sessions(self, connection: Connection, keys: Sequence[int]) -> Sequence[int]:
        return list(connection.execute(select(sessions.c.key).where(sessions.c.key.in_(keys), IS_PRESENT)).scalars())

    @reads
    def snapshots_of(self, connection: Connection, keys: Sequence[int]) -> Mapping[int, Snapshot]:
        columns = sessions.c.key, versions.c.snapshot_root, versions.c.file_count, versions.c.total_bytes
        query = select(*columns).join_from(sessions, versions, IN_FORCE).where(sessions.c.key.in_(keys), IS_PRESENT)
        return {key: snapshot_from_row(*snapshot) for key, *snapshot in connection.execute(query)}

    @writes
    def change_session(self, connection: Connection, session_id: OwnedId, change: SessionChange) -> Session:
        at = now()
        values = _changed_columns(change, at)
        session = find_session(connection, self.retention, session_id)
        check_home(connection, session.key)
        if change.limits is not None:
            values["limits"] = json.dumps(limits.merged(session.limits, change.limits))
        connection.execute(update(sessions).where(sessions.c.key == session.key).values(values), {"at": at})
        if change.data is not None and change.data != session.data:
            next_version(connection, self.retention, session.key, "data", at, data=change.data, snapshot=None)
        if change.metadata is not None:
            connection.execute(_DROP_PAIRS, {"session": session.key})
            _insert_pairs(connection, session.key, change.metadata)
        return session_with_key(connection, session.key)

    @writes
    def store_code(self, connection: Connection, session_id: OwnedId, code: StoredCode) -> None:
        session = find_session(connection, self.retention, session_id)
        check_home(connection, session.key)
        values = {
            "session": session.key,
            "new_code": code.code,
            "new_description": code.description,
            "new_code_updated_at": code.updated_at,
            "at": now(),
        }
        connection.execute(_STORE_CODE, values)

    @writes
    def delete_session(self, connection: Connection, session_id: OwnedId, *, key: int | None = None) -> Session:
        session = find_session(connection, self.retention, session_id)
        if key not in (None, session.key):
            raise NoSession(session_id.id)
        connection.execute(_REMOVE, {"session": session.key, "at": now(), "has_expired": False})
        return session

    @writes
    def restore_session(self, connection: Connection, session_id: OwnedId) -> Session:
        removed = last_removed(connection, self.retention, session_id)
        present = session_with_id(connection, session_id.id)
        if removed is None and (present is None or present.owned_id != session_id):
            raise missing_session(connection, self.retention, session_id)
        if present is not None:
            raise Conflict(
                f"Session '{session_id}' is not gone."
                if removed is None
                else f"The id '{session_id}' is in use again.",
                hint="Only when no session has this id can the one that is gone be restored.",
            )
        with self.bounded(connection, session_id, session_id.id, *MADE):
            if not connection.execute(_RESTORE, {"session": removed.key, "at": now()}).rowcount:
                raise NoSession(session_id.id)  # it is being purged
        return session_with_key(connection, removed.key)

    @writes
    def purge_session(
        self, connection: Connection, session_id: OwnedId, *, key: int | None = None, only_removed: bool = False
    ) -> Sequence[int]:
        # The other tables' rows go by their foreign keys.
        purge = _PURGE_ID if key is None else _PURGE_ID.where(sessions.c.key == key)
        if only_removed:
            purge = purge.where(~IS_PRESENT)
        keys = list(connection.execute(purge, owned_id_values(session_id)).scalars())
        if not keys:
            raise missing_session(connection, self.retention, session_id)
        return keys

    async def expire(self, at: int) -> Sequence[int]:
        # A reader looks for them, so that the writer has work only where there are some. A session that was called, or
        # whose run began, between the two transactions is left alone.
        due = [row for row in await self._may_be_due(at) if row.expires_at + slack(row.ttl) <= at]
        return [key for some in batched(due, _MARKED_AT_ONCE) for key in await self._expire(at, some)]

    @reads
    def _may_be_due(self, connection: Connection, at: int) -> Sequence[Any]:
        return connection.execute(_MAY_BE_DUE, {"at": at}).all()

    @writes
    def _expire(self, connection: Connection, at: int, due: Sequence[Any]) -> Sequence[int]:
        expired = []
        for row in due:
            if connection.execute(_EXPIRE, {"session": row.key, "at": at, "seen": row.expires_at}).rowcount:
                expired.append(row.key)
                tell(connection, row.owner, "session.expired", {"session_id": row.id})
        return expired

    async def purge(self, at: int) -> int:
        before = at - int(self.retention.grace_seconds * MICROS)
        keys = [key for key in await self._to_purge(before) if key not in self.incomplete]
        for key in keys:
            await purge_removed(self.database, key, before)
        return len(keys)

    @reads
    def _to_purge(self, connection: Connection, before: int) -> Sequence[int]:
        return list(connection.execute(_TO_PURGE, {"before": before}).scalars())

    async def purge_beyond(self, bounds: Callable[[str], tuple[int, int]]) -> int:
        found = await self._beyond(bounds)
        for key, deleted_at in found:
            await purge_removed(self.database, key, deleted_at)
        return len(found)

    @reads
    def _beyond(self, connection: Connection, bounds: Callable[[str], tuple[int, int]]) -> Sequence[tuple[int, int]]:
        """The keys of sessions to be purged, and when each was removed."""
        found: list[tuple[int, int]] = []
        for owner, count, size in connection.execute(_REMOVED_OF_OWNERS).all():
            most, most_bytes = (bound or float("inf") for bound in bounds(owner))
            if count > most or size > most_bytes:
                removed = connection.execute(_REMOVED_OF_OWNER, {"owner": owner}).all()
                totals = list(accumulate(row.total_bytes for row in removed))
                fitting = sum(n < most and total <= most_bytes for n, total in enumerate(totals))
                found += [(row.key, row.deleted_at) for row in removed[max(fitting, 1) :]]
        return found[:_SWEPT_AT_ONCE]


def insert_session(connection: Connection, values: dict[str, Any]) -> int:
    """Insert a row of `sessions` and return its key. Raises Conflict if the id is taken, whoever owns it."""
    _free_id(connection, values["id"])
    with raising_if_taken(_id_taken(values["id"])):
        key: int = connection.execute(_INSERT, values).scalar_one()
    return key


def insert_incomplete_session(connection: Connection, session: Session) -> int:
    """Insert the row of a session that is being imported and return its key. Until `complete_session` nobody sees it,
    under an id that no request can have. Raises Conflict if the id that it is to have is taken."""
    _free_id(connection, session.id)
    times = {name: getattr(session, name) for name in ("created_at", "updated_at", "last_run_at", "version")}
    hidden = {"id": f"hidden {secrets.token_hex(16)}", "deleted_at": _LONG_AGO}
    key: int = connection.execute(_INSERT, settings_of(session) | times | hidden).scalar_one()
    _insert_pairs(connection, key, session.metadata)
    check_home(connection, key)
    return key


def complete_session(connection: Connection, key: int, session: Session, key_id: str) -> Session:
    """Make an incomplete session, whose versions and runs are all there now, present as `session.id`. It counts as
    called now, and as made with the API key `key_id`, if that isn't empty. Raises Conflict if that id is taken."""
    check_home(connection, key, goes_on=True)
    _free_id(connection, session.id)
    values = {
        "session": key,
        "new_id": session.id,
        "new_expires_at": _expiry(session.ttl, now()),
        "new_key_id": key_id or None,
    }
    with raising_if_taken(_id_taken(session.id)):
        connection.execute(_COMPLETE, values)
    return _told(connection, session_with_key(connection, key))


def count_sessions(connection: Connection) -> int:
    """How many sessions are present; counted in an index alone."""
    count: int = connection.execute(_COUNT).scalar_one()
    return count


async def purge_incomplete(database: Database, key: int) -> None:
    """Drop the rows of a session that wasn't completed, if it still isn't."""
    await purge_removed(database, key, _LONG_AGO)


async def purge_removed(database: Database, key: int, seen: int) -> None:
    """Drop the rows of a session if it was removed at `seen` or before. In small transactions: it may have many rows,
    and others want to write, too. Before the first of them goes it can't be restored any more."""
    if not await database.write(_begin_purge, key, seen):
        return
    for statement in _PURGE_SOME:
        while await database.write(_execute, statement, key):
            pass
    await database.write(_execute, _PURGE_KEY, key)


def _begin_purge(connection: Connection, key: int, seen: int) -> int:
    """Let nobody restore or complete a session that was removed at `seen` or before; 0 where there is none."""
    # The host that imports an incomplete one may be back from a pause.
    _execute(connection, _LOSE_HOME, key)
    return connection.execute(_BEGIN_PURGE, {"session": key, "seen": seen}).rowcount


def _execute(connection: Connection, statement: Delete | Update, key: int) -> int:
    """Run one of the statements above for a session; how many rows went."""
    return connection.execute(statement, {"session": key}).rowcount


def _answer_with_session(connection: Connection, key: int, claim: Claim | None, scope: Session | str) -> Session:
    """The session that a request has made, stored as the answer of its claim, if it has one."""
    session = _told(connection, session_with_key(connection, key))
    if claim is not None:
        answer_claim(connection, claim, scope, session_to_json(session))
    return session


def _told(connection: Connection, session: Session) -> Session:
    """The session itself; its owner is told that it was made."""
    data = {"session_id": session.id, "language": session.language, "metadata": session.metadata}
    tell(connection, session.owner, "session.created", data)
    return session


def _free_id(connection: Connection, session_id: str) -> None:
    """Mark a session that has this id as expired if its ttl has gone by. Raises Conflict where one has not expired.

    A sandbox that the expired session still has ends when the next sweep finds the session removed.
    """
    present = session_with_id(connection, session_id)
    if present is None:
        return
    if not has_expired(connection, present, now()):
        raise _id_taken(session_id)
    connection.execute(_REMOVE, {"session": present.key, "at": now(), "has_expired": True})
    tell(connection, present.owner, "session.expired", {"session_id": present.id})


def _id_taken(session_id: str) -> Conflict:
    """The same error whoever owns the session that has the id: nobody learns about other owners."""
    return Conflict(f"Session '{session_id}' already exists.")


def _settings(source: NewSession | Session) -> dict[str, Any]:
    """The columns of a session that its maker chose."""
    return {name: getattr(source, name) for name in _SETTINGS} | {
        name: json.dumps(getattr(source, name)) for name in ("metadata", "limits", "egress", "service")
    }


def settings_of(source: Session) -> dict[str, Any]:
    """The columns that a copy or an imported session has in common with its source."""
    stored = source.stored
    return _settings(source) | {
        "owner": source.owner,
        "setup_status": source.setup_status,
        "setup_result": source.setup_result,
        "package_set": source.package_set,
        "setup_lock": source.setup_lock,
        "code": stored and stored.code,
        "code_description": stored and stored.description,
        "code_updated_at": stored and stored.updated_at,
        "version": 1,
    }


def _expiry(ttl: int | None, at: int) -> int | None:
    """When a session with this ttl, in seconds, expires that is called at `at`, in microseconds."""
    return None if ttl is None else at + ttl * MICROS


def _changed_columns(change: SessionChange, at: int) -> dict[str, Any]:
    """The columns to set for a change at `at`, in microseconds, except `limits`, which are merged with the old ones."""
    values: dict[str, Any] = {"updated_at": at, "expires_at": EXPIRES_AT}
    values |= {
        name: value
        for name in ("default_timeout", "allow_internet", "allow_public", "isolation", "storage", "record_code")
        if (value := getattr(change, name)) is not None
    }
    if change.metadata is not None:
        values["metadata"] = json.dumps(change.metadata)
    if change.egress is not None:
        values["egress"] = json.dumps(change.egress)
    if change.service is not KEEP:
        values["service"] = json.dumps(change.service)
    if change.setup is not KEEP:
        # Of the same setup, asked for once more, the packages stay until others are there.
        kept = case((sessions.c.setup == change.setup, sessions.c.package_set), else_=None)
        values |= PENDING | {"setup": change.setup, "setup_status": change.setup and "pending", "setup_lock": None}
        values |= {"package_set": kept if change.setup else None}
    if change.ttl is not KEEP:
        values |= {"ttl": change.ttl, "expires_at": _expiry(change.ttl, at)}
    return values


def _insert_pairs(connection: Connection, session_key: int, metadata: JsonObject) -> None:
    """Insert the rows by which filters on metadata find a session."""
    if metadata:
        pairs = {pair(name, _filter_text(value)) for name, value in metadata.items()}
        connection.execute(_INSERT_PAIRS, [{"session_key": session_key, "pair": pair} for pair in pairs])


def _filter_text(value: object) -> str:
    """The text that a filter must give to match `value`: a string itself, anything else as compact JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _bytes_of(session: Session) -> int:
    """About what a session takes as an answer, without making it JSON once more."""
    return bytes_of(session.data) + (0 if session.stored is None else len(session.stored.code))
