"""Runs the deliveries of inboxes, and receives new ones.

Theory of operation
===================

A delivery is a row. It is acknowledged once the row is durable, and is run later as the relay would run it (relay.py):
through the session's stored code, as an ordinary run, so promises about runs hold for it. Its own states:

    pending ─► running ─► done
       ▲          │
       └──────────┴─────► failed, after as many retries as the inbox allows

A session's deliveries are run one after the other, by `position`. One that fails is tried again after a delay, and the
later ones wait for it: the program sees them in the order in which they were sent. A replay takes the last position.

A session with pending deliveries has a worker, a task. It ends when there is nothing to do, also where the session
stores no code or isn't public; `_poll` starts one again once that has changed. All that matters is in the rows, so a
crash needs no repair but to make `running` deliveries `pending`.

Runs are at most once, deliveries at least once: one whose run was cut off by a crash is pending again at the next
start. The attempt stays counted, so a delivery that brings down the service isn't tried for ever. Where the service is
stopped, or had no sandbox in which the program could begin, the delivery isn't to blame, and the attempt doesn't count.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import replace
from functools import partial

import structlog

from era.core import jsontext
from era.core.expiry import MICROS
from era.core.fair_limiter import FairLimiter
from era.core.homes import ALONE, Cluster
from era.core.models import OwnedId, Session, new_id, now
from era.core.public import headers, relay
from era.core.public.inbox import Content, Delivery, InboxSettings, InboxStore, Next, Outcome, Received, no_inbox
from era.core.public.signatures import Verify, is_genuine
from era.core.retry_delay import delay
from era.core.run_messages import Collected, RunRequest
from era.core.runs import Runs
from era.core.telemetry import BeginTrace, DeliveryEnded, Note, Origin, ignore, origin, untraced
from era.errors import (
    BadSignature,
    CommitFailed,
    EraError,
    Expired,
    Fenced,
    NotFound,
    RelayFailed,
    SessionDeleted,
    TooManyWaiting,
    Unavailable,
)

log = structlog.get_logger()

_POLL_SECONDS = 1.0
_AGAIN_SECONDS = 1.0
"""Delay before something is tried again that failed through no fault of the delivery's."""

_AGAIN_AT_MOST = 64
"""It doubles each time, up to so many times as long."""

_FOR_OTHERS = 4
"""One of so many slots, at least one, is left to others by an owner who has all the rest."""

_STOP_SECONDS = 5.0
_MAX_SENDER_ID = 255
_SENDER_IDS = (b"x-github-delivery", b"idempotency-key", b"x-delivery-id")
"""Headers in which senders give an id of a delivery."""


class Inbox:
    """Receives deliveries and runs them. Call `start` first; at the end `stop_new_attempts`, then `stop`."""

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
        self._note = note
        self._begin_trace = begin_trace
        self._cluster = cluster
        self._store = store
        self._runs = runs
        self._at_a_time = at_a_time
        self._slots = FairLimiter(at_a_time, of_owner=max(1, at_a_time - max(1, at_a_time // _FOR_OTHERS)))
        self._due = 0
        """Workers that have a slot, or wait for one."""

        self._workers: dict[int, asyncio.Task[None]] = {}
        self._woken: dict[int, asyncio.Event] = {}
        self._polling: asyncio.Task[None] | None = None
        self._ending = False

    async def start(self) -> None:
        """Make deliveries pending that an earlier process was running, and start polling."""
        if self._cluster is ALONE and (count := await self._store.cut_off()):
            log.warning("deliveries_cut_off", count=count, why="the service stopped while they were running")
        self._polling = asyncio.create_task(self._poll())

    async def stop_new_attempts(self) -> None:
        """Begin no more attempts. Those under way go on, but don't count if they are cut off."""
        if self._ending:
            return
        self._ending = True
        for woken in self._woken.values():
            woken.set()
        if self._cluster is not ALONE:
            return  # some of those that run are other hosts'
        try:
            # Now, and not when they have been cut off: a busy machine may not get to write that any more.
            await self._store.count_none_running()
        except EraError as error:
            log.warning("attempts_count", error=error.message)

    async def stop(self) -> None:
        """Wait up to _STOP_SECONDS until attempts are recorded, whose runs have ended by now. An attempt that isn't
        recorded is found cut off at the next start."""
        await self.stop_new_attempts()
        if self._polling is not None:
            self._polling.cancel()
        if workers := list(self._workers.values()):
            _, late = await asyncio.wait(workers, timeout=_STOP_SECONDS)
            for task in late:
                task.cancel()

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
        received = await self._store.add_delivery(session.key, new_id("dlv"), sender_id, content)
        if received.first:
            self._wake(session.key)
        return received

    async def settings(self, session: Session) -> InboxSettings:
        """The settings of a session's inbox. Raises NotFound where it has none."""
        settings = await self._store.inbox_of(session.key)
        if settings is None:
            raise no_inbox(session.id)
        return settings

    async def replay(self, session_id: OwnedId, delivery_id: str) -> Delivery:
        """Run a delivery again, in its turn. Raises as InboxStore.replay_delivery does."""
        session_key, delivery = await self._store.replay_delivery(session_id, delivery_id)
        self._wake(session_key)
        return delivery

    def _wake(self, session_key: int) -> None:
        """Have the session's worker look for deliveries: wake it, or start one."""
        if self._ending:
            return
        if session_key in self._workers:
            self._woken[session_key].set()
            return
        self._woken[session_key] = asyncio.Event()
        task = self._workers[session_key] = asyncio.create_task(self._work(session_key))
        task.add_done_callback(lambda _: self._ended(session_key))

    def _ended(self, session_key: int) -> None:
        """Forget a worker that has ended; start another if it was woken too late to notice."""
        del self._workers[session_key]
        if self._woken.pop(session_key).is_set():  # a delivery came after the worker's last look
            self._wake(session_key)

    def is_working(self, session_key: int) -> bool:
        """Whether deliveries of the session are being run."""
        return session_key in self._workers

    async def _poll(self) -> None:
        """Every _POLL_SECONDS, start workers for sessions that can run deliveries and have no worker."""
        while True:
            try:
                keys = [key for key in await self._store.sessions_to_deliver() if key not in self._workers]
                # At least one: or those of sessions that nobody has would wait for as long as there are others.
                for session_key in await self._cluster.owned(keys, max(1, self._at_a_time - self._due)):
                    self._wake(session_key)
            except EraError as error:
                log.warning("inboxes_not_looked_at", error=error.message)
            except Exception:  # it looks again all the same
                log.exception("bug", where="inboxes")
            await asyncio.sleep(_POLL_SECONDS)

    async def _work(self, session_key: int) -> None:
        """A session's worker: run its deliveries until there is none that can be run."""
        origin.set(None)  # the request that woke it brought one delivery of many
        woken = self._woken[session_key]
        begun_in_vain = 0
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
                    async with self._slot(head.session_id.owner):
                        # Read it again: much may have changed while it waited for a slot.
                        if not self._ending and (head := await self._store.next_delivery(session_key)):
                            wait = await self._attempt(head)
                            begun_in_vain = begun_in_vain + 1 if wait else 0
                            # Each such try may leave a run's record, so a machine that can't run any isn't asked often.
                            wait *= min(1 << max(begun_in_vain - 1, 0), _AGAIN_AT_MOST)
                if wait > 0:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(wait):
                            await woken.wait()
        except EraError as error:
            log.warning("deliveries_wait", session=session_key, error=error.message)
        except Exception:
            log.exception("bug", where="inbox", session=session_key)

    @asynccontextmanager
    async def _slot(self, owner: str) -> AsyncIterator[None]:
        self._due += 1
        try:
            async with self._slots.slot(owner):
                yield
        finally:
            self._due -= 1

    async def _attempt(self, head: Next) -> float:
        """Run a delivery, if it is due and can be run, and record the outcome.

        Returns the seconds to wait before the next try where the run could not be begun, else 0.
        """
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
            check=partial(self._check_pending, delivery.key),
        )
        begun: list[str] = []

        async def started(run_id: str) -> None:
            nonlocal head
            begun.append(run_id)
            head = await self._record_start(head, run_id)

        # It goes on in the trace of whoever sent it, and its run is below it.
        trace = self._begin_trace(next((value for name, value in content.headers if name == "traceparent"), None))
        origin.set(Origin(trace=trace) if trace else None)
        began_at, began = time.time(), time.monotonic()
        try:
            run = await self._runs.run(head.session_id, request, started)
            with closing(run):
                outcome = await self._outcome(head, run)
        except (SessionDeleted, NotFound, Expired):
            outcome = _put_back(head.delivery)  # the session may be restored
        except EraError as error:
            if not begun:
                if not isinstance(error, TooManyWaiting):
                    await self._store.note_reason(delivery.key, error.message)
                return _AGAIN_SECONDS
            if isinstance(error, Unavailable) and not isinstance(error, CommitFailed):  # this machine's fault
                outcome = _put_back(head.delivery, error.message, delay(delivery.attempts + 1))
            else:
                outcome = self._failed(head, None, error.message)
        except Exception:
            log.exception("bug", where="inbox", delivery=delivery.id)
            outcome = self._failed(head, None, "The service failed.")
        if not begun:
            return _AGAIN_SECONDS
        self._note(
            DeliveryEnded(
                delivery.id,
                head.session_id.id,
                head.session_id.owner,
                begun[0],
                outcome.status,
                outcome.attempts,
                outcome.answer_status,
                max(now() - delivery.received_at, 0) / MICROS,
                began_at,
                time.monotonic() - began,
                trace,
            )
        )
        await self._record(head, outcome)
        return 0

    async def _check_pending(self, delivery_key: int) -> None:
        """Raises NotFound for a delivery that is gone, or not pending any more."""
        if not await self._store.is_pending(delivery_key):
            raise NotFound("The delivery is gone.")

    async def _record_start(self, head: Next, run_id: str) -> Next:
        """Record the attempt when its run has started. Returns what it is an attempt of: the delivery may have been
        replayed while the run waited for its turn."""
        try:
            delivery = await self._store.begin_attempt(head.delivery.key, run_id, counts=not self._ending)
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
        if self._ending:  # the service is stopping and has killed it
            return _put_back(head.delivery)
        if tries > head.retries:
            return Outcome("failed", attempts, tries, answer, reason)
        return Outcome("pending", attempts, tries, answer, reason, now() + int(delay(tries) * MICROS))

    async def _record(self, head: Next, outcome: Outcome) -> None:
        """Record an outcome, retrying as long as it takes: until then the delivery would count as running."""
        while True:
            try:
                await self._store.end_attempt(head.session_key, head.delivery, outcome)
                return
            except Fenced:
                return  # the host where the session is now has it pending again
            except EraError as error:
                log.warning("attempt_not_recorded", delivery=head.delivery.id, error=error.message)
                if self._ending:
                    return
                await asyncio.sleep(_AGAIN_SECONDS)


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
