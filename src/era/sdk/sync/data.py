# Made by scripts/blocking.py of src/era/sdk/aio/data.py: change that one.
"""A session's data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from era.sdk.sugar import DataSugar
from era.sdk.sync.connection import Connection


class Data(DataSugar):
    """The JSON object that programs of a session read and change. A change waits for the run under way."""

    def __init__(self, connection: Connection, path: str) -> None:
        self._connection = connection
        self._path = path

    def all(self) -> dict[str, Any]:
        """All of it, as it is now."""
        data: dict[str, Any] = (self._connection.get(self._path))["data"]
        return data

    def replace(self, data: Mapping[str, Any]) -> None:
        """Put other data in its place."""
        self._connection.send("PATCH", self._path, {"data": dict(data)}, self._connection.turn_seconds)

    def set(self, key: str, value: Any) -> None:
        """Set one key. Between the look and the change somebody else's may be lost."""
        self.replace({**self.all(), key: value})

    def delete(self, key: str) -> None:
        """Remove one key. Raises KeyError."""
        data = self.all()
        del data[key]
        self.replace(data)
