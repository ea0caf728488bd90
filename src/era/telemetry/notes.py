"""Hands notes on to the log, the metrics and the traces: a moment later, several at a time.

To write a log line and to count takes a tenth of what a warm run does. Nobody who waits for an answer waits for that,
and several at a time take less than one by one, since what they need is in the processor's caches then.
"""

from __future__ import annotations

import asyncio

from era.core.telemetry import Event, Note, Origin, RequestEnded, origin

_DELAY = 0.05
"""Seconds for which notes may wait. If the process is killed, the log lacks so much."""


class Notes:
    """The Note that hands on to others. Notes come from the thread of the event loop; `flush` at the end."""

    def __init__(self, *takers: Note) -> None:
        self._takers = takers
        self._waiting: list[tuple[Event, Origin | None]] = []

    def note(self, event: Event) -> None:
        self._waiting.append((event, origin.get()))
        if isinstance(event, RequestEnded) and event.failure is not None:
            self.flush()  # before the server that called us logs the same failure
        elif len(self._waiting) == 1:
            asyncio.get_running_loop().call_later(_DELAY, self.flush)

    def flush(self) -> None:
        """Hand on what waits."""
        waiting, self._waiting = self._waiting, []
        for event, request in waiting:
            token = origin.set(request)
            for take in self._takers:
                take(event)
            origin.reset(token)
