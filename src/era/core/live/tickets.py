"""Tickets: what a browser's page opens a WebSocket with, since it can't send a header with that.

A ticket is good once, for one session, and for a moment only. So it may stand in a URL: by the time that anybody else
could read it there, it is worth nothing. It is kept in this process's memory alone.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from dataclasses import dataclass

from era.core.api_keys import Caller
from era.errors import TooBusy

SECONDS = 30
_MOST = 256
"""Of one owner at a time."""


@dataclass(frozen=True, slots=True)
class _Ticket:
    caller: Caller
    session_id: str
    until: float
    """By the monotonic clock."""


class Tickets:
    """The tickets that were given out and are still good."""

    def __init__(self) -> None:
        self._tickets: dict[str, _Ticket] = {}
        """Oldest first."""

    def give(self, caller: Caller, session_id: str) -> str:
        """A new ticket. Raises TooBusy where this owner has too many."""
        self._drop_old()
        if Counter(ticket.caller.owner for ticket in self._tickets.values())[caller.owner] >= _MOST:
            raise TooBusy(f"{_MOST} of your tickets wait to be used already.", hint="Ask for one when it is needed.")
        ticket = f"tkt_{secrets.token_urlsafe(32)}"
        self._tickets[ticket] = _Ticket(caller, session_id, time.monotonic() + SECONDS)
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
