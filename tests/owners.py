"""The owner of everything in tests that have one owner only."""

from __future__ import annotations

from era.core.models import DEFAULT_OWNER, OwnedId


def mine(session_id: str) -> OwnedId:
    """The id of a session of that owner."""
    return OwnedId(DEFAULT_OWNER, session_id)
