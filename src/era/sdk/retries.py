"""Which failed calls are made again, and when: only those of which it is known that nothing is done twice.

- Nobody accepted the connection, so nothing was sent.
- The server refused with a 429 or 503 and said when to come back (Retry-After), so it has not begun.
- The connection broke, and the call may be repeated: it only reads, or has an Idempotency-Key.
"""

from __future__ import annotations

from era.errors import EraError
from era.sdk.calls import Call
from era.sdk.errors import ConnectionLost, ServerAway

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 30


def pause(call: Call, error: EraError, attempt: int, retries: int) -> float | None:
    """How many seconds to wait before this call is made again, None where it isn't.

    `attempt` counts from 0; there are at most `retries` more.
    """
    if attempt >= retries:
        return None
    backoff = _FIRST_PAUSE * 3.0**attempt
    if isinstance(error, ServerAway) or (isinstance(error, ConnectionLost) and call.repeatable):
        return backoff
    if error.status in (429, 503) and error.retry_after is not None and error.retry_after <= _LONGEST_PAUSE:
        return max(float(error.retry_after), backoff)
    return None
