"""A session's data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from era.sdk.aio.connection import AsyncConnection
from era.sdk.sugar import AsyncDataSugar


class AsyncData(AsyncDataSugar):
    """The JSON object that programs of a session read and change. A change waits for the run under way."""

    def __init__(self, connection: AsyncConnection, path: str) -> None:
        self._connection = connection
        self._path = path

    async def all(self) -> dict[str, Any]:
        """All of it, as it is now."""
        data: dict[str, Any] = (await self._connection.get(self._path))["data"]
        return data

    async def replace(self, data: Mapping[str, Any]) -> None:
        """Put other data in its place."""
        await self._connection.send("PATCH", self._path, {"data": dict(data)}, self._connection.turn_seconds)

    async def set(self, key: str, value: Any) -> None:
        """Set one key. Between the look and the change somebody else's may be lost."""
        await self.replace({**await self.all(), key: value})

    async def delete(self, key: str) -> None:
        """Remove one key. Raises KeyError."""
        data = await self.all()
        del data[key]
        await self.replace(data)
