"""Webhooks: where a server tells of what happens to its owner's sessions."""

from __future__ import annotations

from collections.abc import Sequence

from era.sdk.aio.connection import AsyncConnection
from era.sdk.answers import Notice, Webhook
from era.urls import quoted

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
