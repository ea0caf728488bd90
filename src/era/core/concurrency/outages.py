"""Failures that last, as while all file descriptors are taken: what goes on again and again logs them once.

A loop that looks at something every second, or many times a second, goes on where a look fails, since the next may
succeed. What it would log each time says nothing new.
"""

from __future__ import annotations

import errno
import time

import structlog

log = structlog.get_logger()

FOR_NOW = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""By these fails what may succeed later: they say nothing about what was to be opened or asked."""

_OVER_SECONDS = 60.0
"""An outage is over once it hasn't been noted for so long."""

_noted_at: dict[str, float] = {}
"""When each event was last noted, by the monotonic clock."""


def note_outage(event: str, error: OSError) -> None:
    """Log that something fails for now, unless it failed lately as well. Who calls this tries it again."""
    at = time.monotonic()
    before = _noted_at.get(event)
    _noted_at[event] = at
    if before is None or at - before > _OVER_SECONDS:
        log.warning(event, error=str(error))
