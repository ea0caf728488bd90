"""Rows of sessions: made, copied, listed, changed, deleted."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from sqlalchemy import Column, Connection, Delete, Select, bindparam, delete, exists, insert, select, update

from era.core import limits
from era.core.expiry import MICROS, slack
from era.core.idempotency import packed
from era.core.metadata import KEEP, Retention, SessionChange, SessionFilter
from era.core.models import EMPTY, Claim, JsonObject, NewCopy, NewSession, OwnedId, Session, StoredCode, now
from era.errors import Conflict
from era.store import dialects
from era.store.commits import EXPIRES_AT, HAS_RUN_UNDER_WAY, IS_LIVE, OF_OWNER, SESSIONS, session_of, values_of
from era.store.idempotency import IdempotencyRows
from era.store.setups import PENDING
from era.store.tables import deliveries, outputs, runs, session_pairs, sessions, versions

_NEW_SESSION = insert(sessions).returning(sessions.c.key)
_NEW_PAIRS = insert(session_pairs)
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
_RETIRE = (
    update(sessions)
    .where(sessions.c.key == bindparam("session"), IS_LIVE)
    .values(deleted_at=bindparam("at"), expired=bindparam("has_expired"))
)
_RESTORE = (
    update(sessions)
    .where(sessions.c.key == bindparam("session"))
    .values(deleted_at=None, expired=False, expires_at=EXPIRES_AT)
)
_SHOW = (
    update(sessions)
    .where(sessions.c.key == bindparam("session"))
    .values(id=bindparam("new_id"), deleted_at=None, expires_at=bindparam("new_expires_at"))
)
_DUE = (
    select(sessions.c.key, sessions.c.ttl, sessions.c.expires_at)
    .where(sessions.c.expires_at <= bindparam("at"), IS_LIVE, ~HAS_RUN_UNDER_WAY)
    .limit(1000)
)
_EXPIRE = _RETIRE.where(sessions.c.expires_at == bindparam("seen"), ~HAS_RUN_UNDER_WAY).values(expired=True)
_OVER = select(sessions.c.key).where(~IS_LIVE, sessions.c.deleted_at <= bindparam("before")).limit(1000)
_IS_GONE = exists().where(sessions.c.key == bindparam("session"), ~IS_LIVE)


def _some_of(rows: Column[int], how_many: int) -> Delete:
    """Deletes some rows of a session that is gone."""
    its = rows.table.c.session_key == bindparam("session")
    return delete(rows.table).where(its, rows.in_(select(rows).where(its, _IS_GONE).limit(how_many)))


_PURGE_SOME = (
    _some_of(runs.c.key, 500),
    _some_of(outputs.c.run_key, 100),
    _some_of(versions.c.n, 5),
    _some_of(deliveries.c.key, 100),
)
_PURGE_KEY = delete(sessions).where(sessions.c.key == bindparam("session"), ~IS_LIVE)
_PURGE_ID = delete(sessions).where(OF_OWNER).returning(sessions.c.key)


LONG_AGO = -(1 << 62)
"""When a session was gone that is not complete yet: too long ago to be restored, so that it is purged if nobody goes on
with it."""


class SessionRows(IdempotencyRows):
    """The part of SqlStore that deals in sessions."""

    def __init__(self, url: str, retention: Retention = Retention()) -> None:  # noqa: B008 - it is frozen
        super().__init__(url, retention)
        self._hidden: set[int] = set()
        """The keys of incomplete sessions that this process is about to complete."""

    async def create_session(self, new: NewSession, claim: Claim | None = None) -> Session:
        at = now()
        values = {
            "id": new.id.id,
            "owner": new.id.owner,
            "language": new.language,
            "persistent": new.persistent,
            "metadata": json.dumps(new.metadata),
            "allow_internet": new.allow_internet,
            "allow_public": new.allow_public,
            "default_timeout": new.default_timeout,
            "limits": json.dumps(new.limits),
            "isolation": new.isolation,
            "egress": json.dumps(new.egress),
            "service": json.dumps(new.service),
            "setup": new.setup,
            "setup_status": new.setup and "pending",
            "storage": new.storage,
            "version": 1,
            "created_at": at,
            "updated_at": at,
            "ttl": new.ttl,
            "expires_at": _expiry(new.ttl, at),
        }

        def job(connection: Connection) -> Session:
            self._claim(connection, claim, new.id.owner)
            key = self._insert(connection, values)
            self._add_version(connection, key, 1, "create", at, data=new.data, snapshot=EMPTY)
            _add_pairs(connection, key, new.metadata)
            return self._made(connection, key, claim, new.id.owner)

        return await self._write(job)

    async def duplicate(self, copy: NewCopy, claim: Claim | None = None) -> Session:
        at = now()

        def job(connection: Connection) -> Session:
            source = self._live(connection, copy.source_id)
            self._claim(connection, claim, source)
            content = self._content(connection, source, copy.version or source.version)
            times = {"created_at": at, "updated_at": at, "expires_at": _expiry(source.ttl, at)}
            key = self._insert(connection, _settings_of(source) | times | {"id": copy.id})
            self._add_version(
                connection,
                key,
                1,
                "duplicate",
                at,
                data=content.data if copy.data is None else copy.data,
                snapshot=content.version.snapshot,
            )
            _add_pairs(connection, key, source.metadata)
            return self._made(connection, key, claim, source)

        return await self._write(job)

    def _insert_hidden(self, connection: Connection, session: Session) -> int:
        """Insert the row of a session as it was elsewhere, to be filled in transactions to come and then shown by
        `_show`; its key. Until then it is gone for everybody, under an id that no request can have. Raises Conflict
        where the id that it is to have is taken."""
        self._check_free(connection, session.id)
        times = {name: getattr(session, name) for name in ("created_at", "updated_at", "last_run_at", "version")}
        hidden = {"id": f"hidden {secrets.token_hex(16)}", "deleted_at": LONG_AGO}
        key: int = connection.execute(_NEW_SESSION, _settings_of(session) | times | hidden).scalar_one()
        _add_pairs(connection, key, session.metadata)
        self._hidden.add(key)
        return key

    def _show(self, connection: Connection, key: int, session: Session, at: int) -> Session:
        """Let a hidden session, now complete, be there as if it was called at `at`. Raises Conflict."""
        self._check_free(connection, session.id)
        values = {"session": key, "new_id": session.id, "new_expires_at": _expiry(session.ttl, at)}
        with self._taken_is_conflict(session.id):
            connection.execute(_SHOW, values)
        return self._of_key(connection, key)

    async def session(self, session_id: OwnedId) -> Session:
        return await self._read_live(session_id, lambda _, session: session)

    async def public_session(self, session_id: str) -> Session:
        return await self._read_found(
            lambda connection: self._live_of_anybody(connection, session_id), lambda _, session: session
        )

    async def sessions(self, which: SessionFilter) -> Sequence[Session]:
        query = _list_query(which, now() - int(self._retention.grace_seconds * MICROS))
        return await self._read(lambda connection: [session_of(row) for row in connection.execute(query)])

    async def change_session(self, session_id: OwnedId, change: SessionChange) -> Session:
        at = now()
        values = _changed(change, at)

        def job(connection: Connection) -> Session:
            session = self._live(connection, session_id)
            if change.limits is not None:
                values["limits"] = json.dumps(limits.merged(session.limits, change.limits))
            connection.execute(update(sessions).where(sessions.c.key == session.key).values(values), {"at": at})
            if change.data is not None:
                self._next_version(connection, session.key, "data", at, data=change.data, snapshot=None)
            if change.metadata is not None:
                connection.execute(_DROP_PAIRS, {"session": session.key})
                _add_pairs(connection, session.key, change.metadata)
            return self._of_key(connection, session.key)

        return await self._write(job)

    async def store_code(self, session_id: OwnedId, code: StoredCode) -> None:
        values = {
            "new_code": code.code,
            "new_description": code.description,
            "new_code_updated_at": code.updated_at,
            "at": now(),
        }

        def job(connection: Connection) -> None:
            connection.execute(_STORE_CODE, values | {"session": self._live(connection, session_id).key})

        await self._write(job)

    async def delete_session(self, session_id: OwnedId) -> Session:
        def job(connection: Connection) -> Session:
            session = self._live(connection, session_id)
            connection.execute(_RETIRE, {"session": session.key, "at": now(), "has_expired": False})
            return session

        return await self._write(job)

    async def restore_session(self, session_id: OwnedId) -> Session:
        def job(connection: Connection) -> Session:
            gone = self._newest_gone(connection, session_id)
            taken = self._taken(connection, session_id.id)
            if gone is None and (taken is None or taken.owned_id != session_id):
                raise self._missing(connection, session_id)
            if taken is not None:
                raise Conflict(
                    f"Session '{session_id}' is not gone."
                    if gone is None
                    else f"The id '{session_id}' is in use again.",
                    hint="Only when no session has this id can the one that is gone be restored.",
                )
            connection.execute(_RESTORE, {"session": gone.key, "at": now()})
            return self._of_key(connection, gone.key)

        return await self._write(job)

    async def purge_session(self, session_id: OwnedId) -> Sequence[int]:
        def job(connection: Connection) -> Sequence[int]:
            keys = list(connection.execute(_PURGE_ID, values_of(session_id)).scalars())
            if not keys:
                raise self._missing(connection, session_id)
            return keys

        return await self._write(job)

    async def expire(self, at: int) -> Sequence[int]:
        candidates = await self._read(lambda connection: connection.execute(_DUE, {"at": at}).all())
        due = [row for row in candidates if row.expires_at + slack(row.ttl) <= at]
        if not due:
            return []

        def job(connection: Connection) -> Sequence[int]:
            return [
                row.key
                for row in due
                if connection.execute(_EXPIRE, {"session": row.key, "at": at, "seen": row.expires_at}).rowcount
            ]

        return await self._write(job)

    async def there(self, keys: Sequence[int]) -> Sequence[int]:
        wanted = select(sessions.c.key).where(sessions.c.key.in_(keys), sessions.c.deleted_at.is_(None))
        return await self._read(lambda connection: [row.key for row in connection.execute(wanted)])

    async def purge(self, at: int) -> int:
        before = at - int(self._retention.grace_seconds * MICROS)
        keys = await self._read(lambda connection: list(connection.execute(_OVER, {"before": before}).scalars()))
        keys = [key for key in keys if key not in self._hidden]
        for key in keys:
            await self._purge_one(key)
        return len(keys)

    async def _purge_one(self, key: int) -> None:
        """Drop the rows of a session if it is gone: a few at a time, for it may have many and others want to write."""
        for statement in _PURGE_SOME:
            while await self._write(partial(_count, statement=statement, key=key)):
                pass
        await self._write(lambda connection: connection.execute(_PURGE_KEY, {"session": key}))

    def _made(self, connection: Connection, key: int, claim: Claim | None, scope: Session | str) -> Session:
        """The session that was made, which is the answer of the claim, too."""
        session = self._of_key(connection, key)
        if claim is not None:
            self._answer(connection, claim, scope, {"answer": packed(session)})
        return session

    def _insert(self, connection: Connection, values: dict[str, Any]) -> int:
        self._check_free(connection, values["id"])
        with self._taken_is_conflict(values["id"]):
            key: int = connection.execute(_NEW_SESSION, values).scalar_one()
        return key

    def _check_free(self, connection: Connection, session_id: str) -> None:
        """Raises Conflict where a session has this id, whoever's it is."""
        taken = self._taken(connection, session_id)
        if taken is None:
            return
        if not self._is_over(connection, taken, now()):
            raise _exists(session_id)
        # It has expired but isn't marked yet; if it has a sandbox, that ends when it has been idle.
        connection.execute(_RETIRE, {"session": taken.key, "at": now(), "has_expired": True})

    @contextmanager
    def _taken_is_conflict(self, session_id: str) -> Iterator[None]:
        """Where another process takes the id at this very moment."""
        try:
            yield
        except self._errors as error:
            if dialects.is_taken(error):
                raise _exists(session_id) from None
            raise


def _count(connection: Connection, statement: Delete, key: int) -> int:
    return connection.execute(statement, {"session": key}).rowcount


def _exists(session_id: str) -> Conflict:
    """The same whoever's it is: that is nobody's business."""
    return Conflict(f"Session '{session_id}' already exists.")


def _settings_of(source: Session) -> dict[str, Any]:
    """What a copy has in common with its source."""
    stored = source.stored
    return {
        "owner": source.owner,
        "language": source.language,
        "persistent": source.persistent,
        "metadata": json.dumps(source.metadata),
        "allow_internet": source.allow_internet,
        "allow_public": source.allow_public,
        "default_timeout": source.default_timeout,
        "limits": json.dumps(source.limits),
        "isolation": source.isolation,
        "egress": json.dumps(source.egress),
        "service": json.dumps(source.service),
        "setup": source.setup,
        "setup_status": source.setup_status,
        "setup_result": source.setup_result,
        "package_set": source.package_set,
        "setup_lock": source.setup_lock,
        "storage": source.storage,
        "code": stored and stored.code,
        "code_description": stored and stored.description,
        "code_updated_at": stored and stored.updated_at,
        "version": 1,
        "ttl": source.ttl,
    }


def _expiry(ttl: int | None, at: int) -> int | None:
    return None if ttl is None else at + ttl * MICROS


def _changed(change: SessionChange, at: int) -> dict[str, Any]:
    values: dict[str, Any] = {"updated_at": at, "expires_at": EXPIRES_AT}
    values |= {
        name: value
        for name in ("default_timeout", "allow_internet", "allow_public", "isolation", "storage")
        if (value := getattr(change, name)) is not None
    }
    if change.metadata is not None:
        values["metadata"] = json.dumps(change.metadata)
    if change.egress is not None:
        values["egress"] = json.dumps(change.egress)
    if change.service is not KEEP:
        values["service"] = json.dumps(change.service)
    if change.setup is not KEEP:
        values |= PENDING | {"setup": change.setup, "setup_status": change.setup and "pending", "setup_lock": None}
    if change.ttl is not KEEP:
        values |= {"ttl": change.ttl, "expires_at": _expiry(change.ttl, at)}
    return values


def _list_query(which: SessionFilter, since: int) -> Select[Any]:
    """`since` is when the sessions were gone that can still be restored."""
    query = SESSIONS.where(sessions.c.owner == which.owner).order_by(sessions.c.key.desc())
    if which.gone is None:
        query = query.where(IS_LIVE)
    else:
        is_expired = sessions.c.expired.is_(which.gone == "expired")
        query = query.where(~IS_LIVE, sessions.c.deleted_at > since, is_expired)
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
