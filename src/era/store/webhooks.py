"""Webhooks and their notices, and `tell`, which adds notices to the transaction that makes them true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy import ColumnElement, Connection, bindparam, delete, func, insert, select, update

from era.core.models import JsonObject, new_id, now, timestamp
from era.core.owners.webhooks import (
    KEPT,
    MAX_PENDING,
    MAX_WEBHOOKS,
    Event,
    Notice,
    NoticeStatus,
    Tried,
    Webhook,
    body_of,
)
from era.errors import Conflict, NotFound
from era.store.engine.tables import has_status, runs, sessions
from era.store.engine.tables import webhook_notices as _n
from era.store.engine.tables import webhooks as _w
from era.store.rows import Rows, reads, writes

_WEBHOOKS = select(*(_w.c[each.name] for each in fields(Webhook))).order_by(_w.c.created_at, _w.c.id)
_NOTICES = select(*(_n.c[each.name] for each in fields(Notice)))
_PENDING = has_status(_n, "pending")
_ENDED = _n.c.status != "pending"
_OF_WEBHOOK = _n.c.webhook_id == bindparam("of_webhook")
_IS_DUE = func.coalesce(_n.c.next_attempt_at, 0) <= bindparam("at")
_OLDEST = select(func.min(_n.c.key)).where(_PENDING)
_DUE = select(_w.c.id, _w.c.owner).join_from(_n, _w, _w.c.id == _n.c.webhook_id)
_DUE = _DUE.where(_n.c.key.in_(_OLDEST.group_by(_n.c.webhook_id)), _IS_DUE)
_NEXT_DUE = _NOTICES.where(_n.c.key == _OLDEST.where(_OF_WEBHOOK).scalar_subquery(), _IS_DUE)
_LISTENING = (
    select(_w.c.id, _w.c.events, func.count(_n.c.key))
    .select_from(_w.outerjoin(_n, (_n.c.webhook_id == _w.c.id) & _PENDING))
    .where(_w.c.owner == bindparam("of_owner"))
    .group_by(_w.c.id, _w.c.events)
)
"""An owner's webhooks with their events, and how many notices of each wait."""

_TOO_OLD = select(_n.c.key).where(_OF_WEBHOOK, _ENDED).order_by(_n.c.key.desc()).limit(1).offset(KEPT)
_OWNED_RUNS = select(sessions.c.owner, sessions.c.id, runs.c.id).join_from(
    runs, sessions, sessions.c.key == runs.c.session_key
)
_LOST: JsonObject = {"status": "lost", "exit_code": None, "duration_ms": None, "committed": False, "version": None}


def tell(connection: Connection, owner: str, event: Event, data: JsonObject) -> None:
    """Tell an owner's webhooks that something has happened, if this transaction is committed."""
    for webhook_id, events, pending in connection.execute(_LISTENING, {"of_owner": owner}).all():
        if event not in events.split():
            continue
        if pending >= MAX_PENDING:
            connection.execute(update(_w).where(_w.c.id == webhook_id).values(dropped=_w.c.dropped + 1))
            continue
        at, notice_id = now(), new_id("evt")
        values = {
            "id": notice_id,
            "webhook_id": webhook_id,
            "event": event,
            "body": body_of(notice_id, owner, event, timestamp(at), data),
            "status": "pending",
            "tries": 0,
            "created_at": at,
        }
        connection.execute(insert(_n).values(values))


def tell_lost(connection: Connection, are_lost: ColumnElement[bool]) -> None:
    """Tell the owners of these runs that they are lost, before they are marked so."""
    for owner, session_id, run_id in connection.execute(_OWNED_RUNS.where(are_lost)).all():
        tell(connection, owner, "run.ended", {"run_id": run_id, "session_id": session_id, **_LOST})


class WebhookRows(Rows):
    """A WebhookStore in an SQL database: core/owners/webhooks.py says what each method does."""

    @writes
    def add_webhook(self, connection: Connection, webhook: Webhook) -> None:
        count = select(func.count()).select_from(_w).where(_w.c.owner == webhook.owner)
        if connection.execute(count).scalar_one() >= MAX_WEBHOOKS:
            raise Conflict(
                f"You have {MAX_WEBHOOKS} webhooks already.",
                hint="Delete one first: DELETE /api/webhooks/{webhook_id}.",
                code="too_many_webhooks",
            )
        values = {each.name: getattr(webhook, each.name) for each in fields(Webhook)}
        connection.execute(insert(_w).values({**values, "events": " ".join(webhook.events)}))

    async def webhooks(self, owner: str) -> Sequence[tuple[Webhook, Mapping[NoticeStatus, int]]]:
        counts = select(_n.c.webhook_id, _n.c.status, func.count()).group_by(_n.c.webhook_id, _n.c.status)
        of_owner = select(_w.c.id).where(_w.c.owner == owner)

        def job(connection: Connection) -> Sequence[tuple[Webhook, Mapping[NoticeStatus, int]]]:
            found: dict[str, dict[NoticeStatus, int]] = {}
            for webhook_id, status, count in connection.execute(counts.where(_n.c.webhook_id.in_(of_owner))):
                found.setdefault(webhook_id, {})[status] = int(count)
            rows = connection.execute(_WEBHOOKS.where(_w.c.owner == owner))
            return [(webhook, found.get(webhook.id, {})) for webhook in map(_webhook_from_row, rows)]

        return await self.database.read_for(owner, job)

    @writes
    def drop_webhook(self, connection: Connection, owner: str, webhook_id: str) -> None:
        if not connection.execute(delete(_w).where(_w.c.id == webhook_id, _w.c.owner == owner)).rowcount:
            raise _no_webhook(webhook_id)
        connection.execute(delete(_n).where(_OF_WEBHOOK), {"of_webhook": webhook_id})

    async def notices(self, owner: str, webhook_id: str) -> Sequence[Notice]:
        def job(connection: Connection) -> Sequence[Notice]:
            if not connection.execute(select(_w.c.id).where(_w.c.id == webhook_id, _w.c.owner == owner)).first():
                raise _no_webhook(webhook_id)
            rows = connection.execute(_NOTICES.where(_OF_WEBHOOK).order_by(_n.c.key.desc()), {"of_webhook": webhook_id})
            return [Notice(*row) for row in rows]

        return await self.database.read_for(owner, job)

    @writes
    def replay_notice(self, connection: Connection, owner: str, webhook_id: str, notice_id: str) -> Notice:
        again = {"status": "pending", "tries": 0, "next_attempt_at": None, "ended_at": None}
        mine = select(_w.c.id).where(_w.c.id == webhook_id, _w.c.owner == owner).scalar_subquery()
        this = _NOTICES.where(_n.c.webhook_id == mine, _n.c.id == notice_id)
        if (row := connection.execute(this.with_for_update(of=_n)).one_or_none()) is None:
            raise NotFound(
                f"You have no notice '{notice_id[:80]}' of a webhook '{webhook_id[:80]}'.",
                hint=f"GET /api/webhooks/{{webhook_id}}/deliveries lists them. Of those that ended it has {KEPT}.",
            )
        notice = Notice(*row)
        if notice.status == "pending":
            connection.execute(update(_n).where(_n.c.key == notice.key).values(again))
        else:  # a new row, since what was there first is sent first
            connection.execute(delete(_n).where(_n.c.key == notice.key))
            values = {each.name: getattr(notice, each.name) for each in fields(Notice) if each.name != "key"}
            connection.execute(insert(_n).values({**values, **again}))
        return Notice(*connection.execute(this).one())

    async def pending(self) -> int:
        count = select(func.count()).select_from(_n).where(_PENDING)
        return await self.database.read(lambda connection: int(connection.execute(count).scalar_one()))

    @writes
    def tell(self, connection: Connection, owner: str, event: Event, data: JsonObject) -> None:
        tell(connection, owner, event, data)

    @reads
    def due(self, connection: Connection) -> Mapping[str, str]:
        return {row.id: row.owner for row in connection.execute(_DUE, {"at": now()})}

    @reads
    def next_due(self, connection: Connection, webhook_id: str) -> tuple[Webhook, Notice] | None:
        notice = connection.execute(_NEXT_DUE, {"of_webhook": webhook_id, "at": now()}).one_or_none()
        webhook = connection.execute(_WEBHOOKS.where(_w.c.id == webhook_id)).one_or_none()
        return (_webhook_from_row(webhook), Notice(*notice)) if webhook and notice else None

    @writes
    def tried(self, connection: Connection, notice: Notice, tried: Tried) -> None:
        values = {each.name: getattr(tried, each.name) for each in fields(Tried)}
        values["ended_at"] = None if tried.status == "pending" else now()
        this_try = (_n.c.key == notice.key, _PENDING, _n.c.tries == notice.tries)
        connection.execute(update(_n).where(*this_try).values(values))
        of_webhook = {"of_webhook": notice.webhook_id}
        last = connection.execute(_TOO_OLD, of_webhook).scalar_one_or_none()
        if last is not None:
            connection.execute(delete(_n).where(_OF_WEBHOOK, _ENDED, _n.c.key <= last), of_webhook)


def _webhook_from_row(row: Any) -> Webhook:
    values = dict(zip((each.name for each in fields(Webhook)), row, strict=True))
    return Webhook(**{**values, "events": tuple(values["events"].split())})


def _no_webhook(webhook_id: str) -> NotFound:
    return NotFound(f"You have no webhook '{webhook_id[:80]}'.", hint="GET /api/webhooks lists those you have.")
