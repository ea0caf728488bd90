"""API keys: who calls, and which owner a key stands for.

Theory of operation
===================

All that is stored has an *owner*, which is a name and nothing more: whoever calls with a key of that owner's sees what
is the owner's, and of all else nothing. Revoking a key takes nothing from the owner.

The key in ERA_API_KEY is the *operator's*. It belongs to the owner `default`, as does whatever is done on a server that
wants no key, and it alone makes and revokes the others. So a server that has stored keys but was started without
ERA_API_KEY has no operator: it wants a key all the same, and its keys are as they are.

A key has *scopes*, which say what calls it is good for; api/routing/scopes.py knows which call needs which. It may have
an end, after which it is as good as revoked, and quotas of its own beside its owner's (quotas.py). *Rotating* a key
gives it another secret: its id, and all that hangs on that, stays, and the secret before is good for as long as was
asked for.

A key is 256 random bits. What is kept is its SHA-256, and nothing slower is needed: there is nothing to guess. All are
held in memory by that digest, so a call is let in without asking the database; how long looking one up takes tells of
a digest only, from which no key follows. One process has the data directory, so no other can have changed them. Hosts
of a cluster read them again with each heartbeat, and for a key that they don't know. What a host has in memory may
be old, so a change is made to what the row has, never to that.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from era.core.concurrency.meter import turn
from era.core.models import DEFAULT_OWNER, new_id, now
from era.core.owners.quotas import Amounts, changed
from era.errors import Conflict, NotFound, TooBusy

OWNER = r"^[A-Za-z0-9_-]{1,64}$"
"""Names that an owner may have."""

type Scope = Literal["read", "run", "write", "admin"]

SCOPES: Mapping[Scope, str] = {
    "read": "see sessions, files, runs, storage and usage",
    "run": "run code: runs, processes, terminals, contexts",
    "write": "make, change and delete sessions, files, versions and storage",
    "admin": "see to keys, owners and quotas, as the operator does",
}
"""What a key may do that has this scope."""

DEFAULT_SCOPES: Sequence[Scope] = ("read", "run", "write")
_ALL: frozenset[Scope] = frozenset(SCOPES)
MAX_GRACE_SECONDS = 30 * 86_400
_LOOK_SECONDS = 5.0
"""How often it is looked whether a key that has an end has come to it."""

_PREFIX = b"era_"
_KEY = re.compile(_PREFIX + rb"[A-Za-z0-9_-]{43}")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call."""

    owner: str
    is_operator: bool = False
    """Whether he may see to keys, owners and quotas."""

    key_id: str = ""
    """The id of his key: OPERATOR_KEY for the operator's; empty for a call without one."""

    sandbox: str = ""
    """The id of the sandbox whose program calls; empty for a client."""

    scopes: frozenset[Scope] = _ALL
    """What he may do."""

    digest: str = field(default="", repr=False, compare=False)
    """Of the secret of the key that he has called with; empty where it isn't known."""


OPERATOR_KEY = "operator"
OPERATOR = Caller(DEFAULT_OWNER, is_operator=True)
"""Who calls a server that wants no key."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is stored of a key, besides its digest. The key itself is stored nowhere."""

    id: str
    owner: str
    description: str
    created_at: int
    scopes: Sequence[Scope] = DEFAULT_SCOPES
    expires_at: int | None = None
    """None is never. Microseconds since 1970, as all times here."""

    quotas: Amounts = field(default_factory=dict)
    old_digest: str | None = field(default=None, repr=False)
    """The digest of the secret before the last rotation, which lets in until `old_until`."""

    old_until: int | None = None

    @property
    def is_expired(self) -> bool:
        return self.expires_at is not None and self.expires_at <= now()


type Change = Callable[[ApiKey, str], tuple[ApiKey, str]]
"""What becomes of a key and its digest."""


class ApiKeyStore(Protocol):
    """Rows of keys. Every call is one transaction, durable when it returns."""

    async def add_api_key(self, key: ApiKey, digest: str) -> None: ...

    async def api_keys(self) -> Sequence[tuple[ApiKey, str]]:
        """All keys with their digests, oldest first."""
        ...

    async def change_api_key(self, key_id: str, change: Change) -> tuple[ApiKey, str] | None:
        """Change a key as it is stored, whoever stored it; the key as it is then, with its digest, or None where there
        is none. `change` is called within the transaction, on another thread, and again where that is run again. What
        it raises is raised on, and nothing is changed."""
        ...

    async def drop_api_key(self, key_id: str) -> bool:
        """Whether there was one."""
        ...


class ApiKeys:
    """Tells callers by their keys, and keeps the keys. `open` before anything."""

    def __init__(self, store: ApiKeyStore, operator_key: str | None) -> None:
        """`operator_key` is the one in ERA_API_KEY."""
        self._store = store
        self._operator_digest = None if operator_key is None else _digest(operator_key.encode())
        self._stored: dict[str, ApiKey] = {}
        """By digest, those of secrets that are still good after a rotation among them."""

        self._revoked: set[str] = set()
        """The ids of keys that were revoked here, whether or not their rows could be dropped."""

        self._read_at = 0.0
        self._by_id: dict[str, tuple[ApiKey, str]] = {}
        """With the digest in force. In the order in which they were made."""

        self._changed = asyncio.Event()
        """Set, and replaced by another one, whenever keys have changed."""

        self._changing = asyncio.Lock()
        """Held while rows are read or changed: what was read before somebody changed it may not come after that."""

        self.required = self._operator_digest is not None
        """Whether a call needs a key."""

    async def open(self) -> None:
        """Read the stored keys."""
        self._read_at = time.monotonic()
        async with self._changing:
            rows, before = await self._store.api_keys(), self._by_id
            self._stored, self._by_id = {}, {}
            for key, digest in rows:
                if key.id not in self._revoked:
                    self._keep(key, digest)
            if self._by_id != before:
                self._wake()
        self.required = self.required or bool(self._stored)

    async def look_for(self, key_text: bytes) -> None:
        """Read the keys again for one that isn't known, but not often: strangers may make up keys."""
        if self.caller(key_text) is None and _KEY.fullmatch(key_text) and time.monotonic() > self._read_at + 1:
            await self.open()

    async def known(self, caller: Caller) -> Caller | None:
        """Somebody whom another host of the cluster has let in, with those of the scopes that the key has; None where
        it is good for nothing. The keys are read again where it isn't known to be as good: it may have been made or
        changed a moment ago. Nobody else may say which."""
        if all(self.admits(caller, scope) for scope in caller.scopes):
            return caller
        await self.open()
        scopes = frozenset(scope for scope in caller.scopes if self.admits(caller, scope))
        is_operator = caller.is_operator and "admin" in scopes
        return replace(caller, scopes=scopes, is_operator=is_operator) if scopes else None

    def caller(self, key_text: bytes) -> Caller | None:
        """The caller who holds this key; None for an unknown key. Compared in constant time or by digest."""
        digest = _digest(key_text)
        if self._operator_digest is not None and hmac.compare_digest(digest, self._operator_digest):
            return Caller(DEFAULT_OWNER, is_operator=True, key_id=OPERATOR_KEY)
        key = self._good(digest)
        if key is None:
            return None
        return Caller(key.owner, "admin" in key.scopes, key.id, scopes=frozenset(key.scopes), digest=digest)

    def admits(self, caller: Caller, scope: Scope) -> bool:
        """Whether a caller who was let in with a stored key would be so now, to a call that needs this scope."""
        if caller.key_id in ("", OPERATOR_KEY):
            return True
        digest = caller.digest or self.digest_of(caller.key_id)
        key = None if digest is None else self._good(digest)
        return key is not None and scope in key.scopes

    async def until_barred(self, caller: Caller, scope: Scope) -> None:
        """Wait until a caller is admitted no more: his key was revoked or has expired, or has another secret or no such
        scope now."""
        if caller.key_id in ("", OPERATOR_KEY):
            await asyncio.Event().wait()
        while self.admits(caller, scope):
            key = self._by_id[caller.key_id][0]
            has_end = key.expires_at is not None or caller.digest == key.old_digest
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS if has_end else None):
                    await self._changed.wait()
            await turn()  # there may be thousands

    def _good(self, digest: str) -> ApiKey | None:
        """The key whose secret has this digest, if that is good now."""
        key = self._stored.get(digest)
        if key is None or key.is_expired or (digest == key.old_digest and (key.old_until or 0) <= now()):
            return None
        return key

    def digest_of(self, key_id: str) -> str | None:
        """The digest of the key with this id (see Caller), by which what was made with it can be bound to it; None
        where that key lets nobody in now. That of no key is empty, and lets in as long as no call needs one."""
        if not key_id:
            return None if self.required else ""
        if key_id == OPERATOR_KEY:
            return self._operator_digest
        key, digest = self._by_id.get(key_id, (None, None))
        return None if key is None or key.is_expired else digest

    def digests_of(self, key_id: str) -> Sequence[str]:
        """The same of all secrets of a key that are good now: that in force, and the one before its rotation."""
        digest = self.digest_of(key_id)
        if digest is None:
            return []
        old = self._by_id[key_id][0].old_digest if key_id in self._by_id else None
        return [digest] if old is None or self._good(old) is None else [digest, old]

    def may(self, key_id: str, scope: Scope) -> bool:
        """Whether the key with this id, which lets in, has a scope now."""
        kept = self._by_id.get(key_id)
        return kept is None or scope in kept[0].scopes

    def quotas_of(self, key_id: str) -> Amounts:
        """A key's own quotas."""
        kept = self._by_id.get(key_id)
        return {} if kept is None else kept[0].quotas

    def list(self) -> Sequence[ApiKey]:
        """Oldest first."""
        return [key for key, _ in self._by_id.values()]

    def get(self, key_id: str) -> ApiKey:
        """Raises NotFound."""
        return self._kept(key_id)[0]

    async def create(
        self,
        owner: str,
        description: str,
        scopes: Sequence[Scope] = DEFAULT_SCOPES,
        expires_at: int | None = None,
        quotas: Amounts | None = None,
    ) -> tuple[ApiKey, str]:
        """A new key and its text, which can't be had again. Raises Conflict on a server without ERA_API_KEY: it would
        require a key from now on, and nobody would have the one to revoke it with."""
        if self._operator_digest is None:
            raise Conflict(
                "This server was started without a key of its own.",
                hint="Start it with ERA_API_KEY set: that is the key to make others with.",
                code="no_operator",
            )
        text, digest = _new_secret()
        key = ApiKey(new_id("key"), owner, description, now(), tuple(scopes), expires_at, dict(quotas or {}))
        async with self._changing:
            await self._store.add_api_key(key, digest)
            self._keep(key, digest)
        return key, text

    async def change(self, key_id: str, quotas: Mapping[str, int | None] | None = None, **changes: Any) -> ApiKey:
        """Change what a key is: fields of ApiKey, and those of its quotas that are named; None takes one back. It holds
        from the next call on. Raises NotFound."""
        return await self._change(
            key_id, lambda key, digest: (replace(key, quotas=changed(key.quotas, quotas or {}), **changes), digest)
        )

    async def rotate(self, key_id: str, grace_seconds: float) -> tuple[ApiKey, str]:
        """Give a key another secret; the key, and the text of it. The secret before is good for `grace_seconds` more,
        the one before that for nothing. Raises NotFound, Conflict where the key has expired."""
        text, fresh = _new_secret()

        def rotated(key: ApiKey, digest: str) -> tuple[ApiKey, str]:
            if key.is_expired:
                raise Conflict(
                    f"Key '{key_id}' has expired.",
                    hint="Give it another end first (PATCH, expires_at), or make another key.",
                    code="key_expired",
                )
            return replace(key, old_digest=digest, old_until=now() + int(grace_seconds * 1e6)), fresh

        return await self._change(key_id, rotated), text

    async def revoke(self, key_id: str) -> None:
        """Let in no call with this key any more. Where its row can't be dropped, that holds for as long as this process
        lives, and this raises Unavailable. Raises NotFound."""
        self._revoked.add(key_id)
        self._forget(key_id)
        if not await self._store.drop_api_key(key_id):
            async with self._changing:  # what is being read may have its row from before somebody else revoked it
                self._revoked.discard(key_id)
            raise _no_key(key_id)

    def _kept(self, key_id: str) -> tuple[ApiKey, str]:
        """A key with its digest. Raises NotFound."""
        kept = self._by_id.get(key_id)
        if kept is None:
            raise _no_key(key_id)
        return kept

    async def _change(self, key_id: str, change: Change) -> ApiKey:
        """Change a key as its row has it, whoever stored that; the key as it is then. Raises NotFound, and whatever
        `change` does."""
        async with self._changing:
            kept = await self._store.change_api_key(key_id, change)
            if kept is None or key_id in self._revoked:
                self._forget(key_id)
                raise _no_key(key_id)
            self._stored = {digest: key for digest, key in self._stored.items() if key.id != key_id}
            self._keep(*kept)
            self._wake()
        return kept[0]

    def _forget(self, key_id: str) -> None:
        """Let in with a key no more."""
        self._stored = {digest: key for digest, key in self._stored.items() if key.id != key_id}
        self._by_id.pop(key_id, None)
        self._wake()

    def _wake(self) -> None:
        """Wake whoever waits for a change of keys."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _keep(self, key: ApiKey, digest: str) -> None:
        """Let in with a key from now on."""
        self._by_id[key.id] = (key, digest)
        self._stored[digest] = key
        if key.old_digest is not None:
            self._stored[key.old_digest] = key


def contains_api_key(text: bytes) -> bool:
    """Whether a text contains what has the form of one of our API keys, stored or not."""
    return _KEY.search(text) is not None


def _no_key(key_id: str) -> NotFound:
    return NotFound(f"There is no key '{key_id[:80]}'.", hint="GET /api/keys lists the keys there are.")


def _new_secret() -> tuple[str, str]:
    """The text of a new key, and its digest."""
    text = (_PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=")).decode()
    return text, _digest(text.encode())


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


TICKET_SECONDS = 30
_MOST_TICKETS = 256
"""Of one owner at a time."""


@dataclass(frozen=True, slots=True)
class _Ticket:
    caller: Caller
    session_id: str
    until: float
    """By the monotonic clock."""


class Tickets:
    """The tickets that were given out and are still good.

    A browser's page opens a WebSocket with one, since it can't send a header with that. A ticket is good once, for one
    session, and for a moment only, so it may stand in a URL. It is kept in this process's memory alone.
    """

    def __init__(self) -> None:
        self._tickets: dict[str, _Ticket] = {}
        """Oldest first."""

    def give(self, caller: Caller, session_id: str) -> str:
        """A new ticket. Raises TooBusy where this owner has too many."""
        self._drop_old()
        if Counter(ticket.caller.owner for ticket in self._tickets.values())[caller.owner] >= _MOST_TICKETS:
            raise TooBusy(
                f"{_MOST_TICKETS} of your tickets wait to be used already.", hint="Ask for one when it is needed."
            )
        ticket = f"tkt_{secrets.token_urlsafe(32)}"
        self._tickets[ticket] = _Ticket(caller, session_id, time.monotonic() + TICKET_SECONDS)
        return ticket

    def has(self, session_id: str) -> bool:
        """Whether a ticket for a session of this name is still good."""
        self._drop_old()
        return any(ticket.session_id == session_id for ticket in self._tickets.values())

    def take(self, ticket: str, session_id: str) -> Caller | None:
        """Whom this ticket was given to, for this session; None where it isn't good. It isn't any more after this."""
        given = self._tickets.pop(ticket, None)
        if given is None or given.session_id != session_id or given.until < time.monotonic():
            return None
        return given.caller

    def _drop_old(self) -> None:
        now = time.monotonic()
        while self._tickets and next(iter(self._tickets.values())).until < now:
            del self._tickets[next(iter(self._tickets))]
