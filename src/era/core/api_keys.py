"""Who calls: API keys, and to whom they belong.

Theory of operation
===================

All that is stored has an *owner*, which is a name and nothing more: whoever calls with a key of that owner's sees what
is the owner's, and of all else nothing. Revoking a key takes nothing from the owner.

The key in ERA_API_KEY is the *operator's*. It belongs to the owner `default`, as does whatever is done on a server that
wants no key, and it alone makes and revokes the others. So a server that has stored keys but was started without
ERA_API_KEY has no operator: it wants a key all the same, and its keys are as they are.

A key is 256 random bits. What is kept is its SHA-256, and nothing slower is needed: there is nothing to guess. All are
held in memory by that digest, so a call is let in without asking the database; how long looking one up takes tells of
a digest only, from which no key follows. One process has the data directory, so no other can have changed them.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from era.core.models import DEFAULT_OWNER, new_id, now
from era.errors import Conflict, NotFound

OWNER = r"^[A-Za-z0-9_-]{1,64}$"
_PREFIX = b"era_"
_KEY = re.compile(_PREFIX + rb"[A-Za-z0-9_-]{43}")


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose call it is, and whether the operator's, who may see to keys."""

    owner: str
    is_operator: bool = False


OPERATOR = Caller(DEFAULT_OWNER, is_operator=True)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is known of a key. The key itself isn't."""

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
    """`open` before anything."""

    def __init__(self, store: ApiKeyStore, operators: str | None) -> None:
        """`operators` is the key in ERA_API_KEY."""
        self._store = store
        self._operators = None if operators is None else _digest(operators.encode())
        self._stored: dict[str, ApiKey] = {}
        """By digest."""

        self.wanted = self._operators is not None
        """Whether a call needs a key."""

    async def open(self) -> None:
        self._stored = {digest: key for key, digest in await self._store.api_keys()}
        self.wanted = self.wanted or bool(self._stored)

    def caller(self, given: bytes) -> Caller | None:
        """Whose key this is, None where it is nobody's."""
        digest = _digest(given)
        if self._operators is not None and hmac.compare_digest(digest, self._operators):
            return OPERATOR
        key = self._stored.get(digest)
        return None if key is None else Caller(key.owner)

    def list(self) -> Sequence[ApiKey]:
        """Oldest first."""
        return list(self._stored.values())

    async def create(self, owner: str, description: str) -> tuple[ApiKey, str]:
        """A new key, told this once. Raises Conflict on a server without ERA_API_KEY: it would want a key from now on,
        and nobody would have the one to revoke it with."""
        if self._operators is None:
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
        """No call is let in with it any more. Where its row can't be dropped, that holds for as long as this process
        lives, and this raises Unavailable. Raises NotFound."""
        self._stored = {digest: key for digest, key in self._stored.items() if key.id != key_id}
        if not await self._store.drop_api_key(key_id):
            raise NotFound(f"There is no key '{key_id[:80]}'.", hint="GET /api/keys lists the keys there are.")


def gives_away(text: bytes) -> bool:
    """Whether there is a stored key in this, or what looks like one."""
    return _KEY.search(text) is not None


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()
