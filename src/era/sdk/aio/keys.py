"""API keys, for the operator of a server."""

from __future__ import annotations

from era.sdk.aio.connection import AsyncConnection
from era.sdk.answers import ApiKey
from era.urls import quoted

type _Keys = list[ApiKey]


class AsyncKeys:
    """The API keys that a server has given out. Only its own key (ERA_API_KEY) may call these."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def create(self, owner: str, description: str = "") -> ApiKey:
        """Make a key for an owner. `key` of the result is shown this once."""
        return ApiKey(await self._connection.send("POST", "/api/keys", {"owner": owner, "description": description}))

    async def list(self) -> _Keys:
        """All keys, oldest first, without the keys themselves."""
        return ApiKey.each((await self._connection.get("/api/keys"))["keys"])

    async def revoke(self, key_id: str) -> None:
        """Refuse a key from now on."""
        await self._connection.send("DELETE", f"/api/keys/{quoted(key_id)}")
