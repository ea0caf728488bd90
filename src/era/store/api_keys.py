"""API keys, with which owners call the API, and the audit log of who changed what.

Entries of the log are numbered by owner, so one number tells which are beyond the newest ones and can go.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy import Connection, Row, bindparam, delete, func, insert, select, update

from era.core import jsontext
from era.core.owners.api_keys import ApiKey, Change
from era.core.owners.audit import AuditEntry, AuditFilter
from era.store.engine.tables import api_keys as _t
from era.store.engine.tables import audit as _log
from era.store.rows import Rows, reads, writes

_ALL = select(*(_t.c[each.name] for each in fields(ApiKey)), _t.c.digest).order_by(_t.c.created_at, _t.c.id)


class ApiKeyRows(Rows):
    @writes
    def add_api_key(self, connection: Connection, key: ApiKey, digest: str) -> None:
        connection.execute(insert(_t).values(_columns(key, digest)))

    @writes
    def change_api_key(self, connection: Connection, key_id: str, change: Change) -> tuple[ApiKey, str] | None:
        is_it = _t.c.id == key_id
        row = connection.execute(_ALL.where(is_it)).one_or_none()
        if row is None:
            return None
        before = _key_from_row(row)
        after = change(*before)
        old = _columns(*before)
        new = {name: value for name, value in _columns(*after).items() if value != old[name]}
        if new:
            connection.execute(update(_t).where(is_it).values(new))
        return after

    @reads
    def api_keys(self, connection: Connection) -> Sequence[tuple[ApiKey, str]]:
        return [_key_from_row(row) for row in connection.execute(_ALL)]

    @writes
    def drop_api_key(self, connection: Connection, key_id: str) -> bool:
        return connection.execute(delete(_t).where(_t.c.id == key_id)).rowcount > 0


def _columns(key: ApiKey, digest: str) -> dict[str, Any]:
    values = {each.name: getattr(key, each.name) for each in fields(ApiKey)}
    return values | {"digest": digest, "scopes": " ".join(key.scopes), "quotas": json.dumps(key.quotas)}


def _key_from_row(row: Iterable[Any]) -> tuple[ApiKey, str]:
    *row, digest = row
    values = dict(zip((each.name for each in fields(ApiKey)), row, strict=True))
    values |= {"scopes": tuple(values["scopes"].split()), "quotas": json.loads(values["quotas"])}
    return ApiKey(**values), digest


_FIELDS = ("at", "owner", "key_id", "action", "target", "request_id")
_NEWEST = select(func.coalesce(func.max(_log.c.number), 0)).where(_log.c.owner == bindparam("owner"))
_OLD = delete(_log).where(_log.c.owner == bindparam("of_owner"), _log.c.number <= bindparam("last"))


class AuditRows(Rows):
    @writes
    def add_audit_entries(self, connection: Connection, entries: Sequence[AuditEntry], kept: int) -> None:
        owner = entries[0].owner
        last = connection.execute(_NEWEST, {"owner": owner}).scalar_one()
        rows = [{**_values(entry), "number": number} for number, entry in enumerate(entries, last + 1)]
        connection.execute(insert(_log), rows)
        connection.execute(_OLD, {"of_owner": owner, "last": last + len(rows) - kept})

    async def audit_entries(self, which: AuditFilter) -> Sequence[AuditEntry]:
        query = select(*(_log.c[name] for name in _FIELDS), _log.c.details, _log.c.key)
        query = query.order_by(_log.c.key.desc()).limit(which.limit)
        for column, value in (
            (_log.c.owner, which.owner),
            (_log.c.action, which.action),
            (_log.c.target, which.target),
        ):
            if value is not None:
                query = query.where(column == value)
        if which.since is not None:
            query = query.where(_log.c.at >= which.since)
        if which.until is not None:
            query = query.where(_log.c.at < which.until)
        if which.before_key is not None:
            query = query.where(_log.c.key < which.before_key)

        def job(connection: Connection) -> Sequence[AuditEntry]:
            return [_entry(row) for row in connection.execute(query)]

        return await self.database.read_for(which.owner or "", job)


def _values(entry: AuditEntry) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in _FIELDS} | {"details": jsontext.compact(entry.details)}


def _entry(row: Row[*tuple[Any, ...]]) -> AuditEntry:
    named = row._asdict()
    return AuditEntry(**{**named, "details": json.loads(row.details)})
