"""API keys and owners, for the operator of a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from era.common.urls import quoted
from era.sdk.aio.connection import AsyncConnection
from era.sdk.answers import ApiKey, Owner

type _Keys = list[ApiKey]
type _Owners = list[Owner]
type _Quotas = Mapping[str, int | None]


class AsyncKeys:
    """The API keys that a server has given out. Only its own key (ERA_API_KEY) may call these, and keys with the scope
    `admin`."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def create(
        self,
        owner: str,
        description: str = "",
        *,
        scopes: Sequence[str] | None = None,
        expires_at: str | None = None,
        quotas: _Quotas | None = None,
    ) -> ApiKey:
        """Make a key for an owner. `key` of the result is shown this once. `scopes` are what it is good for: `read`,
        `run`, `write`, `admin`; the first three if not given. `expires_at` is a time (RFC 3339)."""
        more: dict[str, Any] = {"scopes": scopes and list(scopes), "expires_at": expires_at, "quotas": quotas}
        given = {name: value for name, value in more.items() if value is not None}
        body = {"owner": owner, "description": description, **given}
        return ApiKey(await self._connection.send("POST", "/api/keys", body))

    async def list(self) -> _Keys:
        """All keys, oldest first, without the keys themselves."""
        return ApiKey.each((await self._connection.get("/api/keys"))["keys"])

    async def get(self, key_id: str) -> ApiKey:
        """A key, without the key itself."""
        return ApiKey(await self._connection.get(f"/api/keys/{quoted(key_id)}"))

    async def change(self, key_id: str, **changes: Any) -> ApiKey:
        """Change a key's `description`, `scopes`, `expires_at` (None: never) or `quotas` (None takes one back)."""
        return ApiKey(await self._connection.send("PATCH", f"/api/keys/{quoted(key_id)}", changes))

    async def rotate(self, key_id: str, grace_seconds: float = 3600) -> ApiKey:
        """Give a key another secret, `key` of the result. The one before stays good for `grace_seconds`."""
        body = {"grace_seconds": grace_seconds}
        return ApiKey(await self._connection.send("POST", f"/api/keys/{quoted(key_id)}/rotate", body))

    async def revoke(self, key_id: str) -> None:
        """Refuse a key from now on."""
        await self._connection.send("DELETE", f"/api/keys/{quoted(key_id)}")


class AsyncOwners:
    """Owners, their quotas and what is used of them. Only the operator may call these."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def list(self) -> _Owners:
        """Owners who have a key, sessions or quotas of their own."""
        return Owner.each((await self._connection.get("/api/owners"))["owners"])

    async def get(self, owner: str) -> Owner:
        """An owner's quotas, and how much there is of each."""
        return Owner(await self._connection.get(f"/api/owners/{quoted(owner)}"))

    async def set_quotas(self, owner: str, **quotas: int | None) -> Owner:
        """Set quotas by name; None takes one back, and the server's default holds again."""
        return Owner(await self._connection.send("PATCH", f"/api/owners/{quoted(owner)}", {"quotas": quotas}))
