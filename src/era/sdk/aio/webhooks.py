"""Webhooks of an owner, and the inbox of a session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from era.common.urls import quoted
from era.sdk.aio.connection import AsyncConnection
from era.sdk.answers import Delivery, InboxInfo, Notice, Webhook

type _Webhooks = list[Webhook]
type _Notices = list[Notice]


class AsyncWebhooks:
    """The webhooks of this client's owner."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def create(self, url: str, events: Sequence[str] | None = None, description: str = "") -> Webhook:
        """Have events told to a URL: `session.created`, `session.expired`, `run.ended`, `quota.reached`; all of them if
        not given. `secret` of the result, which notices are signed with, is shown this once."""
        given = {} if events is None else {"events": list(events)}
        body = {"url": url, "description": description, **given}
        return Webhook(await self._connection.send("POST", "/api/webhooks", body))

    async def list(self) -> _Webhooks:
        """All, oldest first."""
        return Webhook.each((await self._connection.get("/api/webhooks"))["webhooks"])

    async def deliveries(self, webhook_id: str) -> _Notices:
        """What waits to be told, and the last that were told or given up, newest first."""
        answer = await self._connection.get(f"/api/webhooks/{quoted(webhook_id)}/deliveries")
        return Notice.each(answer["deliveries"])

    async def replay(self, webhook_id: str, delivery_id: str) -> Notice:
        """Have a notice told once more: one that was told or given up, or one that waits for its next try."""
        path = f"/api/webhooks/{quoted(webhook_id)}/deliveries/{quoted(delivery_id)}/replay"
        return Notice(await self._connection.send("POST", path))

    async def delete(self, webhook_id: str) -> None:
        """Delete one, with what waits to be told to it."""
        await self._connection.send("DELETE", f"/api/webhooks/{quoted(webhook_id)}")


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
