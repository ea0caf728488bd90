"""Rows of inboxes and of what was delivered to them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, delete, exists, func, insert, select, update

from era.core.models import OwnedId, Session, now
from era.core.public.inbox import (
    KEPT,
    KEPT_RUN_IDS,
    MAX_PENDING,
    MAX_PENDING_BYTES,
    Content,
    Delivery,
    DeliveryStatus,
    InboxSettings,
    Next,
    Outcome,
    Received,
    no_inbox,
)
from era.core.public.signatures import Verify
from era.errors import Conflict, NotFound, TooManyDeliveries
from era.store.commits import IS_LIVE, Commits
from era.store.tables import deliveries as _d
from era.store.tables import inboxes, sessions

_FIELDS = (
    "key",
    "id",
    "sender_id",
    "received_at",
    "status",
    "attempts",
    "tries",
    "run_ids",
    "next_attempt_at",
    "ended_at",
    "answer_status",
    "reason",
    "method",
    "path",
    "size",
)
_DELIVERIES = select(*(_d.c[name] for name in _FIELDS))
_CONTENT = select(_d.c.method, _d.c.path, _d.c.query, _d.c.headers, _d.c.body, _d.c.base_url)
_WAITING = _d.c.status.in_(("pending", "running"))
_ENDED = _d.c.status.in_(("done", "failed"))
_HAS_PENDING = exists().where(_d.c.session_key == inboxes.c.session_key, _d.c.status == "pending")
_TO_DELIVER = select(inboxes.c.session_key).where(
    _HAS_PENDING,
    exists().where(
        sessions.c.key == inboxes.c.session_key, IS_LIVE, sessions.c.code.is_not(None), sessions.c.allow_public
    ),
)
_OF_SESSION = _d.c.session_key == bindparam("session")
_NEXT = (
    select(
        *(_d.c[name] for name in _FIELDS),
        sessions.c.id.label("session_id"),
        sessions.c.owner,
        sessions.c.code.is_not(None).label("has_code"),
        sessions.c.allow_public,
        inboxes.c.retries,
    )
    .join_from(_d, sessions, sessions.c.key == _d.c.session_key)
    .join(inboxes, inboxes.c.session_key == _d.c.session_key)
    .where(_OF_SESSION, _d.c.status == "pending", IS_LIVE)
    .order_by(_d.c.position)
    .limit(1)
)
_COUNT_ENDED = select(func.count()).where(_OF_SESSION, _ENDED)
_ENDED_KEYS = select(_d.c.key).where(_OF_SESSION, _ENDED)
_DROP_SOME = delete(_d).where(_d.c.key.in_(select(_d.c.key).where(_OF_SESSION).limit(100)))
_LAST_KEY = (1 << 63) - 1


class InboxRows(Commits):
    """The part of SqlStore that deals in inboxes."""

    async def put_inbox(self, session_id: OwnedId, verify: Verify | None, retries: int) -> InboxSettings:
        def job(connection: Connection) -> InboxSettings:
            session, at = self._live(connection, session_id), now()
            before = _inbox(connection, session.key)
            values: dict[str, Any] = {
                "scheme": verify and verify.scheme,
                "header": verify and verify.header,
                "secret": verify and verify.secret,
                "retries": retries,
                "created_at": before.created_at if before else at,
                "updated_at": at,
            }
            if before is None:
                connection.execute(insert(inboxes).values(session_key=session.key, **values))
            else:
                connection.execute(update(inboxes).where(inboxes.c.session_key == session.key).values(values))
            return InboxSettings(verify, retries, values["created_at"], at)

        return await self._write(job)

    async def inbox(self, session_id: OwnedId) -> tuple[InboxSettings, Mapping[DeliveryStatus, int]]:
        counted = select(_d.c.status, func.count()).where(_OF_SESSION).group_by(_d.c.status)

        def job(connection: Connection, session: Session) -> tuple[InboxSettings, Mapping[DeliveryStatus, int]]:
            found = _existing(connection, session)
            counts = {row[0]: int(row[1]) for row in connection.execute(counted, {"session": session.key})}
            return found, counts

        return await self._read_live(session_id, job)

    async def inbox_of(self, session_key: int) -> InboxSettings | None:
        return await self._read(lambda connection: _inbox(connection, session_key))

    async def delete_inbox(self, session_id: OwnedId) -> int:
        def job(connection: Connection) -> int:
            session = self._live(connection, session_id)
            _existing(connection, session)
            connection.execute(delete(inboxes).where(inboxes.c.session_key == session.key))
            return session.key

        values, dropped = {"session": await self._write(job)}, 0
        while count := await self._write(lambda connection: connection.execute(_DROP_SOME, values).rowcount):
            dropped += count
        return dropped

    async def add_delivery(
        self, session_key: int, delivery_id: str, sender_id: str | None, content: Content
    ) -> Received:
        known = select(_d.c.id, _d.c.status).where(_d.c.session_key == session_key, _d.c.sender_id == sender_id)
        headers = json.dumps(content.headers)

        def job(connection: Connection) -> Received:
            if sender_id is not None and (row := connection.execute(known).one_or_none()) is not None:
                return Received(row.id, row.status, first=False)
            size = len(content.body) + len(headers) + len(content.path) + len(content.query)
            _check_room(connection, session_key, size)
            values = {
                "id": delivery_id,
                "session_key": session_key,
                "sender_id": sender_id,
                "position": _last_position(connection, session_key) + 1,
                "status": "pending",
                "attempts": 0,
                "tries": 0,
                "run_ids": "[]",
                "received_at": now(),
                "size": size,
                "method": content.method,
                "path": content.path,
                "query": content.query,
                "base_url": content.base_url,
                "headers": headers,
                "body": content.body,
            }
            connection.execute(insert(_d).values(values))
            return Received(delivery_id, "pending", first=True)

        return await self._write(job)

    async def deliveries(
        self, session_id: OwnedId, *, status: DeliveryStatus | None, limit: int, before: int | None
    ) -> Sequence[Delivery]:
        query = _DELIVERIES.where(_OF_SESSION, _d.c.key < (_LAST_KEY if before is None else before))
        if status is not None:
            query = query.where(_d.c.status == status)
        query = query.order_by(_d.c.key.desc()).limit(limit)

        def job(connection: Connection, session: Session) -> Sequence[Delivery]:
            _existing(connection, session)
            return [_delivery(row) for row in connection.execute(query, {"session": session.key})]

        return await self._read_live(session_id, job)

    async def delivery(self, session_id: OwnedId, delivery_id: str) -> tuple[Delivery, Content]:
        def job(connection: Connection, session: Session) -> tuple[Delivery, Content]:
            found = _found(connection, session, delivery_id)
            return found, _content(connection.execute(_CONTENT.where(_d.c.key == found.key)).one())

        return await self._read_live(session_id, job)

    async def replay_delivery(self, session_id: OwnedId, delivery_id: str) -> tuple[int, Delivery]:
        def job(connection: Connection) -> tuple[int, Delivery]:
            session = self._live(connection, session_id)
            found = _found(connection, session, delivery_id)
            if found.status == "running":
                raise Conflict(
                    f"Delivery '{delivery_id}' is running.", hint="Ask again once it has ended.", code="is_running"
                )
            values: dict[str, Any] = {"status": "pending", "tries": 0, "next_attempt_at": None, "ended_at": None}
            if found.status != "pending":
                _check_room(connection, session.key, found.size)
                values["position"] = _last_position(connection, session.key) + 1
            connection.execute(update(_d).where(_d.c.key == found.key).values(values))
            return session.key, _found(connection, session, delivery_id)

        return await self._write(job)

    async def sessions_to_deliver(self) -> Sequence[int]:
        return await self._read(lambda connection: list(connection.execute(_TO_DELIVER).scalars()))

    async def next_delivery(self, session_key: int) -> Next | None:
        def job(connection: Connection) -> Next | None:
            row = connection.execute(_NEXT, {"session": session_key}).one_or_none()
            if row is None:
                return None
            why_not = None
            if not row.allow_public:
                why_not = "The session is not public."
            elif not row.has_code:
                why_not = "The session stores no code."
            return Next(_delivery(row), session_key, OwnedId(row.owner, row.session_id), row.retries, why_not)

        return await self._read(job)

    async def content(self, delivery_key: int) -> Content | None:
        def job(connection: Connection) -> Content | None:
            row = connection.execute(_CONTENT.where(_d.c.key == delivery_key)).one_or_none()
            return None if row is None else _content(row)

        return await self._read(job)

    async def begin_attempt(self, delivery: Delivery, run_id: str) -> None:
        values = {
            "status": "running",
            "attempts": delivery.attempts + 1,
            "tries": delivery.tries + 1,
            "run_ids": json.dumps([*delivery.run_ids, run_id][-KEPT_RUN_IDS:]),
            "next_attempt_at": None,
            "reason": None,
        }
        begun = update(_d).where(_d.c.key == delivery.key).values(values)
        await self._write(lambda connection: connection.execute(begun))

    async def end_attempt(self, session_key: int, delivery_key: int, outcome: Outcome) -> None:
        ended = outcome.status in ("done", "failed")
        values = {
            "status": outcome.status,
            "attempts": outcome.attempts,
            "tries": outcome.tries,
            "answer_status": outcome.answer_status,
            "reason": outcome.reason,
            "next_attempt_at": outcome.next_attempt_at,
            "ended_at": now() if ended else None,
        }

        def job(connection: Connection) -> None:
            connection.execute(update(_d).where(_d.c.key == delivery_key).values(values))
            if ended:
                _prune(connection, session_key)

        await self._write(job)

    async def note_reason(self, delivery_key: int, reason: str) -> None:
        noted = update(_d).where(_d.c.key == delivery_key).values(reason=reason)
        await self._write(lambda connection: connection.execute(noted))

    async def cut_off(self) -> int:
        running = exists().where(_d.c.session_key == inboxes.c.session_key, _d.c.status == "running")
        having = select(inboxes.c.session_key).where(running)
        back = update(_d).where(_d.c.session_key.in_(having), _d.c.status == "running").values(status="pending")
        if not await self._read(lambda connection: connection.execute(having.limit(1)).first()):
            return 0
        return await self._write(lambda connection: connection.execute(back).rowcount)


def _inbox(connection: Connection, session_key: int) -> InboxSettings | None:
    row = connection.execute(select(inboxes).where(inboxes.c.session_key == session_key)).one_or_none()
    if row is None:
        return None
    verify = None if row.scheme is None else Verify(row.scheme, row.secret, row.header)
    return InboxSettings(verify, row.retries, row.created_at, row.updated_at)


def _existing(connection: Connection, session: Session) -> InboxSettings:
    """Raises NotFound."""
    found = _inbox(connection, session.key)
    if found is None:
        raise no_inbox(session.id)
    return found


def _found(connection: Connection, session: Session, delivery_id: str) -> Delivery:
    """Raises NotFound."""
    _existing(connection, session)
    query = _DELIVERIES.where(_OF_SESSION, _d.c.id == delivery_id)
    row = connection.execute(query, {"session": session.key}).one_or_none()
    if row is None:
        raise NotFound(
            f"The inbox of session '{session.id}' has no delivery '{delivery_id[:80]}'.",
            hint=f"GET /api/sessions/{{id}}/inbox/deliveries lists them. Of those that ended, {KEPT} are kept.",
            code="no_such_delivery",
        )
    return _delivery(row)


def _check_room(connection: Connection, session_key: int, size: int) -> None:
    """Raises TooManyDeliveries where one more, this large, can't wait."""
    waiting = select(func.count(), func.coalesce(func.sum(_d.c.size), 0)).where(_OF_SESSION, _WAITING)
    count, total = connection.execute(waiting, {"session": session_key}).one()
    if count >= MAX_PENDING or total + size > MAX_PENDING_BYTES:
        raise TooManyDeliveries("As many deliveries wait in this session's inbox as may.")


def _prune(connection: Connection, session_key: int) -> None:
    """Drop the oldest of those that ended, now and then: others wait for this thread."""
    values = {"session": session_key}
    if connection.execute(_COUNT_ENDED, values).scalar_one() <= KEPT + KEPT // 10:
        return
    keys = sorted(connection.execute(_ENDED_KEYS, values).scalars())
    connection.execute(delete(_d).where(_d.c.key.in_(keys[: len(keys) - KEPT])))


def _last_position(connection: Connection, session_key: int) -> int:
    """Of a session's deliveries."""
    # One lookup in the index for each status; over all of them at once it would be a walk.
    last = [
        connection.execute(
            select(func.max(_d.c.position)).where(_OF_SESSION, _d.c.status == status), {"session": session_key}
        ).scalar()
        for status in ("pending", "running", "done", "failed")
    ]
    return max(one or 0 for one in last)


def _delivery(row: Any) -> Delivery:
    """A row that begins as `_DELIVERIES` does."""
    values = dict(zip(_FIELDS, row, strict=False))
    return Delivery(**{**values, "run_ids": json.loads(values["run_ids"])})


def _content(row: Any) -> Content:
    headers = [(name, value) for name, value in json.loads(row.headers)]
    return Content(row.method, row.path, row.query, headers, bytes(row.body), row.base_url)
