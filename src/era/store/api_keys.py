"""API keys, with which owners call the API. Not idempotency keys, and not keys of KV."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from era.core.api_keys import ApiKey, Change
from era.store.database import Database
from era.store.tables import api_keys as _t

_ALL = select(*(_t.c[each.name] for each in fields(ApiKey)), _t.c.digest).order_by(_t.c.created_at, _t.c.id)


class ApiKeyRows:
    """An ApiKeyStore in an SQL database: core/api_keys.py says what each method does."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add_api_key(self, key: ApiKey, digest: str) -> None:
        statement = insert(_t).values(_columns(key, digest))
        await self._database.write(lambda connection: connection.execute(statement))

    async def change_api_key(self, key_id: str, change: Change) -> tuple[ApiKey, str] | None:
        is_it = _t.c.id == key_id

        def job(connection: Connection) -> tuple[ApiKey, str] | None:
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

        return await self._database.write(job)

    async def api_keys(self) -> Sequence[tuple[ApiKey, str]]:
        def job(connection: Connection) -> Sequence[tuple[ApiKey, str]]:
            return [_key_from_row(row) for row in connection.execute(_ALL)]

        return await self._database.read(job)

    async def drop_api_key(self, key_id: str) -> bool:
        statement = delete(_t).where(_t.c.id == key_id)
        return await self._database.write(lambda connection: connection.execute(statement).rowcount > 0)


def _columns(key: ApiKey, digest: str) -> dict[str, Any]:
    values = {each.name: getattr(key, each.name) for each in fields(ApiKey)}
    return values | {"digest": digest, "scopes": " ".join(key.scopes), "quotas": json.dumps(key.quotas)}


def _key_from_row(row: Iterable[Any]) -> tuple[ApiKey, str]:
    *row, digest = row
    values = dict(zip((each.name for each in fields(ApiKey)), row, strict=True))
    values |= {"scopes": tuple(values["scopes"].split()), "quotas": json.loads(values["quotas"])}
    return ApiKey(**values), digest
