"""When what has failed is tried again: deliveries of inboxes, notices of webhooks, and records of what has ended."""

from __future__ import annotations

FIRST_DELAY = 1.0
"""Seconds from the first failure to the second attempt; each delay is `_FACTOR` times the last, up to `_MAX_DELAY`."""

_FACTOR = 4.0
_MAX_DELAY = 900.0
_MOST_FACTORS = 10
"""More than lead to the longest delay; thousands would be too much for a float."""


def delay(tries: int) -> float:
    """Seconds from the last failure to the next attempt, after `tries` failures."""
    return min(FIRST_DELAY * _FACTOR ** min(tries - 1, _MOST_FACTORS), _MAX_DELAY)
