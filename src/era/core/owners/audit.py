"""The audit log: who did what that others may ask about later.

Theory of operation. An entry says who (an owner, by which key), what (an action, on what), when, and by which request.
It has no content: of secrets it has the names and the hosts that they go to.

Each owner's newest entries are kept, and so many only. So the table is bounded, and nobody can push out what somebody
else did. Each entry is in the service's log, too, where the operator may keep it for as long as he likes and where its
owner can't push it out.

What has been done is recorded then. If that fails, the deed stands and the log has an error with the entry. The use of
secrets is recorded before: where that fails nothing has run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import structlog

from era.core.concurrency.meter import turn
from era.core.concurrency.tasks import to_its_end
from era.core.models import JsonObject, now
from era.core.owners.api_keys import Caller
from era.core.secrets import Secret
from era.core.telemetry import origin
from era.errors import EraError

log = structlog.get_logger()

Action = Literal[
    "session.create",
    "session.delete",
    "session.restore",
    "session.public",
    "key.create",
    "key.change",
    "key.rotate",
    "key.revoke",
    "quotas.change",
    "webhook.create",
    "webhook.delete",
    "secret.use",
    "link.create",
]

_KEPT = 10_000
"""Entries of each owner. All of them are lines of the log, too."""

_MOST_NAMED = 20
"""How many secrets of one request an entry names, and how many hosts of each."""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One thing that somebody did."""

    at: int
    """Microseconds since 1970."""

    owner: str
    key_id: str
    """That of Caller."""

    action: Action
    target: str
    """The session, key, owner or webhook that it was done to; empty for a run outside of any session."""

    request_id: str
    details: JsonObject = field(default_factory=dict)
    key: int = 0
    """Of its row."""


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which entries to list, newest first."""

    limit: int
    owner: str | None = None
    """None for those of all."""

    action: Action | None = None
    target: str | None = None
    since: int | None = None
    """Only those from this time on; microseconds since 1970."""

    until: int | None = None
    before_key: int | None = None
    """Only those before the one with this key."""


class AuditStore(Protocol):
    """Rows of the audit log. Every call is one transaction, and durable when it returns."""

    async def add_audit_entries(self, entries: Sequence[AuditEntry], kept: int) -> None:
        """Add entries of one owner, and drop what that owner has beyond the `kept` newest."""
        ...

    async def audit_entries(self, which: AuditFilter) -> Sequence[AuditEntry]: ...


class Audit:
    """Records what was done, and lists it."""

    def __init__(self, store: AuditStore, kept: int = _KEPT) -> None:
        """So many entries of each owner are `kept`."""
        self._store = store
        self._kept = kept

    async def record(self, caller: Caller, action: Action, *targets: str, **details: object) -> None:
        """Record what a caller has done to each of these. Where that can't be stored, the log has it."""
        try:
            await self._add(caller, action, targets, details)
        except EraError as error:
            log.error("audit_not_stored", error=error.message, action=action, count=len(targets), owner=caller.owner)

    async def secrets(self, caller: Caller, target: str, secrets: Sequence[Secret]) -> None:
        """Record which secrets a program is about to be given, if any. Raises Unavailable where that can't be
        stored."""
        if secrets:
            named = {secret.name: _hosts(secret) for secret in secrets[:_MOST_NAMED]}
            await self._add(caller, "secret.use", [target], {"secrets": named, "count": len(secrets)})

    async def list(self, which: AuditFilter) -> Sequence[AuditEntry]:
        return await self._store.audit_entries(which)

    async def _add(self, caller: Caller, action: Action, targets: Sequence[str], details: JsonObject) -> None:
        # All of it was done, also where nobody waits for the answer any more.
        await to_its_end(self._log_and_store(caller, action, targets, details))

    async def _log_and_store(self, caller: Caller, action: Action, targets: Sequence[str], details: JsonObject) -> None:
        request = origin.get()
        request_id = request.request_id if request else ""
        who = (now(), caller.owner, caller.key_id)
        for target in targets:
            log.info("audit", action=action, target=target, owner=caller.owner, key=caller.key_id)
            await turn()  # there are thousands where all sessions are deleted
        if targets:
            entries = [AuditEntry(*who, action, target, request_id, details) for target in targets]
            await self._store.add_audit_entries(entries, self._kept)


def _hosts(secret: Secret) -> Sequence[str]:
    """Where a secret's value may be sent, the first few."""
    return sorted([*secret.hosts.names, *(f"*{domain}" for domain in secret.hosts.below)])[:_MOST_NAMED]
