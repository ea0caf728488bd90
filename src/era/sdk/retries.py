"""Which failed calls are made again, and when: only those of which it is known that nothing is done twice.

- Nobody accepted the connection, so nothing was sent.
- The server refused with a 429 or 503 and said when to come back (Retry-After), so it has not begun.
- The connection broke, a proxy has no answer of the server, or the host of a cluster that answered or its database was
  lost, and the call may be repeated: it only reads, or has an Idempotency-Key. So too where the run of an earlier
  attempt is still on record as under way.

A body of which something was read is sent again only where it can be wound back.
"""

from __future__ import annotations

from time import monotonic

from era.errors import EraError, HomeLost, OutcomeUnknown, RunUnderWay, Unavailable
from era.sdk.calls import Call
from era.sdk.errors import AnswerTimeout, ConnectionLost, NotEra, ServerAway

PATIENCE = 60.0
"""Seconds for which what has begun, a stream or the waiting for a run, is taken up again before anything comes of it: a
server may be restarting."""

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 30


def is_proxys(error: EraError) -> bool:
    """Whether a proxy answered that it has no answer of the server, which may be restarting."""
    return isinstance(error, NotEra) and error.status in (502, 503, 504)


def is_away(error: EraError) -> bool:
    """Whether an error says that the server can't answer for now, which may be restarting."""
    return isinstance(error, Unavailable | ConnectionLost | AnswerTimeout | ServerAway) or is_proxys(error)


class Retries:
    """The further attempts of one call: at most so many, and none later than the answer was wanted."""

    def __init__(self, call: Call, most: int, seconds: float) -> None:
        """`most` attempts more, none of which begins later than `seconds` from now."""
        self._call = call
        self._left = most
        self._next = _FIRST_PAUSE
        self._until = monotonic() + seconds

    def pause(self, error: EraError) -> float | None:
        """How many seconds to wait before the call is made again; None where it isn't, since it can't be done without
        harm, has been tried often enough, or would come too late."""
        seconds = self._seconds(error)
        if seconds is None or self._left <= 0 or monotonic() + seconds > self._until or not self._call.rewind():
            return None
        self._left -= 1
        self._next *= 3
        return seconds

    def _seconds(self, error: EraError) -> float | None:
        is_our_own = self._next > _FIRST_PAUSE and isinstance(error, RunUnderWay)
        if is_our_own or is_proxys(error) or isinstance(error, ConnectionLost | HomeLost | OutcomeUnknown):
            # It may have been done, whatever the answer's headers say.
            return self._next if self._call.repeatable else None
        if isinstance(error, ServerAway):
            return self._next
        if error.status in (429, 503) and error.retry_after is not None and error.retry_after <= _LONGEST_PAUSE:
            return max(float(error.retry_after), self._next)
        return None
