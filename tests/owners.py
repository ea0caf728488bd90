"""Whose things are, in tests that have one owner only."""

from __future__ import annotations

from era.core.models import DEFAULT_OWNER, OwnedId


def mine(session_id: str) -> OwnedId:
    """A session of that owner's."""
    return OwnedId(DEFAULT_OWNER, session_id)
