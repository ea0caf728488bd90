"""Inboxes, to which webhooks are delivered, and their deliveries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from era.core.models import OwnedId, Session, now
from era.core.public.inbox import (
    KEPT,
    KEPT_RUN_IDS,
    MAX_PENDING,
    MAX_PENDING_BYTES,
    Backlog,
    Content,
    Delivery,
    DeliveryStatus,
    InboxSettings,
    Next,
    Outcome,
    Received,
    no_inbox,
)
from era.core.signatures import Verify
from era.errors import Conflict, NotFound, TooManyDeliveries
from era.store.engine.tables import deliveries as _d
from era.store.engine.tables import has_status, inboxes, sessions
from era.store.homes import check_home
from era.store.rows import Rows, reads, writes
from era.store.session_lookup import IS_PRESENT, find_session, read_session, session_with_key

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
_UNFINISHED = _d.c.status.in_(("pending", "running"))
_ENDED = _d.c.status.in_(("done", "failed"))
_PENDING, _RUNS = has_status(_d, "pending"), has_status(_d, "running")
_IS_DUE = func.coalesce(_d.c.next_attempt_at, 0) <= bindparam("now")
_CAN_RUN = IS_PRESENT & sessions.c.code.is_not(None) & sessions.c.allow_public
_QUEUES = select(_d.c.session_key).where(_PENDING).distinct().subquery()
_other = _d.alias()
_FIRST = select(func.min(_other.c.position)).where(
    _other.c.session_key == _QUEUES.c.session_key, _other.c.status == bindparam("pending")
)
_DUE = (
    select(sessions.c.key, sessions.c.owner)
    .join_from(_QUEUES, sessions, sessions.c.key == _QUEUES.c.session_key)
    .join(_d, (_d.c.session_key == sessions.c.key) & (_d.c.status == bindparam("pending")))
    .where(_d.c.position == _FIRST.scalar_subquery(), _IS_DUE, _CAN_RUN)
)
"""Finds the first delivery of each queue by a look-up in an index: 10 ms where 50,000 are pending in five queues. The
status is a parameter, so that SQLite doesn't take the index of all that is pending, which has no positions."""

_WAITING = select(func.count()).select_from(_d).where(_PENDING)
_OLDEST = (
    select(func.min(_d.c.received_at))
    .join_from(_d, sessions, sessions.c.key == _d.c.session_key)
    .where(_PENDING, _IS_DUE, _CAN_RUN)
)

_OF_SESSION = _d.c.session_key == bindparam("session")
_NEXT = (
    select(
        *(_d.c[name] for name in _FIELDS),
        *(_d.c[name] for name in ("query", "headers", "body", "base_url")),
        sessions.c.id.label("session_id"),
        sessions.c.owner,
        sessions.c.code.is_not(None).label("has_code"),
        sessions.c.allow_public,
        inboxes.c.retries,
    )
    .join_from(_d, sessions, sessions.c.key == _d.c.session_key)
    .join(inboxes, inboxes.c.session_key == _d.c.session_key)
    .where(_OF_SESSION, _PENDING, IS_PRESENT)
    .order_by(_d.c.position)
    .limit(1)
)
_COUNT_ENDED = select(func.count()).where(_OF_SESSION, _ENDED)
_ENDED_KEYS = select(_d.c.key).where(_OF_SESSION, _ENDED)
_DROPPED_AT_ONCE = 100
_SOME = select(_d.c.key).where(_OF_SESSION).order_by(_d.c.key).limit(_DROPPED_AT_ONCE)
_DROP_SOME = delete(_d).where(_d.c.key.in_(_SOME))
_TO_BEGIN = _DELIVERIES.add_columns(_d.c.session_key).where(_d.c.key == bindparam("delivery"), _PENDING)
_COUNTS = select(_d.c.status, func.count()).where(_OF_SESSION).group_by(_d.c.status)
_LAST_KEY = (1 << 63) - 1


class InboxRows(Rows):
    """Inboxes and deliveries in an SQL database: `InboxStore` in core/public/inbox.py says what each method does."""

    @writes
    def put_inbox(
        self, connection: Connection, session_id: OwnedId, verify: Verify | None, retries: int
    ) -> InboxSettings:
        session, at = find_session(connection, self.retention, session_id), now()
        old = _find_inbox(connection, session.key)
        values: dict[str, Any] = {
            "scheme": verify and verify.scheme,
            "header": verify and verify.header,
            "secret": verify and verify.secret,
            "retries": retries,
            "created_at": old.created_at if old else at,
            "updated_at": at,
        }
        if old is None:
            connection.execute(insert(inboxes).values(session_key=session.key, **values))
        else:
            connection.execute(update(inboxes).where(inboxes.c.session_key == session.key).values(values))
        return InboxSettings(verify, retries, values["created_at"], at)

    async def inbox(self, session_id: OwnedId) -> tuple[InboxSettings, Mapping[DeliveryStatus, int]]:
        def job(connection: Connection, session: Session) -> tuple[InboxSettings, Mapping[DeliveryStatus, int]]:
            settings = _existing_inbox(connection, session)
            counts = {row[0]: int(row[1]) for row in connection.execute(_COUNTS, {"session": session.key})}
            return settings, counts

        return await read_session(self.database, self.retention, session_id, job)

    @reads
    def inbox_of(self, connection: Connection, session_key: int) -> InboxSettings | None:
        return _find_inbox(connection, session_key)

    async def delete_inbox(self, session_id: OwnedId) -> int:
        def drop(connection: Connection) -> int:
            session = find_session(connection, self.retention, session_id)
            _existing_inbox(connection, session)
            count = connection.execute(_DROP_SOME, {"session": session.key}).rowcount
            if count < _DROPPED_AT_ONCE:  # It goes with the last: more may come at any time as long as it is there.
                connection.execute(delete(inboxes).where(inboxes.c.session_key == session.key))
            return count

        dropped = count = await self.database.write(drop)
        while count == _DROPPED_AT_ONCE:
            count = await self.database.write(drop)
            dropped += count
        return dropped

    @writes
    def add_delivery(
        self, connection: Connection, session_key: int, delivery_id: str, sender_id: str | None, content: Content
    ) -> Received:
        known = select(_d.c.id, _d.c.status).where(_d.c.session_key == session_key, _d.c.sender_id == sender_id)
        headers = json.dumps(content.headers)
        if _find_inbox(connection, session_key) is None:  # It was deleted since the caller looked.
            raise no_inbox(session_with_key(connection, session_key).id)
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

    async def deliveries(
        self, session_id: OwnedId, *, status: DeliveryStatus | None, limit: int, before: int | None
    ) -> Sequence[Delivery]:
        query = _DELIVERIES.where(_OF_SESSION, _d.c.key < (_LAST_KEY if before is None else before))
        if status is not None:
            query = query.where(_d.c.status == status)
        query = query.order_by(_d.c.key.desc()).limit(limit)

        def job(connection: Connection, session: Session) -> Sequence[Delivery]:
            _existing_inbox(connection, session)
            return [_delivery_from_row(row) for row in connection.execute(query, {"session": session.key})]

        return await read_session(self.database, self.retention, session_id, job)

    async def delivery(self, session_id: OwnedId, delivery_id: str) -> tuple[Delivery, Content]:
        def job(connection: Connection, session: Session) -> tuple[Delivery, Content]:
            delivery = _find_delivery(connection, session, delivery_id)
            row = connection.execute(_CONTENT.where(_d.c.key == delivery.key)).one()
            return delivery, _content_from_row(row)

        return await read_session(self.database, self.retention, session_id, job)

    @writes
    def replay_delivery(self, connection: Connection, session_id: OwnedId, delivery_id: str) -> tuple[int, Delivery]:
        session = find_session(connection, self.retention, session_id)
        delivery = _find_delivery(connection, session, delivery_id)
        if delivery.status == "running":
            raise Conflict(
                f"Delivery '{delivery_id}' is running.", hint="Ask again once it has ended.", code="is_running"
            )
        values: dict[str, Any] = {"status": "pending", "tries": 0, "next_attempt_at": None, "ended_at": None}
        if delivery.status != "pending":
            _check_room(connection, session.key, delivery.size)
            values["position"] = _last_position(connection, session.key) + 1
        connection.execute(update(_d).where(_d.c.key == delivery.key).values(values))
        return session.key, _find_delivery(connection, session, delivery_id)

    @reads
    def backlog(self, connection: Connection) -> Backlog:
        oldest = connection.execute(_OLDEST, {"now": now()}).scalar_one()
        return Backlog(int(connection.execute(_WAITING).scalar_one()), oldest)

    @reads
    def due(self, connection: Connection) -> Mapping[int, str]:
        return {row.key: row.owner for row in connection.execute(_DUE, {"now": now(), "pending": "pending"})}

    @reads
    def next_delivery(self, connection: Connection, session_key: int) -> Next | None:
        row = connection.execute(_NEXT, {"session": session_key}).one_or_none()
        if row is None:
            return None
        why_not = None
        if not row.allow_public:
            why_not = "The session is not public."
        elif not row.has_code:
            why_not = "The session stores no code."
        session_id = OwnedId(row.owner, row.session_id)
        return Next(_delivery_from_row(row), _content_from_row(row), session_key, session_id, row.retries, why_not)

    @reads
    def is_pending(self, connection: Connection, delivery_key: int) -> bool:
        return connection.execute(select(_d.c.key).where(_d.c.key == delivery_key, _PENDING)).first() is not None

    @writes
    def begin_attempt(self, connection: Connection, delivery_key: int, run_id: str, *, counts: bool) -> Delivery | None:
        row = connection.execute(_TO_BEGIN, {"delivery": delivery_key}).one_or_none()
        if row is None:
            return None
        check_home(connection, row.session_key, goes_on=True)
        delivery = _delivery_from_row(row)
        values = {
            "status": "running",
            "attempts": delivery.attempts + 1,
            "tries": delivery.tries + counts,
            "run_ids": json.dumps([*delivery.run_ids, run_id][-KEPT_RUN_IDS:]),
            "next_attempt_at": None,
            "reason": None,
        }
        connection.execute(update(_d).where(_d.c.key == delivery_key).values(values))
        return delivery

    @writes
    def end_attempt(self, connection: Connection, session_key: int, delivery: Delivery, outcome: Outcome) -> None:
        ended = outcome.status in ("done", "failed")
        is_under_way = _RUNS & (_d.c.attempts == delivery.attempts + 1)
        is_as_before = _PENDING & (_d.c.attempts == delivery.attempts) & (_d.c.tries == delivery.tries)
        which = (_d.c.key == delivery.key) & (is_under_way | is_as_before)
        values = {
            "status": outcome.status,
            "attempts": outcome.attempts,
            "tries": outcome.tries,
            "answer_status": outcome.answer_status,
            "reason": outcome.reason,
            "next_attempt_at": outcome.next_attempt_at,
            "ended_at": now() if ended else None,
        }
        check_home(connection, session_key, goes_on=True)
        connection.execute(update(_d).where(which).values(values))
        if ended:
            _prune(connection, session_key)

    @writes
    def put_off(self, connection: Connection, delivery_key: int, reason: str, next_attempt_at: int | None) -> None:
        values = {"reason": reason, "next_attempt_at": next_attempt_at}
        connection.execute(update(_d).where(_d.c.key == delivery_key, _PENDING).values(values))

    @writes
    def count_none_running(self, connection: Connection) -> None:
        connection.execute(update(_d).where(_RUNS).values(tries=_d.c.tries - 1))

    @writes
    def cut_off(self, connection: Connection) -> int:
        return connection.execute(update(_d).where(_RUNS).values(status="pending")).rowcount


def _find_inbox(connection: Connection, session_key: int) -> InboxSettings | None:
    row = connection.execute(select(inboxes).where(inboxes.c.session_key == session_key)).one_or_none()
    if row is None:
        return None
    verify = None if row.scheme is None else Verify(row.scheme, row.secret, row.header)
    return InboxSettings(verify, row.retries, row.created_at, row.updated_at)


def _existing_inbox(connection: Connection, session: Session) -> InboxSettings:
    """The session's inbox. Raises NotFound."""
    settings = _find_inbox(connection, session.key)
    if settings is None:
        raise no_inbox(session.id)
    return settings


def _find_delivery(connection: Connection, session: Session, delivery_id: str) -> Delivery:
    """A delivery to the session's inbox. Raises NotFound."""
    _existing_inbox(connection, session)
    query = _DELIVERIES.where(_OF_SESSION, _d.c.id == delivery_id)
    row = connection.execute(query, {"session": session.key}).one_or_none()
    if row is None:
        raise NotFound(
            f"The inbox of session '{session.id}' has no delivery '{delivery_id[:80]}'.",
            hint=f"GET /api/sessions/{{id}}/inbox/deliveries lists them. Of those that ended, {KEPT} are kept.",
            code="no_such_delivery",
        )
    return _delivery_from_row(row)


def _check_room(connection: Connection, session_key: int, size: int) -> None:
    """Raises TooManyDeliveries where another delivery of `size` bytes would be too many, or too much, to hold."""
    totals = select(func.count(), func.coalesce(func.sum(_d.c.size), 0)).where(_OF_SESSION, _UNFINISHED)
    count, total = connection.execute(totals, {"session": session_key}).one()
    if count >= MAX_PENDING or total + size > MAX_PENDING_BYTES:
        raise TooManyDeliveries("As many deliveries wait in this session's inbox as may.")


def _prune(connection: Connection, session_key: int) -> None:
    """Drop a session's oldest ended deliveries once they are a tenth more than are kept. Not at each end: others wait
    for this thread."""
    values = {"session": session_key}
    if connection.execute(_COUNT_ENDED, values).scalar_one() <= KEPT + KEPT // 10:
        return
    keys = sorted(connection.execute(_ENDED_KEYS, values).scalars())
    connection.execute(delete(_d).where(_d.c.key.in_(keys[: len(keys) - KEPT])))


def _last_position(connection: Connection, session_key: int) -> int:
    """The highest `position` of a session's deliveries, 0 where it has none."""
    # One lookup in the index for each status; over all of them at once it would be a walk.
    by_status = [
        connection.execute(
            select(func.max(_d.c.position)).where(_OF_SESSION, _d.c.status == status), {"session": session_key}
        ).scalar()
        for status in ("pending", "running", "done", "failed")
    ]
    return max(position or 0 for position in by_status)


def _delivery_from_row(row: Any) -> Delivery:
    """Convert a row whose first columns are those of `_DELIVERIES`."""
    values = dict(zip(_FIELDS, row, strict=False))
    return Delivery(**{**values, "run_ids": json.loads(values["run_ids"])})


def _content_from_row(row: Any) -> Content:
    """Convert a row of `_CONTENT`."""
    headers = [(name, value) for name, value in json.loads(row.headers)]
    return Content(row.method, row.path, row.query, headers, bytes(row.body), row.base_url)
