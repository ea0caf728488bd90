# Made by scripts/blocking.py of src/era/sdk/aio/storage.py: change that one.
"""The storage that an owner's sessions share: text by key, SQL databases, bytes by key."""

from __future__ import annotations

from binascii import a2b_base64, b2a_base64
from collections.abc import Mapping, Sequence
from typing import Any

from era.common.urls import storage_path
from era.errors import BadRequest, NotFound
from era.sdk.sync.connection import Connection

type _Items = list[dict[str, Any]]


class Kv:
    """Text by key."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def set(self, namespace: str, key: str, value: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Store a string, in the place of any other."""
        body = {"value": value, "metadata": metadata}
        self._connection.send("PUT", _key_path("kv", namespace, key), body)

    def get(self, namespace: str, key: str) -> str | None:
        """The string, None where there is none."""
        try:
            value: str = (self._connection.get(_key_path("kv", namespace, key)))["value"]
        except NotFound:
            return None
        return value

    def delete(self, namespace: str, key: str) -> None:
        """Remove a key, if it is there."""
        self._connection.send("DELETE", _key_path("kv", namespace, key))

    def list(self, namespace: str, prefix: str = "", limit: int | None = None) -> _Items:
        """`[{"name", "metadata"}]` in the order of their names: all, or the first `limit`."""
        return self._connection.pages(storage_path("kv", namespace), "keys", limit, {"prefix": prefix})

    def clear(self, namespace: str) -> None:
        """Remove every key of a namespace."""
        self._connection.send("DELETE", storage_path("kv", namespace))


class D1:
    """An SQL database, SQLite's dialect, for each namespace."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def query(self, namespace: str, sql: str, params: Sequence[Any] | Mapping[str, Any] = ()) -> _Items:
        """Run one statement. Returns its rows as dicts."""
        rows: list[dict[str, Any]] = (self._call("query", namespace, sql, params))["results"]
        return rows

    def exec(self, namespace: str, sql: str, params: Sequence[Any] | Mapping[str, Any] = ()) -> dict[str, Any]:
        """Run statements in one transaction. Returns `{"success", "results", "meta"}` of all of them."""
        return self._call("exec", namespace, sql, params)

    def drop(self, namespace: str) -> None:
        """Delete a namespace's database."""
        self._connection.send("DELETE", storage_path("d1", namespace))

    def _call(self, what: str, namespace: str, sql: str, params: Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
        given = dict(params) if isinstance(params, Mapping) else list(params)
        answer: dict[str, Any] = self._connection.send(
            "POST", storage_path("d1", namespace, what), {"sql": sql, "params": given}
        )
        return answer


class R2:
    """Bytes by key."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def put(self, namespace: str, key: str, content: bytes | str, metadata: Mapping[str, Any] | None = None) -> None:
        """Store bytes (or a string, as UTF-8), in the place of any others."""
        content = content.encode() if isinstance(content, str) else content
        body = {"content": b2a_base64(content, newline=False).decode(), "metadata": metadata}
        self._connection.send("PUT", _key_path("r2", namespace, key), body)

    def get(self, namespace: str, key: str) -> bytes | None:
        """The bytes, None where there are none."""
        try:
            return a2b_base64((self._connection.get(_key_path("r2", namespace, key)))["content"])
        except NotFound:
            return None

    def delete(self, namespace: str, key: str) -> None:
        """Remove an object, if it is there."""
        self._connection.send("DELETE", _key_path("r2", namespace, key))

    def list(self, namespace: str, prefix: str = "", limit: int | None = None) -> _Items:
        """`[{"key", "size", "uploaded"}]` in the order of their keys: all, or the first `limit`."""
        return self._connection.pages(storage_path("r2", namespace), "objects", limit, {"prefix": prefix})

    def clear(self, namespace: str) -> None:
        """Remove every object of a namespace."""
        self._connection.send("DELETE", storage_path("r2", namespace))


class Storage:
    """What an owner's sessions share, and what outlives them."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.kv = Kv(connection)
        self.d1 = D1(connection)
        self.r2 = R2(connection)

    def stats(self) -> dict[str, Any]:
        """How much there is: `{"total", "by_type", "by_namespace", "total_size"}`."""
        stats: dict[str, Any] = self._connection.get("/api/resources/stats")
        return stats


def _key_path(kind: str, namespace: str, key: str) -> str:
    """The path of a key. Raises BadRequest for an empty one: its path would be that of all keys."""
    if key == "":
        raise BadRequest("That can't be a key.", hint="Use 1 to 1024 bytes of UTF-8 without NUL.", code="bad_key")
    return storage_path(kind, namespace, key)
