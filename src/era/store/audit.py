"""The audit log. Each owner's entries are numbered, so that what is beyond the newest ones is found by one number."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, bindparam, delete, func, insert, select

from era.core import jsontext
from era.core.audit import AuditEntry, AuditFilter
from era.store.rows import Rows, writes
from era.store.tables import audit as _t

_FIELDS = ("at", "owner", "key_id", "action", "target", "request_id")
_NEWEST = select(func.coalesce(func.max(_t.c.number), 0)).where(_t.c.owner == bindparam("owner"))
_OLD = delete(_t).where(_t.c.owner == bindparam("of_owner"), _t.c.number <= bindparam("last"))


class AuditRows(Rows):
    @writes
    def add_audit_entries(self, connection: Connection, entries: Sequence[AuditEntry], kept: int) -> None:
        owner = entries[0].owner
        last = connection.execute(_NEWEST, {"owner": owner}).scalar_one()
        rows = [{**_values(entry), "number": number} for number, entry in enumerate(entries, last + 1)]
        connection.execute(insert(_t), rows)
        connection.execute(_OLD, {"of_owner": owner, "last": last + len(rows) - kept})

    async def audit_entries(self, which: AuditFilter) -> Sequence[AuditEntry]:
        query = select(*(_t.c[name] for name in _FIELDS), _t.c.details, _t.c.key)
        query = query.order_by(_t.c.key.desc()).limit(which.limit)
        for column, value in ((_t.c.owner, which.owner), (_t.c.action, which.action), (_t.c.target, which.target)):
            if value is not None:
                query = query.where(column == value)
        if which.since is not None:
            query = query.where(_t.c.at >= which.since)
        if which.until is not None:
            query = query.where(_t.c.at < which.until)
        if which.before_key is not None:
            query = query.where(_t.c.key < which.before_key)

        def job(connection: Connection) -> Sequence[AuditEntry]:
            return [_entry(row) for row in connection.execute(query)]

        return await self.database.read_for(which.owner or "", job)


def _values(entry: AuditEntry) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in _FIELDS} | {"details": jsontext.compact(entry.details)}


def _entry(row: Row[*tuple[Any, ...]]) -> AuditEntry:
    named = row._asdict()
    return AuditEntry(**{**named, "details": json.loads(row.details)})
