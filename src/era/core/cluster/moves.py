"""Sessions that move to another host of the cluster, which has room for them or their packages.

Theory of operation. A session moves when it is called: then its home may have no room for what the call wants, and
another host has. So the call goes there with it, and only sessions that are called are ever moved. Room is a place for
a sandbox, or for a live session. Where a home has none, another session's sandbox would have to make way, or the call
would wait or be refused. As sandboxes make way in the order in which they were last used, those sessions move first
that have been idle for longest. One that has a sandbox has its room, and stays, unless it is to be live and can't be
here.

A session that had no home until it was called here moves for less: where over three quarters of the room is taken, or
where its packages are installed at another host that has room, and aren't here. This is asked once, at its
first call for a sandbox. Whatever the reason, a host that has its packages goes before one that has more room. One that
is made with a setup is given away before that begins, to a host that has done the same setup before (`place`).

Nothing may be under way in a session that moves, and nothing that lasts is ended for it. So its turn is held meanwhile,
calls that come wait at the gate (`calling`) and then go to the new home, and one that has passed the gate keeps its
session from moving.

It doesn't come back at once: a host has room for others only up to three quarters of its own places, and none while
anybody waits there.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol

import structlog

from era.core.cluster.homes import Homes, Host, Place
from era.core.concurrency.turns import Turns
from era.core.live.live_sessions import LiveSessions
from era.core.models import JsonObject, OwnedId, Session
from era.core.pool.pool import MOVED, SandboxPool
from era.core.setup.requirements import Packages, packages_of
from era.errors import EraError

log = structlog.get_logger()

_KNOWN_SECONDS = 1.0
"""For which what hosts said of their room is taken for true, less what was sent there since."""

_MOST_ASKED = 16
"""Hosts that are asked at a time, so that it doesn't grow with the cluster what a full host asks for."""

_MOST_TOLD = 2000
"""Package sets of which a host tells others that it has them."""

_REMEMBERED_SECONDS = 60.0
"""For which calls that look for a session here are sent after it."""


class Installed(Protocol):
    """The package sets on this machine."""

    def digests(self) -> Collection[str]:
        """Reads a directory."""
        ...

    def is_here(self, digest: str) -> bool: ...

    def name(self, packages: Packages) -> str:
        """What these packages are called among hosts with the same runtimes."""
        ...

    def is_prepared(self, name: str) -> bool:
        """Whether the packages of this name are here. Reads a file."""
        ...


class Others(Protocol):
    """The other hosts."""

    async def room(self, host: Host, packages: str | None = None) -> JsonObject | None:
        """What a host says as its `room_for_others`; None where it says nothing of use within moments."""
        ...

    async def look_for_setups(self, host: Host) -> None:
        """Have a host look for setups to do now, rather than within a second."""
        ...


type Why = Literal["no room", "no home, and little room", "no home, and its packages are there"]
"""Why a session moves, as the log has it."""

_FULL: Why = "no room"
_NEARLY_FULL: Why = "no home, and little room"
_PACKAGES: Why = "no home, and its packages are there"


@dataclass(frozen=True, slots=True)
class _Told:
    """What another host has said of its room."""

    room: Counter[str]
    """Places, by kind."""

    packages: frozenset[str]
    is_prepared: bool
    """Whether it has the packages that it was asked for."""


class Moves:
    """Which sessions move. Only in a cluster."""

    def __init__(
        self,
        homes: Homes,
        others: Others,
        turns: Turns,
        find: Callable[[OwnedId], Awaitable[Session]],
        sandboxes: SandboxPool,
        live: LiveSessions,
        installed: Installed,
        works: Sequence[Callable[[int], bool]],
        has_ticket: Callable[[str], bool],
        is_ready: Callable[[], bool],
    ) -> None:
        """`find` finds a session of its owner's, or raises EraError. `works` are whatever says of a session's key that
        this host does something for it, besides runs and what is live. `is_ready` says at once whether this host can
        take runs, as far as is known, and isn't about to stop."""
        self._homes = homes
        self._others = others
        self._turns = turns
        self._find = find
        self._sandboxes = sandboxes
        self._places = sandboxes.places
        self._live = live
        self._installed = installed
        self._works = works
        self._has_ticket = has_ticket
        self._is_ready = is_ready
        self._calls: Counter[str | int] = Counter()
        """Calls under way about a session, by its id or, where they name that, its key."""

        self._leaving: dict[str | int, asyncio.Event] = {}
        """By both: what is set once a session that is about to move has moved, or stays."""

        self._gone: OrderedDict[str | int, float] = OrderedDict()
        """Those that have moved, and when."""

        self._told: dict[str, _Told] = {}
        """What other hosts said last, by their ids."""

        self._asked_at = -_KNOWN_SECONDS
        """When they had said it."""

        self._asking = asyncio.Lock()
        self.count = 0
        """How many have moved."""

    async def room_for_others(self, packages: str | None = None) -> JsonObject:
        """How many sessions other hosts may send here, with a sandbox and live, which package sets are here, and
        whether these packages are."""
        if not self._is_ready():
            return {"sandboxes": 0, "live": 0}
        free = 0 if self._places.waiting else self._places.count * 3 // 4 - self._places.taken
        live = max(self._live.most * 3 // 4 - self._live.count(), 0)
        try:
            digests = await asyncio.to_thread(self._installed.digests)
            prepared = packages is not None and await asyncio.to_thread(self._installed.is_prepared, packages)
        except OSError:
            digests, prepared = (), False
        return {
            "sandboxes": max(free, 0),
            "live": live,
            "packages": list(islice(digests, _MOST_TOLD)),
            "prepared": prepared,
        }

    @asynccontextmanager
    async def calling(self, session: str | int) -> AsyncIterator[None]:
        """A call about this session, which doesn't begin while the session moves, nor does it move before the end."""
        while (over := self._leaving.get(session)) is not None:
            await over.wait()
        self._count_call(session, 1)
        try:
            yield
        finally:
            self._count_call(session, -1)

    def _count_call(self, session: str | int, by: int) -> None:
        self._calls[session] += by
        if not self._calls[session]:
            del self._calls[session]

    def has_gone(self, session: str | int) -> bool:
        """Whether the session with this id or key moved from here just now."""
        at = self._gone.get(session)
        return at is not None and time.monotonic() < at + _REMEMBERED_SECONDS

    async def move(self, session: OwnedId, *, live: bool) -> bool:
        """Give a session to another host, if a call about it that hasn't begun needs what this host hasn't got.

        Args:
            session: The session that the call names.
            live: Whether the call needs the session to be live, and not only a sandbox.

        Returns:
            Whether the session has moved. Then the call goes to its new home.
        """
        key, arrival = self._homes.key_here(session.id), self._homes.arrival(session.id)
        if key is None or (why := self._why(session, key, live, arrival)) is None:
            return False
        try:
            found = await self._find(session)  # or anybody could have others' sessions move, and their calls wait
        except EraError:
            return False
        if session.id in self._leaving:  # for another call, which looked meanwhile, and which this one keeps here
            return False
        kind = "live" if live else "sandboxes"
        with self._about_to_leave(session.id, key):
            hosts = await self._with_room(kind)
            # While hosts were asked, the session may have been used, moved, or deleted and made anew. Nothing is waited
            # for between this look and the gift.
            if not hosts or found.key != key or self._why(session, key, live, arrival) != why:
                return False
            host = self._best(hosts, kind, found.package_set)
            if why == _PACKAGES and found.package_set not in self._told[host.id].packages:
                return False
            return await self._give(session, key, host, kind, why)

    async def place(self, session: Session) -> None:
        """Have another host be the home of a session that has just been made, and has a setup, if that is better."""
        try:
            packages = packages_of(json.loads(session.setup or "{}"))
        except EraError:
            return  # as its setup will say
        name = self._installed.name(packages) if packages and not session.setup_lock else None
        if name is not None and not await asyncio.to_thread(self._installed.is_prepared, name):
            why = _PACKAGES
        elif self._is_nearly_full():
            why = _NEARLY_FULL
        else:
            return
        told = await self._ask(name)
        hosts = [host for host in self._listening() if host.id in told and told[host.id].room["sandboxes"] > 0]
        best = max(hosts, key=lambda host: (told[host.id].is_prepared, told[host.id].room["sandboxes"]), default=None)
        if best is None or (why == _PACKAGES and not told[best.id].is_prepared):
            return
        if session.id in self._leaving:
            return  # it was called meanwhile, and goes where that call would have it
        with self._about_to_leave(session.id, session.key):
            try:
                if not await self._homes.owns(session.key):
                    return
            except EraError:  # nobody knows whose it is
                return
            if not self._is_left_alone(session.owned_id, session.key, calls=0):
                return
            if await self._give(session.owned_id, session.key, best, "sandboxes", why):
                await self._others.look_for_setups(best)

    @contextmanager
    def _about_to_leave(self, session_id: str, key: int) -> Iterator[None]:
        """Have calls about a session wait within the block."""
        over = self._leaving[session_id] = self._leaving[key] = asyncio.Event()
        try:
            yield
        finally:
            del self._leaving[session_id], self._leaving[key]
            over.set()

    async def _give(self, session: OwnedId, key: int, host: Host, kind: str, why: Why) -> bool:
        """Have a session of which nothing is under way be at home at another host; whether it is."""
        try:
            async with self._turns.take(session, bounded=False):
                moved = await self._homes.give(session.id, key, host)
        except EraError as error:
            log.warning("session_not_moved", session=session.id, to=host.id, error=error.message)
            return False
        if moved:
            self._sandboxes.release_soon(key, MOVED)
            self._note_moved(session.id, key, host, kind, why)
        return moved

    def _note_moved(self, session_id: str, key: int, host: Host, kind: str, why: Why) -> None:
        self.count += 1
        if host.id in self._told:  # others may have asked meanwhile, and it hasn't answered
            self._told[host.id].room.subtract({"sandboxes", kind})
        for name in (session_id, key):
            self._gone[name] = time.monotonic()
            self._gone.move_to_end(name)
        while self._gone and next(iter(self._gone.values())) + _REMEMBERED_SECONDS < time.monotonic():
            self._gone.popitem(last=False)
        log.info("session_moved", session=session_id, to=host.id, why=why)

    def _why(self, session: OwnedId, key: int, live: bool, arrival: Place | None) -> Why | None:
        """Why a session should be elsewhere. None where there is no reason, where it isn't at home here any more, or
        where anything of it is under way. `arrival` is given for one that had no home before this call."""
        if self._homes.key_here(session.id) != key or not self._is_left_alone(session, key):
            return None
        has_room = self._sandboxes.has(key) or self._places.is_free
        if not has_room or (live and not self._live.has_room(session.owner)):
            return _FULL
        if arrival is None:
            return None
        if arrival.packages is not None and not self._installed.is_here(arrival.packages):
            return _PACKAGES
        return _NEARLY_FULL if self._is_nearly_full() else None

    def _is_left_alone(self, session: OwnedId, key: int, *, calls: int = 1) -> bool:
        """Whether nothing of a session is under way besides so many calls about it, such as the one that asks."""
        is_called = self._calls[session.id] > calls or self._calls[key]
        runs = self._turns.taken(session) or self._sandboxes.is_busy(key)
        lasts = self._live.has(key) or any(works(key) for works in self._works) or self._has_ticket(session.id)
        return not (is_called or runs or lasts)

    def _is_nearly_full(self) -> bool:
        return self._places.taken * 4 > self._places.count * 3

    def _listening(self) -> Sequence[Host]:
        """The other hosts, as far as they can be called."""
        return [host for host in self._homes.hosts.values() if host.id != self._homes.host_id and host.url]

    async def _ask(self, packages: str | None = None) -> dict[str, _Told]:
        """What other hosts say of their room, and of these packages: all, or some of very many."""
        others = self._listening()
        if len(others) > _MOST_ASKED:
            others = random.sample(others, _MOST_ASKED)
        answers = await asyncio.gather(*(self._others.room(host, packages) for host in others))
        told = zip(others, answers, strict=True)
        return {host.id: _told(answer) for host, answer in told if answer is not None}

    async def _with_room(self, kind: str) -> Sequence[Host]:
        """The other hosts that have room of this kind."""
        async with self._asking:  # which others wait for, too
            if time.monotonic() > self._asked_at + _KNOWN_SECONDS:
                self._told = await self._ask()
                self._asked_at = time.monotonic()
        hosts = [host for host in self._listening() if host.id in self._told]
        return [host for host in hosts if all(self._told[host.id].room[each] > 0 for each in {"sandboxes", kind})]

    def _best(self, hosts: Sequence[Host], kind: str, packages: str | None) -> Host:
        """Of these hosts the one with most room, those that have these packages first."""

        def rank(host: Host) -> tuple[bool, int]:
            told = self._told[host.id]
            return packages in told.packages, told.room[kind]

        return max(hosts, key=rank)


def _told(answer: JsonObject) -> _Told:
    room = Counter({name: int(answer.get(name, 0)) for name in ("sandboxes", "live")})
    return _Told(room, frozenset(map(str, answer.get("packages", ()))), bool(answer.get("prepared")))
