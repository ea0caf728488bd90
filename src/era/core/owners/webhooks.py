"""Webhooks of owners: what happens to their sessions and runs is told to addresses of theirs.

Theory of operation. What is to be told, a *notice*, is a row of the very transaction that makes it true: a run's end
and its notice are on record together or not at all. (That a quota was reached is no change of rows; its notice is a
transaction of its own, soon after.) The engine (deliveries.py) sends notices afterwards, so each comes at least once.
Its id, in the body and in a header, is the same each time.

Each is signed, in the form that the inbox's scheme `stripe` verifies (signatures.py). A secret is made of the
server's own key and the webhook's id whenever it is needed, so it is stored nowhere.

In a cluster the leader sends.

What is waiting and what is kept is bounded for each webhook. What comes when there is no room is counted and lost.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import structlog

from era.core import signatures
from era.core.concurrency.fair_limiter import FairLimiter
from era.core.models import MICROS, JsonObject, new_id, now
from era.core.owners.deliveries import Deliveries, Record, after_failure
from era.core.ports import Cluster
from era.core.telemetry import Note, NoticeTried, ignore
from era.errors import EraError, RateReached

log = structlog.get_logger()

type Event = Literal["session.created", "session.expired", "run.ended", "quota.reached"]
type NoticeStatus = Literal["pending", "done", "failed"]

EVENTS: tuple[Event, ...] = ("session.created", "session.expired", "run.ended", "quota.reached")
MAX_WEBHOOKS = 16
"""Of an owner."""

MAX_URL = 2048
"""Characters of a webhook's URL."""

MAX_PENDING = 1000
"""Notices that wait for one webhook."""

KEPT = 100
"""Notices of one webhook that are kept once they were sent or given up."""

RETRIES = 8
"""How often a notice is sent again. The last try comes some fifty minutes after the first."""

_AT_A_TIME, _OF_AN_OWNER = 8, 2
"""Tries and checks of URLs at a time, of all and of one owner."""

_QUIET_SECONDS = 60.0
"""Within which a quota's being reached is told once to an owner."""


@dataclass(frozen=True, slots=True)
class Webhook:
    id: str
    owner: str
    url: str
    events: Sequence[Event]
    description: str
    created_at: int
    dropped: int = 0
    """Notices for which there was no room."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that is to be told, or was."""

    key: int
    id: str
    webhook_id: str
    event: Event
    body: str = field(repr=False)
    """The JSON text that is sent."""

    status: NoticeStatus
    tries: int
    created_at: int
    next_attempt_at: int | None
    ended_at: int | None
    http_status: int | None
    """The status of the last answer, None where there was none."""

    reason: str | None
    """Why the last try failed."""


@dataclass(frozen=True, slots=True)
class Tried:
    """What came of a try."""

    status: NoticeStatus
    tries: int
    http_status: int | None
    reason: str | None = None
    next_attempt_at: int | None = None


class Unsent(Exception):
    """A notice got no answer. Its text says why, for the webhook's owner."""


class Sender(Protocol):
    """Sends notices. The adapter is network/webhooks.py."""

    async def check(self, url: str) -> None:
        """Raises BadRequest for a URL that can't be a webhook's, or that leads where none may lead now."""
        ...

    async def send(self, url: str, headers: Mapping[str, str], body: bytes) -> int:
        """POST a notice; the status of the answer. Raises Unsent."""
        ...


class WebhookStore(Protocol):
    """Rows of webhooks and notices. Every call is one transaction, durable when it returns."""

    async def add_webhook(self, webhook: Webhook) -> None:
        """Raises Conflict where the owner has as many as he may."""
        ...

    async def webhooks(self, owner: str) -> Sequence[tuple[Webhook, Mapping[NoticeStatus, int]]]:
        """An owner's, oldest first, and how many notices each has, by status."""
        ...

    async def drop_webhook(self, owner: str, webhook_id: str) -> None:
        """With all its notices. Raises NotFound."""
        ...

    async def notices(self, owner: str, webhook_id: str) -> Sequence[Notice]:
        """Those that wait and those that are kept, newest first. Raises NotFound."""
        ...

    async def replay_notice(self, owner: str, webhook_id: str, notice_id: str) -> Notice:
        """Make a notice that was sent or given up wait again, behind all others, or one that waits due now. Raises
        NotFound."""
        ...

    async def pending(self) -> int:
        """How many notices wait, of all owners."""
        ...

    async def tell(self, owner: str, event: Event, data: JsonObject) -> None:
        """Add a notice for each of an owner's webhooks that wants this event."""
        ...

    async def due(self) -> Mapping[str, str]:
        """The owners of webhooks whose first notice that waits is due, by the webhook's id."""
        ...

    async def next_due(self, webhook_id: str) -> tuple[Webhook, Notice] | None:
        """A webhook and the first of its notices that wait, if that is due."""
        ...

    async def tried(self, notice: Notice, tried: Tried) -> None:
        """Record a try, and drop notices that are too old to be kept. A notice that is gone, or was tried by another
        host meanwhile, is left alone."""
        ...


class Webhooks(Deliveries[str, tuple[Webhook, Notice]]):
    """Makes webhooks, and sends their notices: a queue by webhook id."""

    def __init__(
        self,
        store: WebhookStore,
        sender: Sender,
        key: bytes,
        cluster: Cluster,
        on_reached: list[Callable[[str, EraError], None]],
        note: Note = ignore,
    ) -> None:
        """`key` is the server's, of which the webhooks' secrets are made. `on_reached` is that of Quotas."""
        super().__init__("webhooks", FairLimiter(_AT_A_TIME, of_owner=_OF_AN_OWNER))
        on_reached.append(self._quota_reached)
        self.store = store
        self._note = note
        self._sender = sender
        self._key = key
        self._cluster = cluster
        self._telling: set[asyncio.Task[None]] = set()
        self._told_at: dict[tuple[str, str, str], float] = {}

    async def stop(self) -> None:
        """See Deliveries."""
        await asyncio.gather(*self._telling, return_exceptions=True)
        await super().stop()

    async def create(self, owner: str, url: str, events: Sequence[Event], description: str) -> Webhook:
        """A new webhook. Raises BadRequest, Conflict."""
        async with self._slots.slot(owner):
            await self._sender.check(url)
        webhook = Webhook(new_id("wh"), owner, url, tuple(events), description, now())
        await self.store.add_webhook(webhook)
        return webhook

    def secret(self, webhook: Webhook) -> str:
        """What a webhook's notices are signed with."""
        made = hmac.digest(self._key, webhook.id.encode(), hashlib.sha256)
        return "whsec_" + base64.urlsafe_b64encode(made).decode().rstrip("=")

    async def replay(self, owner: str, webhook_id: str, notice_id: str) -> Notice:
        """Send a notice once more: see WebhookStore.replay_notice."""
        notice = await self.store.replay_notice(owner, webhook_id, notice_id)
        self.wake(webhook_id, owner)
        return notice

    def _quota_reached(self, owner: str, error: EraError) -> None:
        """Tell an owner that a quota was reached, once a minute for each."""
        details = error.details or {}
        which, at = (owner, str(details.get("quota")), str(details.get("of"))), time.monotonic()
        self._told_at = {key: told for key, told in self._told_at.items() if told > at - _QUIET_SECONDS}
        if which in self._told_at:
            return
        self._told_at[which] = at
        data = {**details, "code": error.code}
        if isinstance(error, RateReached):
            data["retry_after"] = error.retry_after
        task = asyncio.get_running_loop().create_task(self._tell(owner, data))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _tell(self, owner: str, data: JsonObject) -> None:
        try:
            await self.store.tell(owner, "quota.reached", data)
        except EraError as error:
            log.warning("webhook_not_told", error=error.message)

    async def due(self) -> Mapping[str, str]:
        """See Deliveries."""
        return await self.store.due() if self._cluster.leads else {}

    async def next_due(self, key: str) -> tuple[Webhook, Notice] | None:
        """See Deliveries."""
        return await self.store.next_due(key) if self._cluster.leads else None

    async def attempt(self, delivery: tuple[Webhook, Notice]) -> Record:
        """Send a notice."""
        webhook, notice = delivery
        began_at, began = time.time(), time.monotonic()
        tried = await self._try(webhook, notice)
        seconds = time.monotonic() - began
        lag = max(now() - notice.created_at, 0) / MICROS
        told = (notice.id, webhook.id, webhook.owner, notice.event, tried.status, tried.tries)
        self._note(NoticeTried(*told, tried.http_status, lag, began_at, seconds))
        return partial(self.store.tried, notice, tried)

    async def _try(self, webhook: Webhook, notice: Notice) -> Tried:
        """Try once to send a notice."""
        tries, body = notice.tries + 1, notice.body.encode()
        status, reason = None, None
        headers = {
            "Content-Type": "application/json",
            "X-Era-Event": notice.event,
            "X-Era-Delivery": notice.id,
            "X-Era-Signature": signatures.signed(self.secret(webhook), body, int(time.time())),
        }
        try:
            status = await self._sender.send(webhook.url, headers, body)
        except Unsent as error:
            reason = str(error)
        if status is not None and not 200 <= status < 300:
            reason = f"The answer was {status}."
            if 300 <= status < 400:
                reason += " Redirects aren't followed: make the webhook anew with the URL that they lead to."
        if reason is None:
            return Tried("done", tries, status)
        outcome, due = after_failure(tries, RETRIES)
        return Tried(outcome, tries, status, reason, due)


def body_of(notice_id: str, owner: str, event: Event, at: str, data: Mapping[str, Any]) -> str:
    """The JSON text of a notice."""
    body = {"id": notice_id, "event": event, "created_at": at, "owner": owner, "data": data}
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))
