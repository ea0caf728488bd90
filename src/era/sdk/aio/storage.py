"""The storage that an owner's sessions share: text by key, SQL databases, bytes by key."""

from __future__ import annotations

from binascii import a2b_base64, b2a_base64
from collections.abc import Mapping, Sequence
from typing import Any

from era.common.urls import storage_path
from era.errors import BadRequest, NotFound
from era.sdk.aio.connection import AsyncConnection

type _Items = list[dict[str, Any]]


class AsyncKv:
    """Text by key."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def set(self, namespace: str, key: str, value: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Store a string, in the place of any other."""
        body = {"value": value, "metadata": metadata}
        await self._connection.send("PUT", _key_path("kv", namespace, key), body)

    async def get(self, namespace: str, key: str) -> str | None:
        """The string, None where there is none."""
        try:
            value: str = (await self._connection.get(_key_path("kv", namespace, key)))["value"]
        except NotFound:
            return None
        return value

    async def delete(self, namespace: str, key: str) -> None:
        """Remove a key, if it is there."""
        await self._connection.send("DELETE", _key_path("kv", namespace, key))

    async def list(self, namespace: str, prefix: str = "", limit: int | None = None) -> _Items:
        """`[{"name", "metadata"}]` in the order of their names: all, or the first `limit`."""
        return await self._connection.pages(storage_path("kv", namespace), "keys", limit, {"prefix": prefix})

    async def clear(self, namespace: str) -> None:
        """Remove every key of a namespace."""
        await self._connection.send("DELETE", storage_path("kv", namespace))


class AsyncD1:
    """An SQL database, SQLite's dialect, for each namespace."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def query(self, namespace: str, sql: str, params: Sequence[Any] | Mapping[str, Any] = ()) -> _Items:
        """Run one statement. Returns its rows as dicts."""
        rows: list[dict[str, Any]] = (await self._call("query", namespace, sql, params))["results"]
        return rows

    async def exec(self, namespace: str, sql: str, params: Sequence[Any] | Mapping[str, Any] = ()) -> dict[str, Any]:
        """Run statements in one transaction. Returns `{"success", "results", "meta"}` of all of them."""
        return await self._call("exec", namespace, sql, params)

    async def drop(self, namespace: str) -> None:
        """Delete a namespace's database."""
        await self._connection.send("DELETE", storage_path("d1", namespace))

    async def _call(
        self, what: str, namespace: str, sql: str, params: Sequence[Any] | Mapping[str, Any]
    ) -> dict[str, Any]:
        given = dict(params) if isinstance(params, Mapping) else list(params)
        answer: dict[str, Any] = await self._connection.send(
            "POST", storage_path("d1", namespace, what), {"sql": sql, "params": given}
        )
        return answer


class AsyncR2:
    """Bytes by key."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def put(
        self, namespace: str, key: str, content: bytes | str, metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Store bytes (or a string, as UTF-8), in the place of any others."""
        content = content.encode() if isinstance(content, str) else content
        body = {"content": b2a_base64(content, newline=False).decode(), "metadata": metadata}
        await self._connection.send("PUT", _key_path("r2", namespace, key), body)

    async def get(self, namespace: str, key: str) -> bytes | None:
        """The bytes, None where there are none."""
        try:
            return a2b_base64((await self._connection.get(_key_path("r2", namespace, key)))["content"])
        except NotFound:
            return None

    async def delete(self, namespace: str, key: str) -> None:
        """Remove an object, if it is there."""
        await self._connection.send("DELETE", _key_path("r2", namespace, key))

    async def list(self, namespace: str, prefix: str = "", limit: int | None = None) -> _Items:
        """`[{"key", "size", "uploaded"}]` in the order of their keys: all, or the first `limit`."""
        return await self._connection.pages(storage_path("r2", namespace), "objects", limit, {"prefix": prefix})

    async def clear(self, namespace: str) -> None:
        """Remove every object of a namespace."""
        await self._connection.send("DELETE", storage_path("r2", namespace))


class AsyncStorage:
    """What an owner's sessions share, and what outlives them."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection
        self.kv = AsyncKv(connection)
        self.d1 = AsyncD1(connection)
        self.r2 = AsyncR2(connection)

    async def stats(self) -> dict[str, Any]:
        """How much there is: `{"total", "by_type", "by_namespace", "total_size"}`."""
        stats: dict[str, Any] = await self._connection.get("/api/resources/stats")
        return stats


def _key_path(kind: str, namespace: str, key: str) -> str:
    """The path of a key. Raises BadRequest for an empty one: its path would be that of all keys."""
    if key == "":
        raise BadRequest("That can't be a key.", hint="Use 1 to 1024 bytes of UTF-8 without NUL.", code="bad_key")
    return storage_path(kind, namespace, key)
