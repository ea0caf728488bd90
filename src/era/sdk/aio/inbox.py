"""A session's inbox: deliveries that are stored first, and then run in order."""

from __future__ import annotations

from collections.abc import Mapping

from era.sdk.aio.connection import AsyncConnection
from era.sdk.answers import Delivery, InboxInfo
from era.urls import quoted

type _Deliveries = list[Delivery]


class AsyncInbox:
    """The inbox of a session, if it has one."""

    def __init__(self, connection: AsyncConnection, path: str) -> None:
        self._connection = connection
        self._path = f"{path}/inbox"

    async def set(self, *, verify: Mapping[str, str] | None = None, retries: int | None = None) -> InboxInfo:
        """Give the session an inbox, or change its settings. What is left out gets its default.

        `verify` is `{"scheme": "github" | "stripe" | "hmac", "secret": …, "header"?: …}`.
        """
        body = {"verify": None if verify is None else dict(verify)}
        return InboxInfo(
            await self._connection.send("PUT", self._path, body | ({} if retries is None else {"retries": retries}))
        )

    async def get(self) -> InboxInfo:
        """Its settings and counts. Raises NotFound."""
        return InboxInfo(await self._connection.get(self._path))

    async def delete(self) -> int:
        """Remove it with all its deliveries; returns how many those were."""
        return int((await self._connection.send("DELETE", self._path))["deleted_deliveries"])

    async def deliveries(self, status: str | None = None, limit: int | None = None) -> _Deliveries:
        """Deliveries, newest first: all, those of a status, the newest `limit`."""
        found = await self._connection.pages(f"{self._path}/deliveries", "deliveries", limit, {"status": status})
        return Delivery.each(found)

    async def delivery(self, delivery_id: str) -> Delivery:
        """One delivery, with the request that brought it."""
        return Delivery(await self._connection.get(f"{self._path}/deliveries/{quoted(delivery_id)}"))

    async def replay(self, delivery_id: str) -> Delivery:
        """Run a delivery once more."""
        return Delivery(await self._connection.send("POST", f"{self._path}/deliveries/{quoted(delivery_id)}/replay"))
