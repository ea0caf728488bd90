"""Runs the deliveries of inboxes, and receives new ones.

Theory of operation
===================

A delivery is a row. It is acknowledged once the row is durable, and is run later as the relay would run it (relay.py):
through the session's stored code, as an ordinary run, so promises about runs hold for it. Its own states:

    pending ─► running ─► done
       ▲          │
       └──────────┴─────► failed, after as many retries as the inbox allows

A session's deliveries are a queue of the engine (deliveries.py), by `position`. The program sees them in the order in
which they were sent. A replay takes the last position. Nothing is due while the session stores no code or isn't public.

Runs are at most once, deliveries at least once: one whose run was cut off by a crash is pending again at the next
start. The attempt stays counted, so a delivery that brings down the service isn't tried for ever. Where the service is
stopped, or had no sandbox in which the program could begin, the delivery isn't to blame, and the attempt doesn't count.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial

import structlog

from era.core import jsontext
from era.core.concurrency.fair_limiter import FairLimiter
from era.core.concurrency.late_ends import delay
from era.core.execution.run_messages import Collected, RunRequest
from era.core.models import MICROS, OwnedId, Session, new_id, now
from era.core.owners.deliveries import Deliveries, Record, after_failure
from era.core.ports import ALONE, Cluster
from era.core.public import headers, relay
from era.core.public.inbox import Content, Delivery, InboxSettings, InboxStore, Next, Outcome, Received, no_inbox
from era.core.runs.runs import Runs
from era.core.signatures import Verify, is_genuine
from era.core.telemetry import BeginTrace, DeliveryEnded, Note, Origin, Trace, ignore, origin, untraced
from era.errors import (
    BadSignature,
    CommitFailed,
    EraError,
    Expired,
    NotFound,
    RelayFailed,
    SessionDeleted,
    Unavailable,
)

log = structlog.get_logger()

_MOST_DOUBLINGS = 6
"""A delivery whose run can't be begun is tried again after a second. That doubles each time, up to 64 seconds."""

_FOR_OTHERS = 4
"""One of so many slots, at least one, is left to others by an owner who has all the rest."""

_BUG = "The service failed."
_MAX_SENDER_ID = 255
_SENDER_IDS = (b"x-github-delivery", b"idempotency-key", b"x-delivery-id")
"""Headers in which senders give an id of a delivery."""


class Inbox(Deliveries[int, Next]):
    """Receives deliveries and runs them: a queue by session key. At the end call `stop_new_attempts`, then `stop`."""

    stop_seconds = 5.0
    """The runs under way have ended by then; what is left is to record their outcomes."""

    def __init__(
        self,
        store: InboxStore,
        runs: Runs,
        at_a_time: int,
        note: Note = ignore,
        begin_trace: BeginTrace = untraced,
        cluster: Cluster = ALONE,
    ) -> None:
        """At most `at_a_time` deliveries run at a time, each of another session, and at most three quarters of them
        of one owner. In a `cluster` those of sessions that are at home here."""
        of_owner = max(1, at_a_time - max(1, at_a_time // _FOR_OTHERS))
        super().__init__("inbox", FairLimiter(at_a_time, of_owner=of_owner))
        self.store = store
        self._runs = runs
        self._note = note
        self._begin_trace = begin_trace
        self._cluster = cluster
        self._in_vain: Counter[int] = Counter()
        """Tries, since the last that succeeded, to begin a run of a session's next delivery."""

    async def start(self) -> None:
        """Make deliveries pending that an earlier process was running, and begin to run those that are due."""
        if self._cluster is ALONE and (count := await self.store.cut_off()):
            log.warning("deliveries_cut_off", count=count, why="the service stopped while they were running")
        await super().start()

    async def stop_new_attempts(self) -> None:
        """Begin no more attempts. Those under way go on, but don't count if they are cut off."""
        if self._is_stopping:
            return
        self._is_stopping = True
        if self._cluster is not ALONE:
            return  # some of those that run are other hosts'
        try:
            # Now, and not when they have been cut off: a busy machine may not get to write that any more.
            await self.store.count_none_running()
        except EraError as error:
            log.warning("attempts_count", error=error.message)

    async def stop(self) -> None:
        """See Deliveries. An attempt that isn't recorded is found cut off at the next start."""
        await self.stop_new_attempts()
        await super().stop()

    async def receive(self, session: Session, call: relay.Call, base_url: str, key: bytes | None) -> Received:
        """Verify and store a delivery. `key` is the operator's API key, which no program may see.

        Raises NotFound where the session has no inbox, BadSignature, TooLarge for what fits no program's environment,
        TooManyDeliveries.
        """
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
        _environment(content, "dlv", 1)  # only to raise TooLarge now and not in the run
        sender_id = _sender_id(settings.verify, call)
        received = await self.store.add_delivery(session.key, new_id("dlv"), sender_id, content)
        if received.first:
            self.wake(session.key, session.owner)
        return received

    async def settings(self, session: Session) -> InboxSettings:
        """The settings of a session's inbox. Raises NotFound where it has none."""
        settings = await self.store.inbox_of(session.key)
        if settings is None:
            raise no_inbox(session.id)
        return settings

    async def replay(self, session_id: OwnedId, delivery_id: str) -> Delivery:
        """Run a delivery again, in its turn. Raises as InboxStore.replay_delivery does."""
        session_key, delivery = await self.store.replay_delivery(session_id, delivery_id)
        self.wake(session_key, session_id.owner)
        return delivery

    async def due(self) -> Mapping[int, str]:
        """See Deliveries. Of sessions without a home, this host takes as many as there are slots for."""
        found = await self.store.due()
        room = self._slots.count - self._slots.taken - self._slots.waiting
        # At least one: or those of sessions that nobody has would wait for as long as there are others.
        keys = await self._cluster.owned([key for key in found if not self.is_working(key)], max(1, room))
        return {key: found[key] for key in keys}

    async def next_due(self, key: int) -> Next | None:
        """See Deliveries."""
        head = await self.store.next_delivery(key)
        if head is None:
            del self._in_vain[key]
            return None
        delivery = head.delivery
        if head.why_not is None:
            return head if (delivery.next_attempt_at or 0) <= now() else None
        if delivery.reason != head.why_not:
            await self.store.put_off(delivery.key, head.why_not, delivery.next_attempt_at)
        return None

    async def attempt(self, head: Next) -> Record:
        """Run a delivery."""
        tries = head.delivery.tries
        if tries > head.retries:  # its last attempt was cut off
            reason = "The service stopped during its last attempt."
            return self._record(head, Outcome("failed", head.delivery.attempts, tries, None, reason))
        begun: list[str] = []

        async def started(run_id: str) -> None:
            nonlocal head
            begun.append(run_id)
            head = await self._record_start(head, run_id)

        # It goes on in the trace of whoever sent it, and its run is below it.
        trace = self._begin_trace(next((value for name, value in head.content.headers if name == "traceparent"), None))
        origin.set(Origin(trace=trace) if trace else None)
        began_at, began = time.time(), time.monotonic()
        try:
            with closing(await self._runs.run(head.session_id, self._request(head), started)) as run:
                outcome = await self._outcome(head, run)
        except EraError as error:
            if not begun:
                return self._put_off(head, error.message)
            outcome = self._failed_by(head, error)
        except Exception:
            log.exception("bug", where="inbox", delivery=head.delivery.id)
            if not begun:
                return self._put_off(head, _BUG)
            outcome = self._failed(head, None, _BUG)
        del self._in_vain[head.session_key]
        self._note(_ended(head, begun[0], outcome, began_at, time.monotonic() - began, trace))
        return self._record(head, outcome)

    def _request(self, head: Next) -> RunRequest:
        """The run that an attempt makes."""
        delivery, content = head.delivery, head.content
        return RunRequest(
            content.base_url,
            env=_environment(content, delivery.id, delivery.attempts + 1),
            public=True,
            session_key=head.session_key,
            check=partial(self._check_pending, delivery.key),
        )

    async def _check_pending(self, delivery_key: int) -> None:
        """Raises NotFound for a delivery that is gone, or not pending any more."""
        if not await self.store.is_pending(delivery_key):
            raise NotFound("The delivery is gone.")

    async def _record_start(self, head: Next, run_id: str) -> Next:
        """Record the attempt when its run has started. Returns what it is an attempt of: the delivery may have been
        replayed while the run waited for its turn."""
        try:
            delivery = await self.store.begin_attempt(head.delivery.key, run_id, counts=not self._is_stopping)
        except EraError as error:
            log.warning("attempt_not_recorded", delivery=head.delivery.id, error=error.message)
            return head
        return replace(head, delivery=delivery) if delivery else head

    async def _outcome(self, head: Next, run: Collected) -> Outcome:
        """Whether an attempt succeeded: a run that ended well and was kept, and an answer below 500."""
        try:
            answer = (await relay.reply(run, headers.Place("/", None), head.session_id.owner)).status
        except RelayFailed as error:
            return self._failed(head, error.status, error.message)
        if run.result.status != "ok":
            return self._failed(head, answer, f"The run ended as '{run.result.status}'.")
        if answer >= 500:
            return self._failed(head, answer, f"The program answered {answer}.")
        if not run.result.state.committed:  # what it made of the delivery is lost, be it data or files
            return self._failed(head, answer, run.result.state.reason or "The run was not kept.")
        return Outcome("done", head.delivery.attempts + 1, head.delivery.tries + 1, answer)

    def _failed(self, head: Next, answer: int | None, reason: str) -> Outcome:
        """The outcome of a failed attempt: pending again after a delay, or failed for good."""
        attempts, tries = head.delivery.attempts + 1, head.delivery.tries + 1
        if self._is_stopping:  # which has killed it
            return _put_back(head.delivery)
        status, due = after_failure(tries, head.retries)
        return Outcome(status, attempts, tries, answer, reason, due)

    def _failed_by(self, head: Next, error: EraError) -> Outcome:
        """The outcome of an attempt whose run has no result."""
        has_gone = isinstance(error, SessionDeleted | NotFound | Expired)  # the session may be restored
        is_machines_fault = isinstance(error, Unavailable) and not isinstance(error, CommitFailed)
        if has_gone or is_machines_fault:
            return _put_back(head.delivery, error.message, delay(head.delivery.attempts + 1))
        return self._failed(head, None, error.message)

    def _put_off(self, head: Next, reason: str) -> Record:
        """Try again later to begin a run. Each try may leave a run's record, so a machine that can't run any isn't
        asked often."""
        seconds = 1 << min(self._in_vain[head.session_key], _MOST_DOUBLINGS)
        self._in_vain[head.session_key] += 1
        return partial(self.store.put_off, head.delivery.key, reason, now() + seconds * MICROS)

    def _record(self, head: Next, outcome: Outcome) -> Record:
        return partial(self.store.end_attempt, head.session_key, head.delivery, outcome)


def _ended(
    head: Next, run_id: str, outcome: Outcome, began_at: float, seconds: float, trace: Trace | None
) -> DeliveryEnded:
    """What operators are told of an attempt."""
    lag = max(now() - head.delivery.received_at, 0) / MICROS
    return DeliveryEnded(
        head.delivery.id,
        head.session_id.id,
        head.session_id.owner,
        run_id,
        outcome.status,
        outcome.attempts,
        outcome.answer_status,
        lag,
        began_at,
        seconds,
        trace,
    )


def _put_back(delivery: Delivery, reason: str | None = None, seconds: float = 0.0) -> Outcome:
    """The outcome of an attempt that came to nothing through no fault of the delivery's: it doesn't count as a try, and
    the next may begin in so many seconds."""
    due = now() + int(seconds * MICROS) if seconds else None
    return Outcome("pending", delivery.attempts + 1, delivery.tries, None, reason, due)


def _environment(content: Content, delivery_id: str, attempt: int) -> dict[str, str]:
    """The variables of a delivery's run. Raises TooLarge for what fits no environment."""
    variables = relay.variables(content.method, content.path, content.query, content.headers, content.body)
    return {**variables, "ERA_DELIVERY_ID": delivery_id, "ERA_DELIVERY_ATTEMPT": str(attempt)}


def _sender_id(verify: Verify | None, call: relay.Call) -> str | None:
    """The sender's id of a delivery, the same each time it is sent; None where it gives none."""
    if verify is not None and verify.scheme == "stripe" and (event_id := _event_id(call.body)):
        return _bounded_id(event_id)
    received = {name.lower(): value for name, value in reversed(call.headers)}
    for name in _SENDER_IDS:
        if value := received.get(name, b"").strip():
            return _bounded_id(value.decode("latin-1"))
    return None


def _event_id(body: bytes) -> str | None:
    """The `id` of a JSON object, as Stripe's events have it."""
    try:
        event = jsontext.loads(body)
    except jsontext.JsonProblem:
        return None
    event_id = event.get("id") if isinstance(event, dict) else None
    return event_id if isinstance(event_id, str) and event_id else None


def _bounded_id(sender_id: str) -> str:
    """An id as it is stored: itself, or its hash if it is long or not printable."""
    if len(sender_id) <= _MAX_SENDER_ID and sender_id.isprintable():
        return sender_id
    return "sha256:" + hashlib.sha256(json.dumps(sender_id).encode()).hexdigest()
