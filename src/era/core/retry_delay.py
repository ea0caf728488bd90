"""When what has failed is tried again: deliveries of inboxes, and notices of webhooks."""

from __future__ import annotations

FIRST_DELAY = 1.0
"""Seconds from the first failure to the second attempt; each delay is `_FACTOR` times the last, up to `_MAX_DELAY`."""

_FACTOR = 4.0
_MAX_DELAY = 900.0


def delay(tries: int) -> float:
    """Seconds from the last failure to the next attempt, after `tries` failures."""
    return float(min(FIRST_DELAY * _FACTOR ** (tries - 1), _MAX_DELAY))
