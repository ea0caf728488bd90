"""A session's inbox: deliveries of webhooks, stored before they are acknowledged, then run in order.

Theory of operation
===================

A delivery is a row. It is answered once that is durable, and is run later as the relay would run it (relay.py): through
the session's stored code, as an ordinary run, so promises about runs hold for it. Its own states:

    pending ─► running ─► done
       ▲          │
       └──────────┴─────► failed, when it was tried as often as the inbox says

A session's deliveries are run one after the other, by `position`. One that fails is tried again after a while, and the
later ones wait for it: what a sender told in order is seen in order. A replay takes the last position.

A session with pending deliveries has a worker, a task. It ends when there is nothing to do, also where the session
stores no code or isn't public; `_look` then starts it again once that has changed. What counts is in the rows alone.

Runs are at most once, deliveries at least once: one whose run was cut off by a crash is pending again at the next
start. The attempt stays counted, so that one which brings down the service isn't tried for ever.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, Protocol

import structlog

from era.core import jsontext
from era.core.expiry import MICROS
from era.core.models import OwnedId, Session, new_id, now
from era.core.public import headers, relay
from era.core.public.signatures import Verify, is_genuine
from era.core.run_messages import Collected, RunEvent, RunRequest, RunStarted, collect
from era.core.runs import Runs
from era.errors import BadSignature, EraError, Expired, NotFound, RelayFailed, SessionDeleted, TooManyWaiting

log = structlog.get_logger()

type DeliveryStatus = Literal["pending", "running", "done", "failed"]

DEFAULT_RETRIES = 5
MAX_RETRIES = 20
FIRST_DELAY = 1.0
"""Seconds from the first failure to the second attempt; each is `_FACTOR` times the one before, up to `_MAX_DELAY`."""

_FACTOR = 4.0
_MAX_DELAY = 900.0

MAX_PENDING = 10_000
MAX_PENDING_BYTES = 256 << 20
KEPT = 1000
"""Deliveries of a session that are kept when they have ended."""

KEPT_RUN_IDS = 50
_LOOK_SECONDS = 1.0
_AGAIN_SECONDS = 1.0
_STOP_SECONDS = 5.0
_MAX_SENDER_ID = 255
_SENDER_IDS = (b"x-github-delivery", b"idempotency-key", b"x-delivery-id")


@dataclass(frozen=True, slots=True)
class InboxSettings:
    """What an owner has asked for. `created_at` stays when it is changed."""

    verify: Verify | None
    retries: int
    created_at: int
    updated_at: int


@dataclass(frozen=True, slots=True)
class Content:
    """What was delivered. `path` and `query` are ASCII as they came, the query without its `?`; `headers` are those
    that a session may see, with names in lower case."""

    method: str
    path: str
    query: str
    headers: Sequence[tuple[str, str]]
    body: bytes = field(repr=False)
    base_url: str


@dataclass(frozen=True, slots=True)
class Delivery:
    """A delivery without its content. `sender_id` is the id that its sender gave it; `answer_status` and `reason` are
    the last attempt's, or why there is none yet; `tries` are the attempts since it came or was replayed."""

    key: int
    id: str
    sender_id: str | None
    received_at: int
    status: DeliveryStatus
    attempts: int
    tries: int
    run_ids: Sequence[str]
    next_attempt_at: int | None
    ended_at: int | None
    answer_status: int | None
    reason: str | None
    method: str
    path: str
    size: int


@dataclass(frozen=True, slots=True)
class Next:
    """A session's first pending delivery, and what of the session decides about it."""

    delivery: Delivery
    session_key: int
    session_id: OwnedId
    retries: int
    why_not: str | None
    """Why the session can't be given any, if it can't."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an attempt."""

    status: DeliveryStatus
    attempts: int
    tries: int
    answer_status: int | None = None
    reason: str | None = None
    next_attempt_at: int | None = None


@dataclass(frozen=True, slots=True)
class Received:
    """`first`: this sender's id hadn't come before."""

    delivery_id: str
    status: DeliveryStatus
    first: bool


class Deliveries(Protocol):
    """Rows of inboxes. Every call is one transaction, unless it says otherwise, and durable when it returns. Calls with
    a session's id are as those of MetadataStore; NotFound also means that there is no such inbox or delivery."""

    async def put_inbox(self, session_id: OwnedId, verify: Verify | None, retries: int) -> InboxSettings: ...

    async def inbox(self, session_id: OwnedId) -> tuple[InboxSettings, Mapping[DeliveryStatus, int]]:
        """With how many deliveries there are of each status."""
        ...

    async def inbox_of(self, session_key: int) -> InboxSettings | None: ...

    async def delete_inbox(self, session_id: OwnedId) -> int:
        """Drop it, then its deliveries, a few at a time; how many went."""
        ...

    async def add_delivery(
        self, session_key: int, delivery_id: str, sender_id: str | None, content: Content
    ) -> Received:
        """Raises TooManyDeliveries."""
        ...

    async def deliveries(
        self, session_id: OwnedId, *, status: DeliveryStatus | None, limit: int, before: int | None
    ) -> Sequence[Delivery]:
        """Newest first, those before the one with the key `before`."""
        ...

    async def delivery(self, session_id: OwnedId, delivery_id: str) -> tuple[Delivery, Content]: ...

    async def replay_delivery(self, session_id: OwnedId, delivery_id: str) -> tuple[int, Delivery]:
        """Make it pending as the last one, or due now where it is pending; the session's key with it. Raises Conflict
        where it is running, TooManyDeliveries."""
        ...

    async def sessions_to_deliver(self) -> Sequence[int]:
        """The keys of sessions that can be given what is pending."""
        ...

    async def next_delivery(self, session_key: int) -> Next | None:
        """None where there is none, or the session is gone."""
        ...

    async def content(self, delivery_key: int) -> Content | None: ...

    async def begin_attempt(self, delivery: Delivery, run_id: str) -> None:
        """Record that it is running, its run, and one attempt more."""
        ...

    async def end_attempt(self, session_key: int, delivery_key: int, outcome: Outcome) -> None:
        """Record how it went, and now and then drop the oldest that have ended, if there are more than are kept."""
        ...

    async def note_reason(self, delivery_key: int, reason: str) -> None: ...

    async def cut_off(self) -> int:
        """Make pending what is running: its process is gone. How many there were."""
        ...


class Inbox:
    """`start` before anything; `begin_nothing`, then `stop` when done."""

    def __init__(self, store: Deliveries, runs: Runs, at_a_time: int) -> None:
        """At most `at_a_time` deliveries are being run, of as many sessions."""
        self._store = store
        self._runs = runs
        self._slots = asyncio.Semaphore(at_a_time)
        self._workers: dict[int, asyncio.Task[None]] = {}
        self._woken: dict[int, asyncio.Event] = {}
        self._looking: asyncio.Task[None] | None = None
        self._ending = False

    async def start(self) -> None:
        """Take up what an earlier process left."""
        if count := await self._store.cut_off():
            log.warning("deliveries_cut_off", count=count, why="the service stopped while they were running")
        self._looking = asyncio.create_task(self._look())

    def begin_nothing(self) -> None:
        """Begin no attempt any more. Those under way go on."""
        self._ending = True
        for woken in self._woken.values():
            woken.set()

    async def stop(self) -> None:
        """Wait until attempts under way are on record, for a moment: their runs have ended by now. One that isn't
        counts as cut off at the next start."""
        self.begin_nothing()
        if self._looking is not None:
            self._looking.cancel()
        if workers := list(self._workers.values()):
            _, late = await asyncio.wait(workers, timeout=_STOP_SECONDS)
            for task in late:
                task.cancel()

    async def receive(self, session: Session, call: relay.Call, base_url: str, key: bytes | None) -> Received:
        """Store a delivery. `key` is the API's. Raises NotFound where the session has no inbox, BadSignature, TooLarge
        for what no program could be given, TooManyDeliveries."""
        settings = await self.settings(session)
        if settings.verify is not None and not is_genuine(settings.verify, call.headers, call.body, now() / MICROS):
            raise BadSignature("The delivery is not signed, or not with the inbox's secret.")
        content = Content(
            method=call.method,
            path=relay.ascii_target(call.path) or "/",
            query=relay.ascii_target(call.query),
            headers=headers.of_request(call.headers, key),
            body=call.body,
            base_url=base_url,
        )
        _environment(content, "dlv", 1)
        sender_id = _sender_id(settings.verify, call)
        received = await self._store.add_delivery(session.key, new_id("dlv"), sender_id, content)
        if received.first:
            self._kick(session.key)
        return received

    async def settings(self, session: Session) -> InboxSettings:
        """Raises NotFound where the session has no inbox."""
        found = await self._store.inbox_of(session.key)
        if found is None:
            raise no_inbox(session.id)
        return found

    async def replay(self, session_id: OwnedId, delivery_id: str) -> Delivery:
        """Run a delivery once more, when it is its turn."""
        session_key, delivery = await self._store.replay_delivery(session_id, delivery_id)
        self._kick(session_key)
        return delivery

    def _kick(self, session_key: int) -> None:
        if self._ending:
            return
        if session_key in self._workers:
            self._woken[session_key].set()
            return
        self._woken[session_key] = asyncio.Event()
        task = self._workers[session_key] = asyncio.create_task(self._work(session_key))
        task.add_done_callback(lambda _: self._ended(session_key))

    def _ended(self, session_key: int) -> None:
        del self._workers[session_key]
        if self._woken.pop(session_key).is_set():  # something came when it had looked for the last time
            self._kick(session_key)

    async def _look(self) -> None:
        while True:
            try:
                for session_key in await self._store.sessions_to_deliver():
                    if session_key not in self._workers:
                        self._kick(session_key)
            except EraError as error:
                log.warning("inboxes_not_looked_at", error=error.message)
            await asyncio.sleep(_LOOK_SECONDS)

    async def _work(self, session_key: int) -> None:
        """Run a session's deliveries for as long as there are any that can be."""
        woken = self._woken[session_key]
        try:
            while not self._ending:
                woken.clear()
                head = await self._store.next_delivery(session_key)
                if head is None:
                    return
                if head.why_not is not None:
                    if head.delivery.reason != head.why_not:
                        await self._store.note_reason(head.delivery.key, head.why_not)
                    return
                wait = ((head.delivery.next_attempt_at or 0) - now()) / MICROS
                if wait <= 0:
                    async with self._slots:
                        # While it waited for a slot, much may have changed.
                        if not self._ending and (head := await self._store.next_delivery(session_key)):
                            wait = await self._attempt(head)
                if wait > 0:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(wait):
                            await woken.wait()
        except EraError as error:
            log.warning("deliveries_wait", session=session_key, error=error.message)
        except Exception:
            log.exception("bug", where="inbox", session=session_key)

    async def _attempt(self, head: Next) -> float:
        """Run a delivery, if it can be, and record how that went. The answer is how many seconds to wait where it
        could not be begun."""
        delivery = head.delivery
        due = (delivery.next_attempt_at or 0) <= now()
        content = await self._store.content(delivery.key) if due and head.why_not is None else None
        if content is None:
            return 0
        if delivery.tries > head.retries:  # its last attempt was cut off
            reason = "The service stopped during its last attempt."
            await self._record(head, Outcome("failed", delivery.attempts, delivery.tries, None, reason))
            return 0
        request = RunRequest(
            content.base_url,
            env=_environment(content, delivery.id, delivery.attempts + 1),
            public=True,
            session_key=head.session_key,
        )
        begun: list[str] = []
        try:
            events = self._noted(head, begun, self._runs.stream(head.session_id, request))
            outcome = self._judged(head, await collect(events))
        except (SessionDeleted, NotFound, Expired):
            outcome = _put_back(delivery)  # it may be restored
        except EraError as error:
            if not begun:
                if not isinstance(error, TooManyWaiting):
                    await self._store.note_reason(delivery.key, error.message)
                return _AGAIN_SECONDS
            outcome = self._failed(head, None, error.message)
        except Exception:
            log.exception("bug", where="inbox", delivery=delivery.id)
            outcome = self._failed(head, None, "The service failed.")
        if not begun:
            return _AGAIN_SECONDS
        await self._record(head, outcome)
        return 0

    async def _noted(self, head: Next, begun: list[str], events: AsyncIterator[RunEvent]) -> AsyncIterator[RunEvent]:
        """The events of a run, whose beginning is put on record."""
        async for event in events:
            if isinstance(event, RunStarted):
                begun.append(event.run_id)
                try:
                    await self._store.begin_attempt(head.delivery, event.run_id)
                except EraError as error:
                    log.warning("attempt_not_recorded", delivery=head.delivery.id, error=error.message)
            yield event

    def _judged(self, head: Next, run: Collected) -> Outcome:
        try:
            answer = relay.reply(run, "/").status
        except RelayFailed as error:
            return self._failed(head, error.status, error.message)
        if run.result.status != "ok":
            return self._failed(head, answer, f"The run ended as '{run.result.status}'.")
        if answer >= 500:
            return self._failed(head, answer, f"The program answered {answer}.")
        return Outcome("done", head.delivery.attempts + 1, head.delivery.tries + 1, answer)

    def _failed(self, head: Next, answer: int | None, reason: str) -> Outcome:
        attempts, tries = head.delivery.attempts + 1, head.delivery.tries + 1
        if self._ending:  # it was killed with all else
            return _put_back(head.delivery)
        if tries > head.retries:
            return Outcome("failed", attempts, tries, answer, reason)
        return Outcome("pending", attempts, tries, answer, reason, now() + int(delay(tries) * MICROS))

    async def _record(self, head: Next, outcome: Outcome) -> None:
        """Put it on record, however long that takes: until then it would count as running."""
        while True:
            try:
                await self._store.end_attempt(head.session_key, head.delivery.key, outcome)
                return
            except EraError as error:
                log.warning("attempt_not_recorded", delivery=head.delivery.id, error=error.message)
                if self._ending:
                    return
                await asyncio.sleep(_AGAIN_SECONDS)


def delay(tries: int) -> float:
    """Seconds to the next attempt when this many have failed."""
    return float(min(FIRST_DELAY * _FACTOR ** (tries - 1), _MAX_DELAY))


def no_inbox(session_id: str) -> NotFound:
    return NotFound(
        f"Session '{session_id}' has no inbox.",
        hint="PUT /api/sessions/{id}/inbox makes one.",
        code="no_inbox",
    )


def _put_back(delivery: Delivery) -> Outcome:
    """For an attempt that was cut off through no fault of its own."""
    return Outcome("pending", delivery.attempts + 1, delivery.tries)


def _environment(content: Content, delivery_id: str, attempt: int) -> dict[str, str]:
    """Raises TooLarge."""
    told = relay.variables(content.method, content.path, content.query, content.headers, content.body)
    return {**told, "ERA_DELIVERY_ID": delivery_id, "ERA_DELIVERY_ATTEMPT": str(attempt)}


def _sender_id(verify: Verify | None, call: relay.Call) -> str | None:
    """What a sender calls this delivery, the same each time it is sent."""
    if verify is not None and verify.scheme == "stripe" and (found := _event_id(call.body)):
        return _short(found)
    given = {name.lower(): value for name, value in reversed(call.headers)}
    for name in _SENDER_IDS:
        if value := given.get(name, b"").strip():
            return _short(value.decode("latin-1"))
    return None


def _event_id(body: bytes) -> str | None:
    try:
        event = jsontext.loads(body)
    except jsontext.JsonProblem:
        return None
    found = event.get("id") if isinstance(event, dict) else None
    return found if isinstance(found, str) and found else None


def _short(sender_id: str) -> str:
    """An id as it can be kept."""
    if len(sender_id) <= _MAX_SENDER_ID and sender_id.isprintable():
        return sender_id
    return "sha256:" + hashlib.sha256(json.dumps(sender_id).encode()).hexdigest()
