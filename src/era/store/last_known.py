"""Sessions at home here as they were last read, for moments in which the database can't be reached.

Theory of operation. Only its home changes a session. So while a host has a lease, a session is as this host has read it
since it last changed it itself. A change says so when it begins and when its transaction has ended, on the writer's
thread; what was read while one was under way, or begun before its end, isn't remembered. Nor is anything remembered for
a while of a session whose change was cut off in its COMMIT, since that may still come.

A session that another host deletes together with others (DELETE /api/sessions) is known here for a moment longer.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Container, Sequence
from itertools import islice

from era.core.expiry import is_due
from era.core.models import OwnedId, Session, now
from era.errors import EraError, Unavailable

MOST_DATA = 32 << 10
"""Characters of a session's data that is remembered."""

_MOST = 2000
"""Sessions that are remembered."""

_MOST_STALE = 50
"""Sessions that are read again after a change, without being asked for."""

_PATIENCE = 1.0
"""Seconds after which the database isn't waited for where the answer is known."""

_DOUBT_SECONDS = 60.0


class LastKnown:
    """What is known. `read` and `stale` are called on the event loop, all else on any thread."""

    def __init__(self, held: Container[int], is_leased: Callable[[], bool], is_late: Callable[[], bool]) -> None:
        """`held` are the keys of sessions at home here. `is_leased` says whether this host may answer for them, and
        `is_late` whether its heartbeats don't come through."""
        self._held = held
        self._is_leased = is_leased
        self._is_late = is_late
        self._lock = threading.Lock()
        self._known: OrderedDict[OwnedId, Session] = OrderedDict()
        self._ids: dict[int, OwnedId] = {}
        """Those of the sessions that are known, by key."""

        self._changing: Counter[int] = Counter()
        """Changes under way, by the session's key."""

        self._changed: OrderedDict[int, int] = OrderedDict()
        """The numbers of the last changes of sessions, by key."""

        self._forgotten = 0
        """Changes up to this number may be none of these."""

        self._number = 0
        """Of changes that have ended."""

        self._doubtful: dict[int, float] = {}
        """Until when nothing is remembered of a session, by the monotonic clock."""

        self._stale: OrderedDict[int, None] = OrderedDict()
        """The keys of sessions that have changed since they were read, the last one last."""

    async def read(self, session_id: OwnedId, ask: Callable[[], Awaitable[Session]]) -> Session:
        """What `ask` finds, which is remembered; or what is known, where the database can't be reached, or answers
        neither this soon nor heartbeats. Raises what `ask` does."""
        began = self._number
        asking = asyncio.ensure_future(ask())
        try:
            await asyncio.wait({asking}, timeout=_PATIENCE)
            if not asking.done() and self._is_late() and (known := self._get(session_id)) is not None:
                return known
            session = await asking
        except Unavailable:
            if (known := self._get(session_id)) is None:
                raise
            return known
        except EraError:  # it is gone
            with self._lock:
                if (gone := self._known.pop(session_id, None)) is not None:
                    del self._ids[gone.key]
            raise
        finally:
            asking.cancel()
        self.note(session, began)
        return session

    @property
    def moment(self) -> int:
        """What `note` is told of when reading began."""
        return self._number

    def note(self, session: Session, began: int) -> None:
        """Remember a session that was read from that moment on, if it was at home here and nothing has changed it."""
        key = session.key
        with self._lock:
            is_fresh = not self._changing[key] and self._changed.get(key, self._forgotten) <= began
            if not is_fresh or key not in self._held or self._is_doubtful(key) or len(session.data) > MOST_DATA:
                return
            self._stale.pop(key, None)
            self._known[session.owned_id] = session
            self._known.move_to_end(session.owned_id)
            self._ids[key] = session.owned_id
            while len(self._known) > _MOST:
                self._ids.pop(self._known.popitem(last=False)[1].key, None)

    def begin(self, key: int) -> None:
        """A change of the session with this key begins."""
        with self._lock:
            self._changing[key] += 1
            self._drop(key)

    def end(self, key: int, is_known: bool) -> None:
        """It has ended; `is_known` says whether it is certain whether it counts."""
        with self._lock:
            self._changing[key] -= 1
            if not self._changing[key]:
                del self._changing[key]
            self._number += 1
            self._changed[key] = self._number
            self._changed.move_to_end(key)
            while len(self._changed) > _MOST:
                self._forgotten = self._changed.popitem(last=False)[1]
            if not is_known:
                self._doubtful[key] = time.monotonic() + _DOUBT_SECONDS
            self._stale[key] = None
            self._stale.move_to_end(key)
            while len(self._stale) > _MOST_STALE:
                self._stale.popitem(last=False)

    def forget(self, key: int) -> None:
        """Know nothing more of the session with this key."""
        with self._lock:
            self._drop(key)
            self._stale.pop(key, None)

    def stale(self) -> Sequence[int]:
        """The keys of sessions to be read again, each once."""
        with self._lock:
            keys = list(islice(self._stale, _MOST_STALE))
            self._stale.clear()
        return keys

    def _get(self, session_id: OwnedId) -> Session | None:
        with self._lock:
            known = self._known.get(session_id)
        is_good = known is not None and self._is_leased() and not is_due(known, now())
        return known if is_good else None

    def _drop(self, key: int) -> None:
        if (session_id := self._ids.pop(key, None)) is not None:
            self._known.pop(session_id, None)

    def _is_doubtful(self, key: int) -> bool:
        until = self._doubtful.get(key)
        if until is not None and time.monotonic() >= until:
            del self._doubtful[key]
            return False
        return until is not None
