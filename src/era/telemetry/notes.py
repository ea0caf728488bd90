"""Hands notes on to the log, the metrics and the traces: a moment later, several at a time.

Nobody who waits for an answer waits for a log line or a counter. And several notes at a time take a third of what they
take one by one, since what they need is in the processor's caches then. But they never are so many that the event loop
would be held up.
"""

from __future__ import annotations

import asyncio

import structlog

from era.core.telemetry import Event, Note, Origin, RequestEnded, origin

log = structlog.get_logger()

_DELAY = 0.25
"""Seconds for which notes may wait. If the process is killed, the log lacks so much."""

_MANY = 32
"""Notes that don't wait any longer. They take a millisecond together."""


class Notes:
    """The Note that hands on to others. Notes come from the thread of the event loop; `flush` at the end."""

    def __init__(self, *takers: Note) -> None:
        self._takers = takers
        self._waiting: list[tuple[Event, Origin | None]] = []
        self._timer: asyncio.TimerHandle | None = None

    def note(self, event: Event) -> None:
        self._waiting.append((event, origin.get()))
        if isinstance(event, RequestEnded) and event.failure is not None:
            self.flush()  # before the server that called us logs the same failure
        elif len(self._waiting) == 1:
            self._timer = asyncio.get_running_loop().call_later(_DELAY, self.flush)
        elif len(self._waiting) == _MANY:
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Hand on what waits."""
        if self._timer is not None:
            self._timer.cancel()
        waiting, self._waiting = self._waiting, []
        for event, request in waiting:
            token = origin.set(request)
            try:
                for take in self._takers:
                    self._hand_on(take, event)
            finally:
                origin.reset(token)

    def _hand_on(self, take: Note, event: Event) -> None:
        """What fails for one event or taker costs no other."""
        try:
            take(event)
        except Exception:
            log.exception("note_not_taken", note=type(event).__name__)
