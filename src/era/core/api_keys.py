"""API keys: who calls, and which owner a key stands for.

Theory of operation
===================

All that is stored has an *owner*, which is a name and nothing more: whoever calls with a key of that owner's sees what
is the owner's, and of all else nothing. Revoking a key takes nothing from the owner.

The key in ERA_API_KEY is the *operator's*. It belongs to the owner `default`, as does whatever is done on a server that
wants no key, and it alone makes and revokes the others. So a server that has stored keys but was started without
ERA_API_KEY has no operator: it wants a key all the same, and its keys are as they are.

A key is 256 random bits. What is kept is its SHA-256, and nothing slower is needed: there is nothing to guess. All are
held in memory by that digest, so a call is let in without asking the database; how long looking one up takes tells of
a digest only, from which no key follows. One process has the data directory, so no other can have changed them. Hosts
of a cluster read them again with each heartbeat, and for a key that they don't know.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from era.core.models import DEFAULT_OWNER, new_id, now
from era.errors import Conflict, NotFound

OWNER = r"^[A-Za-z0-9_-]{1,64}$"
"""Names that an owner may have."""

_PREFIX = b"era_"
_KEY = re.compile(_PREFIX + rb"[A-Za-z0-9_-]{43}")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call."""

    owner: str
    is_operator: bool = False
    """Whether he may create, list and revoke keys."""

    key_id: str = ""
    """The id of his key: OPERATOR_KEY for the operator's; empty for a call without one."""

    sandbox: str = ""
    """The id of the sandbox whose program calls; empty for a client."""


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


class ApiKeyStore(Protocol):
    """Rows of keys. Every call is one transaction, durable when it returns."""

    async def add_api_key(self, key: ApiKey, digest: str) -> None: ...

    async def api_keys(self) -> Sequence[tuple[ApiKey, str]]:
        """All keys with their digests, oldest first."""
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
        """By digest."""

        self._revoked: set[str] = set()
        """The ids of keys that were revoked here, whether or not their rows could be dropped."""

        self._read_at = 0.0
        self.required = self._operator_digest is not None
        """Whether a call needs a key."""

    async def open(self) -> None:
        """Read the stored keys."""
        self._read_at = time.monotonic()
        found = await self._store.api_keys()
        self._stored = {digest: key for key, digest in found if key.id not in self._revoked}
        self.required = self.required or bool(self._stored)

    async def look_for(self, key_text: bytes) -> None:
        """Read the keys again for one that isn't known, but not often: strangers may make up keys."""
        if self.caller(key_text) is None and _KEY.fullmatch(key_text) and time.monotonic() > self._read_at + 1:
            await self.open()

    def caller(self, key_text: bytes) -> Caller | None:
        """The caller who holds this key; None for an unknown key. Compared in constant time or by digest."""
        digest = _digest(key_text)
        if self._operator_digest is not None and hmac.compare_digest(digest, self._operator_digest):
            return Caller(DEFAULT_OWNER, is_operator=True, key_id=OPERATOR_KEY)
        key = self._stored.get(digest)
        return None if key is None else Caller(key.owner, key_id=key.id)

    def digest_of(self, key_id: str) -> str | None:
        """The digest of the key with this id (see Caller), by which what was made with it can be bound to it; None
        where that key lets nobody in now. That of no key is empty, and lets in as long as no call needs one."""
        if not key_id:
            return None if self.required else ""
        if key_id == OPERATOR_KEY:
            return self._operator_digest
        return next((digest for digest, key in self._stored.items() if key.id == key_id), None)

    def list(self) -> Sequence[ApiKey]:
        """Oldest first."""
        return list(self._stored.values())

    async def create(self, owner: str, description: str) -> tuple[ApiKey, str]:
        """A new key and its text, which can't be had again. Raises Conflict on a server without ERA_API_KEY: it would
        require a key from now on, and nobody would have the one to revoke it with."""
        if self._operator_digest is None:
            raise Conflict(
                "This server was started without a key of its own.",
                hint="Start it with ERA_API_KEY set: that is the key to make others with.",
                code="no_operator",
            )
        text = (_PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=")).decode()
        key, digest = ApiKey(new_id("key"), owner, description, now()), _digest(text.encode())
        await self._store.add_api_key(key, digest)
        self._stored[digest] = key
        return key, text

    async def revoke(self, key_id: str) -> None:
        """Let in no call with this key any more. Where its row can't be dropped, that holds for as long as this process
        lives, and this raises Unavailable. Raises NotFound."""
        if any(key.id == key_id for key in self._stored.values()):
            self._revoked.add(key_id)
        self._stored = {digest: key for digest, key in self._stored.items() if key.id != key_id}
        if not await self._store.drop_api_key(key_id):
            raise NotFound(f"There is no key '{key_id[:80]}'.", hint="GET /api/keys lists the keys there are.")


def contains_api_key(text: bytes) -> bool:
    """Whether a text contains what has the form of one of our API keys, stored or not."""
    return _KEY.search(text) is not None


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()
