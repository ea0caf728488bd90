"""Rows of sessions: made, copied, listed, changed, deleted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Select, bindparam, delete, insert, select, update

from era.core.idempotency import packed
from era.core.models import EMPTY, Claim, JsonObject, NewCopy, NewSession, Session, StoredCode, now
from era.core.ports import KEEP, SessionChange, SessionFilter
from era.errors import Conflict
from era.store import dialects
from era.store.commits import IS_LIVE, SESSIONS, no_session, session_of
from era.store.keys import KeyRows
from era.store.tables import session_pairs, sessions

_NEW_SESSION = insert(sessions).returning(sessions.c.key)
_NEW_PAIRS = insert(session_pairs)
_DROP_PAIRS = delete(session_pairs).where(session_pairs.c.session_key == bindparam("session"))
_STORE_CODE = (
    update(sessions)
    .where(sessions.c.id == bindparam("session_id"), IS_LIVE)
    .values(
        code=bindparam("new_code"),
        code_description=bindparam("new_description"),
        code_updated_at=bindparam("at"),
        updated_at=bindparam("at"),
    )
)


class SessionRows(KeyRows):
    """The part of SqlStore that deals in sessions."""

    async def create_session(self, new: NewSession, claim: Claim | None = None) -> Session:
        at = now()
        values = {
            "id": new.id,
            "language": new.language,
            "persistent": new.persistent,
            "metadata": json.dumps(new.metadata),
            "allow_internet": new.allow_internet,
            "allow_public": new.allow_public,
            "default_timeout": new.default_timeout,
            "version": 1,
            "created_at": at,
            "updated_at": at,
            "ttl": new.ttl,
        }

        def job(connection: Connection) -> Session:
            self._claim(connection, claim, None)
            key = self._insert(connection, values)
            self._add_version(connection, key, 1, "create", at, data=new.data, snapshot=EMPTY)
            _add_pairs(connection, key, new.metadata)
            return self._made(connection, key, claim, None)

        return await self._write(job)

    async def duplicate(self, copy: NewCopy, claim: Claim | None = None) -> Session:
        at = now()

        def job(connection: Connection) -> Session:
            source = self._live(connection, copy.source_id)
            self._claim(connection, claim, source)
            content = self._content(connection, source, copy.version or source.version)
            key = self._insert(connection, _settings_of(source) | {"id": copy.id, "created_at": at, "updated_at": at})
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

    async def session(self, session_id: str) -> Session:
        return await self._read(lambda connection: self._live(connection, session_id))

    async def sessions(self, which: SessionFilter) -> Sequence[Session]:
        query = _list_query(which)
        return await self._read(lambda connection: [session_of(row) for row in connection.execute(query)])

    async def change_session(self, session_id: str, change: SessionChange) -> Session:
        at = now()
        values = _changed(change) | {"updated_at": at}

        def job(connection: Connection) -> Session:
            session = self._live(connection, session_id)
            connection.execute(update(sessions).where(sessions.c.key == session.key).values(values))
            if change.data is not None:
                self._next_version(connection, session.key, "data", at, data=change.data, snapshot=None)
            if change.metadata is not None:
                connection.execute(_DROP_PAIRS, {"session": session.key})
                _add_pairs(connection, session.key, change.metadata)
            return self._of_key(connection, session.key)

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
                raise no_session(session_id)

        await self._write(job)

    async def delete_session(self, session_id: str) -> Session:
        def job(connection: Connection) -> Session:
            session = self._live(connection, session_id)
            connection.execute(delete(sessions).where(sessions.c.key == session.key))
            return session

        return await self._write(job)

    def _made(self, connection: Connection, key: int, claim: Claim | None, source: Session | None) -> Session:
        """The session that was made, which is the answer of the claim, too."""
        session = self._of_key(connection, key)
        if claim is not None:
            self._answer(connection, claim, source, {"answer": packed(session)})
        return session

    def _insert(self, connection: Connection, values: dict[str, Any]) -> int:
        try:
            key: int = connection.execute(_NEW_SESSION, values).scalar_one()
        except self._errors as error:
            if dialects.is_taken(error):
                raise Conflict(f"Session '{values['id']}' already exists.") from None
            raise
        return key


def _settings_of(source: Session) -> dict[str, Any]:
    """What a copy has in common with its source."""
    stored = source.stored
    return {
        "language": source.language,
        "persistent": source.persistent,
        "metadata": json.dumps(source.metadata),
        "allow_internet": source.allow_internet,
        "allow_public": source.allow_public,
        "default_timeout": source.default_timeout,
        "code": stored and stored.code,
        "code_description": stored and stored.description,
        "code_updated_at": stored and stored.updated_at,
        "version": 1,
        "ttl": source.ttl,
    }


def _changed(change: SessionChange) -> dict[str, Any]:
    values: dict[str, Any] = {
        name: value
        for name in ("default_timeout", "allow_internet", "allow_public")
        if (value := getattr(change, name)) is not None
    }
    if change.metadata is not None:
        values["metadata"] = json.dumps(change.metadata)
    if change.ttl is not KEEP:
        values["ttl"] = change.ttl
    return values


def _list_query(which: SessionFilter) -> Select[Any]:
    query = SESSIONS.where(IS_LIVE).order_by(sessions.c.key.desc())
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
