"""API keys, with which owners call the API. Not idempotency keys, and not keys of KV."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from era.core.api_keys import ApiKey, Change
from era.store.rows import Rows, reads, writes
from era.store.tables import api_keys as _t

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
