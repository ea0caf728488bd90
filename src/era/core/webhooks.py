"""Webhooks of owners: what happens to their sessions and runs is told to addresses of theirs.

Theory of operation
===================

It is the inbox's machinery turned outward. What is to be told, a *notice*, is a row of the very transaction that makes
it true: a run's end and its notice are on record together or not at all. (That a quota was reached is no change of
rows; its notice is a transaction of its own, soon after.) It is sent afterwards, as often as it takes, with the inbox's
delays between the tries, and then given up. So a notice comes at least once; its id, in the body and in a header, is
the same each time. One webhook's notices are sent one after the other, in the order in which they came to be, and one
that fails holds up those of its own webhook only. A try that can't be put on record holds them up, too, until it can.

Each is signed, in the form that the inbox's scheme `stripe` verifies: the time of the try and the HMAC-SHA256 of that
time and the body, with the webhook's secret. Who compares the time as well can't be shown an old notice again. A secret
is made of the server's own key and the webhook's id whenever it is needed, so it is stored nowhere.

In a cluster the leader sends, and each host reads with each heartbeat which webhooks there are.

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

from era.core.expiry import MICROS
from era.core.fair_limiter import FairLimiter
from era.core.homes import Cluster
from era.core.late_ends import LateEnds
from era.core.models import JsonObject, new_id, now
from era.core.retry_delay import delay
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

SIGNATURE = "X-Era-Signature"
_POLL_SECONDS = 0.5
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

    def wants(self, owner: str, event: Event) -> bool:
        """Whether any of an owner's webhooks wants this event."""
        ...

    async def due(self) -> Sequence[Webhook]:
        """The webhooks that have a notice to send: whose oldest that waits is due."""
        ...

    async def next_due(self, webhook: Webhook) -> Notice | None:
        """The oldest notice of a webhook that waits, if it is due."""
        ...

    async def tried(self, notice: Notice, tried: Tried) -> None:
        """Record a try, and drop notices that are too old to be kept. A notice that is gone, or was tried by another
        host meanwhile, is left alone."""
        ...


class Webhooks:
    """Keeps webhooks, and sends their notices. `start` before anything, `stop` when done."""

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
        on_reached.append(self._quota_reached)
        self._note = note
        self._store = store
        self._sender = sender
        self._key = key
        self._cluster = cluster
        self._sending: dict[str, asyncio.Task[None]] = {}
        """By webhook: what sends its notices."""

        self._late_tries = LateEnds()
        self._telling: set[asyncio.Task[None]] = set()
        self._told_at: dict[tuple[str, str, str], float] = {}
        self._slots = FairLimiter(_AT_A_TIME, of_owner=_OF_AN_OWNER)
        self._polling: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._polling = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """End the tries under way, and leave those that aren't on record: they don't count, and are made again at the
        next start."""
        tasks = [*self._sending.values(), *self._telling, *([self._polling] if self._polling else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._late_tries.stop()

    async def create(self, owner: str, url: str, events: Sequence[Event], description: str) -> Webhook:
        """A new webhook. Raises BadRequest, Conflict."""
        async with self._slots.slot(owner):
            await self._sender.check(url)
        webhook = Webhook(new_id("wh"), owner, url, tuple(events), description, now())
        await self._store.add_webhook(webhook)
        return webhook

    def secret(self, webhook: Webhook) -> str:
        """What a webhook's notices are signed with."""
        made = hmac.digest(self._key, webhook.id.encode(), hashlib.sha256)
        return "whsec_" + base64.urlsafe_b64encode(made).decode().rstrip("=")

    async def list(self, owner: str) -> Sequence[tuple[Webhook, Mapping[NoticeStatus, int]]]:
        """An owner's webhooks, oldest first, and how many notices each has, by status."""
        return await self._store.webhooks(owner)

    async def delete(self, owner: str, webhook_id: str) -> None:
        """Delete a webhook and its notices. Raises NotFound."""
        await self._store.drop_webhook(owner, webhook_id)

    async def notices(self, owner: str, webhook_id: str) -> Sequence[Notice]:
        """See WebhookStore.notices."""
        return await self._store.notices(owner, webhook_id)

    async def replay(self, owner: str, webhook_id: str, notice_id: str) -> Notice:
        """Send a notice once more: see WebhookStore.replay_notice."""
        return await self._store.replay_notice(owner, webhook_id, notice_id)

    def _quota_reached(self, owner: str, error: EraError) -> None:
        """Tell an owner that a quota was reached, once a minute for each."""
        if not self._store.wants(owner, "quota.reached"):
            return
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
            await self._store.tell(owner, "quota.reached", data)
        except EraError as error:
            log.warning("webhook_not_told", error=error.message)

    async def _poll(self) -> None:
        """Begin to send what is due, for ever."""
        while True:
            try:
                due = await self._store.due() if self._cluster.leads else ()
                for webhook in due:
                    if webhook.id not in self._sending:
                        task = self._sending[webhook.id] = asyncio.create_task(self._send_due(webhook))
                        task.add_done_callback(partial(self._sent, webhook.id))
            except EraError as error:
                log.warning("webhooks_not_looked_at", error=error.message)
            except Exception:  # it looks again all the same
                log.exception("bug", where="webhooks")
            await asyncio.sleep(_POLL_SECONDS)

    async def _send_due(self, webhook: Webhook) -> None:
        """Send a webhook's notices one after the other, until none is due: also where one failed, which comes first."""
        try:
            while True:
                # Which may take minutes, and the webhook may be gone then.
                async with self._slots.slot(webhook.owner, webhook.id):
                    if not self._cluster.leads or (notice := await self._store.next_due(webhook)) is None:
                        return
                    began_at, began = time.time(), time.monotonic()
                    tried = await self._try(webhook, notice)
                    seconds = time.monotonic() - began
                lag = max(now() - notice.created_at, 0) / MICROS
                told = (notice.id, webhook.id, webhook.owner, notice.event, tried.status, tried.tries)
                self._note(NoticeTried(*told, tried.http_status, lag, began_at, seconds))
                await self._record(notice, tried)
        except EraError as error:
            log.warning("webhook_not_looked_at", webhook=webhook.id, error=error.message)

    async def _record(self, notice: Notice, tried: Tried) -> None:
        """Record a try, now or once the database takes it. Until then nothing is sent to this webhook: the notice would
        be found due, and be sent again."""
        is_recorded = asyncio.Event()

        async def attempt(*, is_first: bool = False) -> bool:
            try:
                await self._store.tried(notice, tried)
            except EraError as error:
                if is_first:  # else the log has it
                    log.warning("webhook_try_not_recorded", webhook=notice.webhook_id, error=error.message)
                return False
            except Exception:
                is_recorded.set()  # it isn't tried again, and the notice is found due
                raise
            is_recorded.set()
            return True

        if not await attempt(is_first=True):
            self._late_tries.add(attempt)
            await is_recorded.wait()

    def _sent(self, webhook_id: str, _: asyncio.Task[None]) -> None:
        del self._sending[webhook_id]

    async def _try(self, webhook: Webhook, notice: Notice) -> Tried:
        """Try once to send a notice."""
        tries, body = notice.tries + 1, notice.body.encode()
        status, reason = None, None
        try:
            headers = headers_of(self.secret(webhook), notice, body, int(time.time()))
            status = await self._sender.send(webhook.url, headers, body)
        except Unsent as error:
            reason = str(error)
        if status is not None and not 200 <= status < 300:
            reason = f"The answer was {status}."
            if 300 <= status < 400:
                reason += " Redirects aren't followed: make the webhook anew with the URL that they lead to."
        if reason is None:
            return Tried("done", tries, status)
        if tries <= RETRIES:
            return Tried("pending", tries, status, reason, now() + int(delay(tries) * MICROS))
        return Tried("failed", tries, status, reason)


def headers_of(secret: str, notice: Notice, body: bytes, at: int) -> dict[str, str]:
    """The headers of a try at `at`, in seconds since 1970."""
    signed = hmac.new(secret.encode(), b"%d." % at + body, hashlib.sha256).hexdigest()
    return {
        "Content-Type": "application/json",
        "X-Era-Event": notice.event,
        "X-Era-Delivery": notice.id,
        SIGNATURE: f"t={at},v1={signed}",
    }


def body_of(notice_id: str, owner: str, event: Event, at: str, data: Mapping[str, Any]) -> str:
    """The JSON text of a notice."""
    body = {"id": notice_id, "event": event, "created_at": at, "owner": owner, "data": data}
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))
