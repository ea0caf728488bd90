"""Idempotency keys: a request that comes twice is carried out once, and gets the same answer twice.

Theory of operation. The first request with a key claims it in the transaction that begins its run or makes its
session; the answer is stored in the transaction that ends the run or, again, makes the session. So a claim without an
answer is a run under way, or one that was lost with the process. Requests with the same key wait for each other here.

Two requests with one key must be the same. Their bodies are compared by a stored hash, except for `env` and the values
of `secrets`, the hidden parts: those are often short, so no hash of them may lie in a database, salted or not. They are
compared by a keyed hash (HMAC) whose key this process made up and never stores. After a restart a request that differs
in nothing but these therefore counts as the same.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

from era.core import jsontext
from era.core.concurrency.turns import Turns
from era.core.metadata import MetadataStore
from era.core.models import DEFAULT_OWNER, Claim, Claimed, OwnedId, Route, Session, Snapshot, StoredCode
from era.errors import CommitFailed, Conflict, KeyReused, RunLost, TooManyWaiting

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


class IdempotencyKeys:
    """Finds the first request with a key, and has others with the same key wait for it."""

    def __init__(self, store: MetadataStore) -> None:
        self._store = store
        self._turns = Turns()
        self._process = secrets.token_hex(8)
        """Names this process, so that hidden parts hashed by an earlier one aren't compared."""

        self._secret = secrets.token_bytes(32)

    def claim(self, route: Route, key: str, body: Mapping[str, Any], hidden: Any = None) -> Claim:
        """The claim of a request with this key. `body` is its body without the parts that must not be stored, which are
        `hidden`; both are JSON values."""
        mark = hmac.new(self._secret, _canonical(hidden), hashlib.sha256).hexdigest()
        return Claim(route, key, hashlib.sha256(_canonical(body)).hexdigest(), f"{self._process}:{mark}")

    async def claim_aside(self, route: Route, key: str, body: Mapping[str, Any], hidden: Any = None) -> Claim:
        """The same beside the event loop where the parts are long."""
        return await jsontext.aside_where_long(lambda parts: self.claim(route, key, *parts), [body, hidden])

    @asynccontextmanager
    async def held(self, session_id: OwnedId, claim: Claim) -> AsyncIterator[Claimed | None]:
        """The key's first request, once that has ended; None where this is the first. Others with the key wait until
        the block ends. Raises KeyReused where the first request was a different one, TooManyWaiting."""
        turn = (claim.route, session_id, claim.key)
        if self._turns.taken(turn):
            await self.look_up(session_id, claim)  # Another request needn't wait to be refused.
        if self._turns.is_full(turn):
            waiting = f"{self._turns.max_waiting} requests wait for the first one with the key '{claim.key}' already."
            raise TooManyWaiting(waiting, hint="Wait for its answer before you send it again.")
        async with self._turns.take(turn, bounded=False):
            yield await self.look_up(session_id, claim)

    async def look_up(self, session_id: OwnedId, claim: Claim) -> Claimed | None:
        """The key's first request, as far as it has come. Raises KeyReused where that was a different one."""
        first = await self._store.find_claim(session_id, claim)
        if first is not None and not _is_same(first, claim):
            raise KeyReused(f"The key '{claim.key}' was used for another request.")
        return first


def _canonical(value: Any) -> bytes:
    """The same text for all equal values. Its hash is stored, so it must stay what it is."""
    return jsontext.encoded(_CANONICAL, value).encode()


def _is_same(first: Claimed, claim: Claim) -> bool:
    """Whether two requests are the same, as far as this process can tell."""
    process, _, _ = claim.env_mark.partition(":")
    can_tell = first.env_mark.startswith(f"{process}:")
    return first.request_hash == claim.request_hash and (not can_tell or first.env_mark == claim.env_mark)


def no_answer(first: Claimed) -> Exception:
    """The error that tells why the answer to the first request can't be repeated."""
    record = first.run
    if first.answer == "":
        done = "The request" if record is None else f"Run '{record.id}'"
        return Conflict(
            f"{done} of this key has been carried out, and its answer isn't kept any more.",
            hint="It is not carried out again. The newest answers are kept, 1 GiB of a session and route.",
            code="answer_gone",
        )
    if record is None or record.status == "running":
        return Conflict("The run of this key is under way.", hint="Ask again once it has ended.", code="run_under_way")
    if record.status == "lost":
        return RunLost(f"Run '{record.id}' of this key was under way when the service stopped.")
    return CommitFailed(
        record.reason or "The run's result was not kept.",
        hint=f"Run '{record.id}' of this key has begun, so it is not run again. To run it again, use another key.",
    )


@dataclass(frozen=True, slots=True)
class Once[T]:
    """What a request has made, or an earlier one with the same idempotency key."""

    value: T
    replayed: bool = False
    """It was made by the earlier request."""


async def create_once(
    idempotency: IdempotencyKeys, source_id: OwnedId, claim: Claim | None, create: Callable[[], Awaitable[Session]]
) -> Once[Session]:
    """Create a session, unless a request with the same claim has done so."""
    if claim is None:
        return Once(await create())
    async with idempotency.held(source_id, claim) as first:
        if first is None or first.answer is None:
            try:
                return Once(await create())
            except Conflict:
                # Another host, where nobody waits for us, may have done it since we looked.
                first = await idempotency.look_up(source_id, claim)
                if first is None or first.answer is None:
                    raise
        if not first.answer:
            raise no_answer(first)
        return Once(session_from_json(first.answer), replayed=True)


def session_to_json(session: Session) -> str:
    """A session as JSON text, stored as the answer to its idempotency key."""
    return json.dumps(asdict(session))


def session_from_json(text: str) -> Session:
    """The reverse of `session_to_json`."""
    fields = json.loads(text)
    stored = fields["stored"]
    fields["stored"] = None if stored is None else StoredCode(**stored)
    fields["snapshot"] = Snapshot(**fields["snapshot"])
    return Session(**{"owner": DEFAULT_OWNER, **fields})  # older rows have no owner
