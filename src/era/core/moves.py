"""Sessions that move to another host of the cluster, which has room for them or their packages.

Theory of operation. A session needs room when it gets a sandbox: for a run, or for good when it becomes live. Where its
home has none, another session's sandbox would have to make way, or the call would wait or be refused. If another host
has room then, the session moves there instead, and the call with it. What moves has nothing but rows and blobs here: a
session with a sandbox stays, since it has its room. As sandboxes make way in the order in which they were last used,
those move first that have been idle for longest.

A session that had no home until it was called here moves for less: where over three quarters of the room is taken, or
where its packages are installed at another host that has room, and aren't here. This is asked once, at its
first call for a sandbox. Whatever the reason, a host that has its packages goes before one that has more room.

Nothing may be under way in what moves. So its turn is held meanwhile, calls that come wait at the gate (`calling`), and
one that has passed the gate keeps its session from moving. Those that waited go on to the new home.

It doesn't come back at once: a host has room for others only up to three quarters of its own, and none while anybody
waits there. So between two moves of a session a quarter of a host must have become free, or full.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from enum import StrEnum
from itertools import islice
from typing import Protocol

import structlog

from era.core.fair_queue import FairQueue
from era.core.homes import Homes, Host, Place
from era.core.models import JsonObject, OwnedId, Session
from era.core.turns import Turns
from era.errors import EraError

log = structlog.get_logger()

_KNOWN_SECONDS = 1.0
"""For which what hosts said of their room is taken for true, less what was sent there since."""

_MOST_TOLD = 2000
"""Package sets of which a host tells others that it has them."""

_REMEMBERED_SECONDS = 60.0
"""For which calls that look for a session here are sent after it."""


class Live(Protocol):
    """The live sessions of this host."""

    @property
    def most(self) -> int: ...

    def count(self) -> int: ...

    def has_room(self, owner: str) -> bool: ...


class Installed(Protocol):
    """The package sets on this machine."""

    def digests(self) -> Collection[str]:
        """Reads a directory."""
        ...

    def is_here(self, digest: str) -> bool: ...


class Why(StrEnum):
    """Why a session moves, as the log has it."""

    FULL = "no room"
    NEARLY_FULL = "no home, and little room"
    PACKAGES = "no home, and its packages are there"


class Moves:
    """Which sessions move. Only in a cluster."""

    def __init__(
        self,
        homes: Homes,
        turns: Turns,
        find: Callable[[OwnedId], Awaitable[Session]],
        places: FairQueue,
        live: Live,
        installed: Installed,
        stay: Sequence[Callable[[int], bool]],
        has_ticket: Callable[[str], bool],
        check_ready: Callable[[], Awaitable[None]],
    ) -> None:
        """`find` finds a session of its owner's, or raises EraError. `places` are those of this host for sandboxes, and
        `live` are its live sessions. `stay` are whatever says of a session's key that there is more of it here than
        rows and blobs. `check_ready` raises EraError where this host can't take runs, or is about to stop."""
        self._homes = homes
        self._turns = turns
        self._find = find
        self._places = places
        self._live = live
        self._installed = installed
        self._stay = stay
        self._has_ticket = has_ticket
        self._check_ready = check_ready
        self._calls: Counter[str | int] = Counter()
        """Calls under way about a session, by its id or, where they name that, its key."""

        self._leaving: dict[str | int, asyncio.Event] = {}
        """Sessions that are just moving, by both, whose events are set when they have."""

        self._gone: OrderedDict[str | int, float] = OrderedDict()
        """Those that have moved, and when."""

        self._room: dict[str, Counter[str]] = {}
        self._packages: dict[str, frozenset[str]] = {}
        """What other hosts said last, by their ids."""

        self._asked_at = -_KNOWN_SECONDS
        self.count = 0
        """How many have moved."""

    async def room_for_others(self) -> JsonObject:
        """How many sessions other hosts may send here, with a sandbox and live, and which package sets are here."""
        try:
            await self._check_ready()
        except EraError:
            return {"sandboxes": 0, "live": 0}
        free = 0 if self._places.waiting else self._places.count * 3 // 4 - self._places.taken
        live = max(self._live.most * 3 // 4 - self._live.count(), 0)
        try:
            packages = await asyncio.to_thread(self._installed.digests)
        except OSError:
            packages = ()
        return {"sandboxes": max(free, 0), "live": live, "packages": list(islice(packages, _MOST_TOLD))}

    @asynccontextmanager
    async def calling(self, session: str | int) -> AsyncIterator[None]:
        """A call about this session, which doesn't begin while the session moves, nor does it move before the end."""
        while (leaving := self._leaving.get(session)) is not None:
            await leaving.wait()
        self._calls[session] += 1
        try:
            yield
        finally:
            self._calls[session] -= 1
            if not self._calls[session]:
                del self._calls[session]

    def has_gone(self, session: str | int) -> bool:
        """Whether the session with this id or key moved from here just now."""
        at = self._gone.get(session)
        return at is not None and time.monotonic() < at + _REMEMBERED_SECONDS

    async def move(self, session: OwnedId, *, live: bool, ask: Callable[[Host], Awaitable[JsonObject | None]]) -> bool:
        """Have the session move, if another host is better for what the only call about it wants; whether it has.
        `live` says what it wants, `ask` has another host say its `room_for_others`."""
        kind = "live" if live else "sandboxes"
        arrival = self._homes.arrival(session.id)
        if not self._why(session, live, arrival):
            return False
        try:
            found = await self._find(session)  # or anybody could have others' sessions move
        except EraError:
            return False
        host, key = await self._best(kind, found.package_set, ask), found.key
        why = self._why(session, live, arrival)
        if host is None or self._homes.key_here(session.id) != key or not why:
            return False
        if why is Why.PACKAGES and found.package_set not in self._packages[host.id]:
            return False
        leaving = self._leaving[session.id] = self._leaving[key] = asyncio.Event()
        try:
            async with self._turns.take(session, bounded=False):
                moved = await self._homes.give(session.id, key, host)
        except EraError as error:
            log.warning("session_not_moved", session=session.id, to=host.id, error=error.message)
            moved = False
        finally:
            del self._leaving[session.id], self._leaving[key]
            leaving.set()
        if moved:
            self.count += 1
            if host.id in self._room:  # others may have asked meanwhile, and it hasn't answered
                self._room[host.id].subtract({"sandboxes", kind})
            for name in (session.id, key):
                self._gone[name] = time.monotonic()
                self._gone.move_to_end(name)
            while self._gone and next(iter(self._gone.values())) + _REMEMBERED_SECONDS < time.monotonic():
                self._gone.popitem(last=False)
            log.info("session_moved", session=session.id, to=host.id, why=why)
        return moved

    def _why(self, session: OwnedId, live: bool, arrival: Place | None) -> Why | None:
        """Why it should be elsewhere; None where there is no reason, or something of it is under way besides the call
        that asks. It had no home before where it has just arrived."""
        key = self._homes.key_here(session.id)
        if key is None or self._calls[session.id] != 1 or self._calls[key] or self._turns.taken(session):
            return None
        if any(stays(key) for stays in self._stay) or self._has_ticket(session.id):
            return None
        if not self._places.is_free or (live and not self._live.has_room(session.owner)):
            return Why.FULL
        if arrival is None:
            return None
        if arrival.packages is not None and not self._installed.is_here(arrival.packages):
            return Why.PACKAGES
        return Why.NEARLY_FULL if self._places.taken * 4 > self._places.count * 3 else None

    async def _best(
        self, kind: str, packages: str | None, ask: Callable[[Host], Awaitable[JsonObject | None]]
    ) -> Host | None:
        """Of the other hosts that have room of this kind, the one with most, those that have these packages first."""
        others = [host for host in self._homes.hosts.values() if host.id != self._homes.host_id and host.url]
        if time.monotonic() > self._asked_at + _KNOWN_SECONDS:
            self._asked_at = time.monotonic()
            answers = await asyncio.gather(*(ask(host) for host in others))
            told = {host.id: answer for host, answer in zip(others, answers, strict=True) if answer is not None}
            self._room = {
                host: Counter({name: int(answer.get(name, 0)) for name in ("sandboxes", "live")})
                for host, answer in told.items()
            }
            self._packages = {host: frozenset(map(str, answer.get("packages", ()))) for host, answer in told.items()}
        room, kinds = self._room, {"sandboxes", kind}
        found = [host for host in others if host.id in room and all(room[host.id][each] > 0 for each in kinds)]
        installed = self._packages
        return max(found, key=lambda host: (packages in installed[host.id], room[host.id][kind]), default=None)
