"""HTTP/1.1 that h11 parses, paid for before that: its heads and trailers may be thousands of fields.

A source may have hundreds of connections, on each of which such fields are complete at the same moment. What is charged
afterwards (core/loop_slices.py) would let them all be parsed in one iteration of the event loop.
"""

from __future__ import annotations

import re
from typing import Any

import h11

from era.core.loop_slices import Budget

PIECE = 32 << 10
"""Bytes that h11 should be given at a time. Only what is incomplete has a limit there, so by that much more than its
limit may be parsed at once."""

_LAST_CHUNK = re.compile(rb"[\r\n]*0+[;\s]")
_HEAD_END = b"\r\n\r\n"


class PaidEvents:
    """The events of what the other end of an h11 connection sends."""

    def __init__(self, http: h11.Connection, budget: Budget, byte_us: float) -> None:
        """`byte_us` is what each byte of a head or of trailers costs."""
        self._http, self._budget, self._byte_us = http, budget, byte_us
        self._paid = 0
        """Bytes that are paid for, of the head or the trailers that come next."""

        self._between_chunks = True
        self._in_trailers = False

    async def next(self) -> Any:
        """The next event, NEED_DATA or PAUSED. Raises h11.RemoteProtocolError."""
        if self._fields_come_next():
            data = self._http.trailing_data[0]
            end = data.find(_HEAD_END)
            unpaid = (len(data) if end < 0 else end) - self._paid
            if unpaid > 0:
                self._paid += unpaid
                await self._budget.spend(unpaid * self._byte_us)
        event = self._http.next_event()
        if event is not h11.NEED_DATA:
            self._paid, self._in_trailers = 0, False
            self._between_chunks = not isinstance(event, h11.Data) or event.chunk_end
        return event

    def _fields_come_next(self) -> bool:
        """Whether a head comes next, or trailers. Of a body without chunks it may be said once, and wrongly."""
        state = self._http.their_state
        if state is h11.SEND_BODY and self._between_chunks and not self._in_trailers:
            self._in_trailers = _LAST_CHUNK.match(self._http.trailing_data[0]) is not None
        return state in (h11.IDLE, h11.SEND_RESPONSE) or (state is h11.SEND_BODY and self._in_trailers)
