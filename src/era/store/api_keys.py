"""API keys, with which owners call the API. Not idempotency keys, and not keys of KV."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, delete, insert, select

from era.core.api_keys import ApiKey
from era.store.database import Database
from era.store.tables import api_keys as _t

_ALL = select(_t.c.id, _t.c.owner, _t.c.description, _t.c.created_at, _t.c.digest).order_by(_t.c.created_at, _t.c.id)


class ApiKeyRows:
    """An ApiKeyStore in an SQL database: core/api_keys.py says what each method does."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add_api_key(self, key: ApiKey, digest: str) -> None:
        values = {"id": key.id, "owner": key.owner, "description": key.description, "created_at": key.created_at}
        await self._database.write(lambda connection: connection.execute(insert(_t).values(digest=digest, **values)))

    async def api_keys(self) -> Sequence[tuple[ApiKey, str]]:
        def job(connection: Connection) -> Sequence[tuple[ApiKey, str]]:
            return [(ApiKey(*fields), digest) for *fields, digest in connection.execute(_ALL)]

        return await self._database.read(job)

    async def drop_api_key(self, key_id: str) -> bool:
        statement = delete(_t).where(_t.c.id == key_id)
        return await self._database.write(lambda connection: connection.execute(statement).rowcount > 0)
