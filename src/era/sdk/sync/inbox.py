# Made by scripts/blocking.py of src/era/sdk/aio/inbox.py: change that one.
"""A session's inbox: deliveries that are stored first, and then run in order."""

from __future__ import annotations

from collections.abc import Mapping

from era.sdk.answers import Delivery, InboxInfo
from era.sdk.sync.connection import Connection
from era.urls import quoted

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
