"""Which sessions are live: their sandbox is held for processes beside runs, and its tree is the truth.

The pool notes it here when a sandbox is held (pool.py), which happens in the session's turn or during a run that has
that. So whoever has the turn can rely on the answer for as long as he has it, unless he runs something himself. What
goes on in a live session is in live/.
"""

from __future__ import annotations

from era.core.models import Session
from era.errors import SessionLive


class Liveness:
    """The keys of the sessions that are live. There is one of these a service."""

    def __init__(self) -> None:
        self._keys: set[int] = set()

    def add(self, session_key: int) -> None:
        self._keys.add(session_key)

    def remove(self, session_key: int) -> None:
        self._keys.discard(session_key)

    def __contains__(self, session_key: int) -> bool:
        return session_key in self._keys

    def check_not(self, session: Session, what: str) -> None:
        """Raises SessionLive where the session is live. `what` can't be done then, such as "can't be rolled back"."""
        if session.key in self._keys:
            raise SessionLive(f"Session '{session.id}' is live, and {what} until it is put away.")
