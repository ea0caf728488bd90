"""Which failed calls are made again, and when: only those of which it is known that nothing is done twice.

- Nobody accepted the connection, so nothing was sent.
- The server refused with a 429 or 503 and said when to come back (Retry-After), so it has not begun.
- The connection broke, a proxy has no answer of the server, or the host of a cluster that answered or its database was
  lost, and the call may be repeated: it only reads, or has an Idempotency-Key. So too where the run of an earlier
  attempt is still on record as under way.

A body of which something was read is sent again only where it can be wound back.

The number of attempts is bounded. Those that only wait for a restarting server don't count: they end with the call's
timeout.
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
_LONGEST_PAUSE = 2.0
_LONGEST_REFUSAL = 30
"""Longest Retry-After, in seconds, that is waited for."""


def is_proxys(error: EraError) -> bool:
    """Whether a proxy answered that it has no answer of the server, which may be restarting."""
    return isinstance(error, NotEra) and error.status in (502, 503, 504)


def is_away(error: EraError) -> bool:
    """Whether an error says that the server can't answer for now, which may be restarting."""
    return isinstance(error, Unavailable | ConnectionLost | AnswerTimeout | ServerAway) or is_proxys(error)


def went_away(error: EraError) -> EraError:
    """Return ConnectionLost for ServerAway, and other errors as they are. It is for calls of which something was sent
    before, so that ServerAway would be wrong: it says that nothing was done."""
    return ConnectionLost(error.message) if isinstance(error, ServerAway) else error


class Retries:
    """The further attempts of one call: at most so many, and none later than the answer was wanted."""

    def __init__(self, call: Call, most: int, seconds: float, patience: float) -> None:
        """Set the bounds of further attempts.

        Args:
            call: The call to make again.
            most: Number of further attempts, not counting those that wait for a restarting server.
            seconds: Time from now after which no attempt begins.
            patience: Seconds for which a restarting server is waited for.
        """
        self._call = call
        self._most = self._left = most
        self._next = _FIRST_PAUSE
        self._until = monotonic() + seconds
        self._patience = patience
        self._away_since: float | None = None
        self._lost: EraError | None = None
        """The error of an earlier attempt that may have been carried out."""

    def pause(self, error: EraError, *, is_known: bool) -> float:
        """Return the seconds to wait before the call is made again.

        Args:
            error: Why the last attempt failed.
            is_known: Whether the server has ever answered this client.

        Raises:
            EraError: The call can't be made again without harm, has been tried often enough, or would come too late.
                This is `error`, unless that says that nothing was done and an earlier attempt may have been carried
                out: then it is the error of that attempt.
        """
        seconds, now = self._seconds(error), monotonic()
        is_away = self._is_away(error, is_known)
        self._away_since = (self._away_since or now) if is_away else None
        until = min(self._until, self._away_since + self._patience) if self._away_since else self._until
        is_waiting = is_away or self._is_own_run(error)
        is_over = now + (seconds or 0) > until or (self._most if is_waiting else self._left) <= 0
        if seconds is None or is_over or not self._call.rewind():
            raise error if self._lost is None or not self._says_undone(error) else self._lost from None
        if not is_waiting:
            self._left -= 1
        if self._may_be_done(error):
            self._lost = self._lost or error
        self._next = min(self._next * 3, _LONGEST_PAUSE)
        return seconds

    def _seconds(self, error: EraError) -> float | None:
        if self._is_own_run(error) or self._may_be_done(error):
            # It may have been done, whatever the answer's headers say.
            return self._next if self._call.repeatable else None
        if isinstance(error, ServerAway):
            return self._next
        if error.status in (429, 503) and error.retry_after is not None and error.retry_after <= _LONGEST_REFUSAL:
            return max(float(error.retry_after), self._next)
        return None

    def _is_away(self, error: EraError, is_known: bool) -> bool:
        """Return whether a server that was there can't be reached now, so that it may be restarting."""
        has_been_there = is_known or (self._lost is not None and not is_proxys(self._lost))
        return has_been_there and (isinstance(error, ServerAway) or is_proxys(error) or error.code == "not_ready")

    def _is_own_run(self, error: EraError) -> bool:
        """Return whether the run under way is that of an earlier attempt."""
        return self._lost is not None and isinstance(error, RunUnderWay)

    @staticmethod
    def _says_undone(error: EraError) -> bool:
        """Return whether an error, by itself, says that nothing of the call was done."""
        return isinstance(error, ServerAway | RunUnderWay) or error.status == 429 or error.retry_after is not None

    @staticmethod
    def _may_be_done(error: EraError) -> bool:
        """Return whether the call may have been carried out, judging by this error alone."""
        return is_proxys(error) or isinstance(error, ConnectionLost | HomeLost | OutcomeUnknown)
