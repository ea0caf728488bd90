"""A session's inbox: its settings, its deliveries, their limits, and the port to the rows that hold them.

Deliveries are webhooks, stored before they are acknowledged and run in order by inbox_worker.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from era.core.models import OwnedId
from era.core.signatures import Verify
from era.errors import NotFound

type DeliveryStatus = Literal["pending", "running", "done", "failed"]

DEFAULT_RETRIES = 5
MAX_RETRIES = 20

MAX_PENDING = 10_000
MAX_PENDING_BYTES = 256 << 20
KEPT = 1000
"""How many ended deliveries of a session are kept."""

KEPT_RUN_IDS = 50
"""How many run ids a delivery keeps, the newest."""


@dataclass(frozen=True, slots=True)
class InboxSettings:
    """How an inbox verifies and retries deliveries. `retries` is how often a failed one is tried again; times are in
    microseconds since 1970."""

    verify: Verify | None
    retries: int
    created_at: int
    updated_at: int


@dataclass(frozen=True, slots=True)
class Content:
    """The request that brought a delivery. `path` and `query` are as received, escaped, the query without its `?`;
    `headers` are those that a session may see, with names in lower case."""

    method: str
    path: str
    query: str
    headers: Sequence[tuple[str, str]]
    body: bytes = field(repr=False)
    base_url: str


@dataclass(frozen=True, slots=True)
class Delivery:
    """A delivery without its content. Times are in microseconds since 1970, `size` is that of the body in bytes."""

    key: int
    id: str
    sender_id: str | None
    """The id that its sender gave it, the same each time it is sent."""

    received_at: int
    status: DeliveryStatus
    attempts: int
    """All attempts so far."""

    tries: int
    """Attempts since it was received or last replayed, which `retries` bounds."""

    run_ids: Sequence[str]
    next_attempt_at: int | None
    ended_at: int | None
    answer_status: int | None
    """HTTP status that the program answered in the last attempt, if it did."""

    reason: str | None
    """Why the last attempt failed, or why there was none yet."""

    method: str
    path: str
    size: int


@dataclass(frozen=True, slots=True)
class Next:
    """A session's first pending delivery, with what decides whether it can be run."""

    delivery: Delivery
    content: Content
    session_key: int
    session_id: OwnedId
    retries: int
    why_not: str | None
    """Why the session can't run deliveries now; None if it can."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The state of a delivery after an attempt; the fields are those of Delivery."""

    status: DeliveryStatus
    attempts: int
    tries: int
    answer_status: int | None = None
    reason: str | None = None
    next_attempt_at: int | None = None


@dataclass(frozen=True, slots=True)
class Backlog:
    """How many deliveries wait to be run, and since when (microseconds since 1970) the oldest one that is due and could
    be; None where there is none."""

    pending: int
    oldest: int | None


@dataclass(frozen=True, slots=True)
class Received:
    """A delivery as acknowledged. `first` is False for one that was received before, by its sender's id."""

    delivery_id: str
    status: DeliveryStatus
    first: bool


class InboxStore(Protocol):
    """Rows of inboxes and deliveries. Every call is one transaction, unless it says otherwise, and durable when it
    returns. Calls with a session's id raise NotFound and Expired as those of MetadataStore do; NotFound also means that
    there is no such inbox or delivery."""

    async def put_inbox(self, session_id: OwnedId, verify: Verify | None, retries: int) -> InboxSettings:
        """Create an inbox, or replace its settings."""
        ...

    async def inbox(self, session_id: OwnedId) -> tuple[InboxSettings, Mapping[DeliveryStatus, int]]:
        """An inbox, and how many deliveries of each status it has."""
        ...

    async def inbox_of(self, session_key: int) -> InboxSettings | None:
        """The inbox of the session with this key, None where it has none."""
        ...

    async def delete_inbox(self, session_id: OwnedId) -> int:
        """Delete an inbox, after its deliveries in small transactions: a call that was cut off can be made again.
        Returns how many there were."""
        ...

    async def add_delivery(
        self, session_key: int, delivery_id: str, sender_id: str | None, content: Content
    ) -> Received:
        """Add a pending delivery, unless one with this `sender_id` is known. Raises NotFound where there is no inbox
        any more, TooManyDeliveries."""
        ...

    async def deliveries(
        self, session_id: OwnedId, *, status: DeliveryStatus | None, limit: int, before: int | None
    ) -> Sequence[Delivery]:
        """Up to `limit` deliveries, newest first, beginning after the one with the key `before`."""
        ...

    async def delivery(self, session_id: OwnedId, delivery_id: str) -> tuple[Delivery, Content]: ...

    async def replay_delivery(self, session_id: OwnedId, delivery_id: str) -> tuple[int, Delivery]:
        """Make an ended delivery pending, behind all others, or a pending one due now. Returns it with its session's
        key. Raises Conflict where it is running, TooManyDeliveries."""
        ...

    async def backlog(self) -> Backlog:
        """What waits, in all inboxes."""
        ...

    async def due(self) -> Mapping[int, str]:
        """The owners of sessions whose first pending delivery is due and can be run, by the session's key."""
        ...

    async def next_delivery(self, session_key: int) -> Next | None:
        """The session's first pending delivery. None without one, or where the session is gone."""
        ...

    async def is_pending(self, delivery_key: int) -> bool: ...

    async def begin_attempt(self, delivery_key: int, run_id: str, *, counts: bool) -> Delivery | None:
        """Make a pending delivery running and add the run's id. If it `counts`, it is one of the attempts that may
        fail. Returns the delivery as it was before: it may have been replayed since the caller read it. None where it
        isn't pending any more."""
        ...

    async def count_none_running(self) -> None:
        """Let the attempts under way not count, unless they end with an outcome."""
        ...

    async def end_attempt(self, session_key: int, delivery: Delivery, outcome: Outcome) -> None:
        """Record the outcome of an attempt, unless that is over. `delivery` is as it was before it: either the attempt
        is under way, or its beginning wasn't recorded, and the delivery hasn't been replayed since. Now and then,
        delete the oldest ended deliveries beyond KEPT."""
        ...

    async def put_off(self, delivery_key: int, reason: str, next_attempt_at: int | None) -> None:
        """Record why a pending delivery isn't run before this time."""
        ...

    async def cut_off(self) -> int:
        """Make all running deliveries pending, since the process that ran them is gone. Returns how many there were."""
        ...


def no_inbox(session_id: str) -> NotFound:
    """The error for a session without an inbox."""
    return NotFound(
        f"Session '{session_id}' has no inbox.",
        hint="PUT /api/sessions/{id}/inbox makes one.",
        code="no_inbox",
    )
