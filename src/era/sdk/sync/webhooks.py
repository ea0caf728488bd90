# Made by scripts/blocking.py of src/era/sdk/aio/webhooks.py: change that one.
"""Webhooks: where a server tells of what happens to its owner's sessions."""

from __future__ import annotations

from collections.abc import Sequence

from era.sdk.answers import Notice, Webhook
from era.sdk.sync.connection import Connection
from era.urls import quoted

type _Webhooks = list[Webhook]
type _Notices = list[Notice]


class Webhooks:
    """The webhooks of this client's owner."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, url: str, events: Sequence[str] | None = None, description: str = "") -> Webhook:
        """Have events told to a URL: `session.created`, `session.expired`, `run.ended`, `quota.reached`; all of them if
        not given. `secret` of the result, which notices are signed with, is shown this once."""
        given = {} if events is None else {"events": list(events)}
        body = {"url": url, "description": description, **given}
        return Webhook(self._connection.send("POST", "/api/webhooks", body))

    def list(self) -> _Webhooks:
        """All, oldest first."""
        return Webhook.each((self._connection.get("/api/webhooks"))["webhooks"])

    def deliveries(self, webhook_id: str) -> _Notices:
        """What waits to be told, and the last that were told or given up, newest first."""
        answer = self._connection.get(f"/api/webhooks/{quoted(webhook_id)}/deliveries")
        return Notice.each(answer["deliveries"])

    def replay(self, webhook_id: str, delivery_id: str) -> Notice:
        """Have a notice told once more: one that was told or given up, or one that waits for its next try."""
        path = f"/api/webhooks/{quoted(webhook_id)}/deliveries/{quoted(delivery_id)}/replay"
        return Notice(self._connection.send("POST", path))

    def delete(self, webhook_id: str) -> None:
        """Delete one, with what waits to be told to it."""
        self._connection.send("DELETE", f"/api/webhooks/{quoted(webhook_id)}")
