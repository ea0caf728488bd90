# Made by scripts/blocking.py of src/era/sdk/aio/keys.py: change that one.
"""API keys, for the operator of a server."""

from __future__ import annotations

from era.sdk.answers import ApiKey
from era.sdk.sync.connection import Connection
from era.urls import quoted

type _Keys = list[ApiKey]


class Keys:
    """The API keys that a server has given out. Only its own key (ERA_API_KEY) may call these."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, owner: str, description: str = "") -> ApiKey:
        """Make a key for an owner. `key` of the result is shown this once."""
        return ApiKey(self._connection.send("POST", "/api/keys", {"owner": owner, "description": description}))

    def list(self) -> _Keys:
        """All keys, oldest first, without the keys themselves."""
        return ApiKey.each((self._connection.get("/api/keys"))["keys"])

    def revoke(self, key_id: str) -> None:
        """Refuse a key from now on."""
        self._connection.send("DELETE", f"/api/keys/{quoted(key_id)}")
