"""Rows of API keys."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, delete, insert, select

from era.core.api_keys import ApiKey
from era.store.database import Database
from era.store.tables import api_keys as _t

_ALL = select(_t.c.id, _t.c.owner, _t.c.description, _t.c.created_at, _t.c.digest).order_by(_t.c.created_at, _t.c.id)


class ApiKeyRows(Database):
    """An ApiKeyStore: see core/api_keys.py."""

    async def add_api_key(self, key: ApiKey, digest: str) -> None:
        values = {"id": key.id, "owner": key.owner, "description": key.description, "created_at": key.created_at}
        await self._write(lambda connection: connection.execute(insert(_t).values(digest=digest, **values)))

    async def api_keys(self) -> Sequence[tuple[ApiKey, str]]:
        def job(connection: Connection) -> Sequence[tuple[ApiKey, str]]:
            return [(ApiKey(*known), digest) for *known, digest in connection.execute(_ALL)]

        return await self._read(job)

    async def drop_api_key(self, key_id: str) -> bool:
        gone = delete(_t).where(_t.c.id == key_id)
        return await self._write(lambda connection: connection.execute(gone).rowcount > 0)
