# Made by scripts/blocking.py of src/era/sdk/aio/webhooks.py: change that one.
"""Webhooks of an owner, and the inbox of a session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from era.common.urls import quoted
from era.sdk.answers import Delivery, InboxInfo, Notice, Webhook
from era.sdk.sync.connection import Connection

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


type _Deliveries = list[Delivery]


class Inbox:
    """The inbox of a session, if it has one."""

    def __init__(self, connection: Connection, path: str) -> None:
        self._connection = connection
        self._path = f"{path}/inbox"

    def set(self, *, verify: Mapping[str, str] | None = None, retries: int | None = None) -> InboxInfo:
        """Give the session an inbox, or change its settings. What is left out gets its default.

        `verify` is `{"scheme": "github" | "stripe" | "hmac", "secret": …, "header"?: …}`.
        """
        body = {"verify": None if verify is None else dict(verify)}
        return InboxInfo(
            self._connection.send("PUT", self._path, body | ({} if retries is None else {"retries": retries}))
        )

    def get(self) -> InboxInfo:
        """Its settings and counts. Raises NotFound."""
        return InboxInfo(self._connection.get(self._path))

    def delete(self) -> int:
        """Remove it with all its deliveries; returns how many those were."""
        return int((self._connection.send("DELETE", self._path))["deleted_deliveries"])

    def deliveries(self, status: str | None = None, limit: int | None = None) -> _Deliveries:
        """Deliveries, newest first: all, those of a status, the newest `limit`."""
        found = self._connection.pages(f"{self._path}/deliveries", "deliveries", limit, {"status": status})
        return Delivery.each(found)

    def delivery(self, delivery_id: str) -> Delivery:
        """One delivery, with the request that brought it."""
        return Delivery(self._connection.get(f"{self._path}/deliveries/{quoted(delivery_id)}"))

    def replay(self, delivery_id: str) -> Delivery:
        """Run a delivery once more."""
        return Delivery(self._connection.send("POST", f"{self._path}/deliveries/{quoted(delivery_id)}/replay"))
