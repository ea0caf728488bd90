"""Which host of a cluster answers for a session: leases of hosts, homes of sessions, one leader.

Theory of operation. Several hosts, each a whole ERA, share one metadata store and one blob store. A session has one
*home* at a time: a row that names a host and an epoch. A host takes the home of a session that has none when it is
first needed there; calls that reach another host are passed on to it (api/hosts/hop.py).

A host's *lease* goes from one heartbeat to some seconds after it, by the database's clock. While it lasts nobody takes
what is the host's. Once it is over, whoever beats next declares the host dead, in a transaction that also records as
lost what the host was doing. From then on its sessions may be taken, each with the epoch after. A host that was
declared dead never comes back under its id: it ends, and is started anew as another one.

Nothing hangs on these clocks but how soon that is. Every commit looks in its own transaction whether the session's home
is still the one that this host took (store/homes.py), so a host that was paused or cut off may compute, and can't
commit. The host itself goes by its monotonic clock, which counts sleep, too, from before each heartbeat was sent: it
stops answering before the database can find its lease over.

Hosts' own clocks may differ: all go by the database's for what has a time, such as the end of a session's ttl.

What is to be done once in the cluster is done by a session's home, or by the leader: a row that names one host, which
the heartbeat of another takes over once that host is dead.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import structlog

from era.core.models import new_id, set_clock
from era.errors import EraError, HostLost, NoLease, NotReady, Unready

log = structlog.get_logger()

_BEATS = 5
"""Heartbeats in a lease."""

_PROMPT_SECONDS = 1.0
"""What takes longer says nothing about clocks."""

_MARGIN = 0.1
"""Part of the lease by which this host takes it to be over before the database does."""

_REMEMBERED = 100_000
"""Sessions at home here that are remembered. Any other is found in the database, at the price of a query."""


@dataclass(frozen=True, slots=True)
class Host:
    """A host that isn't known to be dead."""

    id: str
    url: str
    """Where the other hosts reach it; empty as long as it doesn't listen yet."""


@dataclass(frozen=True, slots=True)
class HostRecord:
    """What the rows say of a host that is alive, or was within the last day. Times are the database's, in microseconds
    since 1970."""

    host: Host
    started_at: int
    heartbeat_at: int
    dead: bool
    leads: bool
    sessions: int
    """How many are at home there."""


@dataclass(frozen=True, slots=True)
class Home:
    """Where a session is at home."""

    host: Host
    epoch: int


@dataclass(frozen=True, slots=True)
class Place:
    """A present session, and its home; None where it has none, or where that host is dead."""

    session_key: int
    home: Home | None
    packages: str | None = None
    """The digest of the session's installed packages."""


@dataclass(frozen=True, slots=True)
class View:
    """What a heartbeat saw."""

    hosts: Mapping[str, Host]
    """By id, those that aren't dead, this one too."""

    leader: str
    at: int
    """The database's time, in microseconds since 1970."""

    lost: int = 0
    """Runs that were found to be lost with their hosts."""


class HomeStore(Protocol):
    """The rows of hosts and homes. Every call is one transaction, `beat` two, and raises Unavailable where the
    database fails."""

    async def join(self, host: Host, lease_seconds: float) -> View:
        """Begin to exist as this host, whose id was never used, and `beat` for the first time. From now on commits are
        checked."""
        ...

    async def beat(self, host: Host, renewed: Callable[[], None]) -> View:
        """Renew the lease, note the URL, and call `renewed`; then declare dead the hosts whose leases are over, record
        as lost what they were doing, and take the lead if nobody alive has it. Raises HostLost where this host was
        declared dead."""
        ...

    async def leave(self, host_id: str) -> None:
        """Declare this host dead, so that nobody need wait for its lease to be over."""
        ...

    async def heartbeats_at(self, url: str) -> Mapping[str, int]:
        """The times of the last heartbeats of the hosts that are reached at this URL and have a lease, by id."""
        ...

    async def records(self) -> Sequence[HostRecord]:
        """The hosts on record, in the order in which they came. Counts all homes, so it isn't for every request."""
        ...

    async def find(self, session: str | int) -> Place | None:
        """Where the present session with this id or key is at home; None where there is no such session."""
        ...

    async def hosts_of(self, session_keys: Sequence[int]) -> Mapping[int, Host]:
        """The hosts that aren't dead at which sessions are at home, by key, of those that have one."""
        ...

    async def take(self, session_key: int) -> Home:
        """The session's home: this host, if there was none or that was dead, else whatever it is. Raises HostLost."""
        ...

    async def give(self, session_key: int, host_id: str) -> bool:
        """Have another host be the home of a session that is at home here; whether it is now. It isn't where that host
        is dead."""
        ...

    def forget(self, session_key: int) -> None:
        """Forget that the session is at home here, so that the next check asks the rows anew."""
        ...


class Homes:
    """This host's part in the cluster. `start` before anything else is started, `leave` when all has stopped."""

    def __init__(self, store: HomeStore, lease_seconds: float, lost: Callable[[], None]) -> None:
        """`lost` is called once this host has been declared dead: it must end the process."""
        self._store = store
        self._lease_seconds = lease_seconds
        self._lost = lost
        self._host = Host(new_id("host"), "")
        self._view = View({}, "", 0)
        self._valid_until = 0.0
        """The end of the lease, by the monotonic clock."""

        self._seen_at = 0.0
        """When the heartbeat was sent that saw `_view`, by the same clock."""

        self._news = asyncio.Event()
        """Set with each heartbeat, and then replaced."""

        self._here: OrderedDict[str, int] = OrderedDict()
        """The keys of sessions at home here, by id."""

        self._arrived: dict[str, Place] = {}
        """Those of them that had no home until they were called here, and haven't been asked for by `arrival`."""

        self._giving: set[int] = set()
        """The keys of sessions that are just given to another host."""

        self._ends_with_lease: dict[object, Callable[[], None]] = {}
        self._lease_timer: asyncio.TimerHandle | None = None
        self._beating: asyncio.Task[None] | None = None
        self._beat_now = asyncio.Event()
        self._told_url = ""
        """What the last heartbeat has told of where this host listens."""

        self._on_beat: list[Callable[[], Awaitable[None]]] = [self.catch_up]
        self._shared: list[Callable[[], Awaitable[None]]] = []
        self._catching_up = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked = self._answered = 0
        """How often `catch_up` was called, and up to which of these calls all is read."""

    @property
    def host_id(self) -> str:
        return self._host.id

    @property
    def hosts(self) -> Mapping[str, Host]:
        """By id, the hosts that weren't dead at the last heartbeat."""
        return self._view.hosts

    @property
    def lease_seconds(self) -> float:
        return self._lease_seconds

    async def start(self) -> None:
        """Join the cluster, and beat from now on. Raises Unavailable."""
        self._loop = asyncio.get_running_loop()
        sent = _monotonic()
        view = await self._store.join(self._host, self._lease_seconds)
        self._renewed(sent, self._host)
        self._saw(sent, view)
        self._beating = asyncio.create_task(self._beat())

    async def check_alone_at(self, url: str) -> None:
        """Raises NotReady where another host is reached at this URL. One that was, and is gone, is waited for until its
        lease is over: nothing else tells it from one that is there."""
        first: dict[str, int] = {}
        while found := await self._store.heartbeats_at(url):
            if any(first.setdefault(host, at) != at for host, at in found.items()):
                raise _not_alone(url)
            await asyncio.sleep(self._lease_seconds / _BEATS / 2)

    async def reached_at(self, url: str) -> None:
        """Say where this host listens. A heartbeat tells the others at once; returns when it has. Raises NotReady where
        another host has said the same, which has started at the same time, or no heartbeat comes through within a
        lease; Unavailable."""
        self._host = Host(self._host.id, url)
        self._beat_now.set()
        try:
            async with asyncio.timeout(self._lease_seconds):
                while not self._told_url:
                    await self._news.wait()
        except TimeoutError:
            raise NotReady("The cluster's database could not be told where this host listens.") from None
        if (await self._store.heartbeats_at(url)).keys() - {self._host.id}:
            raise _not_alone(url)

    def check_reachable(self) -> None:
        """Raises Unready as long as the others can't know where this host listens."""
        if not self._told_url:
            raise Unready("The other hosts don't know yet where this one listens.", details={"reason": "starting"})

    def each_beat(self, *calls: Callable[[], Awaitable[None]]) -> None:
        """Have these called after each heartbeat. A failure is logged, and keeps no heartbeat from being sent."""
        self._on_beat.extend(calls)

    def shares(self, *reads: Callable[[], Awaitable[None]]) -> None:
        """Have these read what all hosts know alike, after each heartbeat and whenever another host has changed it."""
        self._shared.extend(reads)

    async def catch_up(self) -> None:
        """Read again what all hosts know alike. All who ask while somebody reads have one more reading in common, which
        begins after they asked: so however many changes there are, one reading is under way."""
        self._asked += 1
        asked = self._asked
        async with self._catching_up:
            if self._answered >= asked:
                return
            asked = self._asked
            for read in self._shared:
                await _logged(read)
            self._answered = asked

    async def leave(self) -> None:
        """Give away all sessions at once. Nothing may be under way any more."""
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.wait([self._beating])
        if self._lease_timer is not None:
            self._lease_timer.cancel()
        self._valid_until = 0.0
        try:
            await self._store.leave(self._host.id)
        except EraError as error:
            log.warning("host_not_left", error=error.message, then="the others wait for the end of its lease")

    # -- the lease --------------------------------------------------------------------------------------------------

    @property
    def has_lease(self) -> bool:
        """Whether this host may answer."""
        return self.lease_left > 0

    def check_lease(self) -> None:
        """Raises NoLease where this host may not answer, as others may have taken what was its."""
        if not self.has_lease:
            raise NoLease("This host has had no contact with its cluster's database for too long to answer.")

    @contextmanager
    def while_leased(self, end: Callable[[], None]) -> Iterator[None]:
        """Have `end` called where this host has no lease within the block: it ends what tells somebody for a while what
        goes on here."""
        if not self.has_lease:
            end()
        key = object()
        self._ends_with_lease[key] = end
        try:
            yield
        finally:
            del self._ends_with_lease[key]

    def _look_at_lease(self) -> None:
        """End what ends with the lease, if that is over, or look again when it will be."""
        if (left := self.lease_left) > 0:
            self._lease_timer = asyncio.get_running_loop().call_later(left, self._look_at_lease)
            return
        self._lease_timer = None
        ends = list(self._ends_with_lease.values())
        log.warning("lease_over", ended=len(ends), then="nothing is answered until the database can be reached")
        for end in ends:
            end()

    @property
    def leads(self) -> bool:
        """Whether what is to be done once in the cluster is this host's to do."""
        return self.has_lease and self._view.leader == self._host.id

    def time(self) -> int:
        """The database's time, as all hosts know it within moments, in microseconds since 1970."""
        return self._view.at + int((_monotonic() - self._seen_at) * 1e6)

    async def _beat(self) -> None:
        """Renew the lease for as long as this host lives. Depends on the database and on nothing else."""
        while True:
            await _set_within(self._beat_now, self._lease_seconds / _BEATS)
            self._beat_now.clear()
            sent, host = _monotonic(), self._host
            try:
                self._saw(sent, await self._store.beat(host, partial(self._renewed, sent, host)))
            except HostLost:
                self._valid_until = 0.0
                log.error("host_lost", host=self._host.id, why="its lease was over before it was renewed")
                self._lost()
                return
            except EraError as error:
                log.warning("heartbeat_failed", error=error.message, lease_left=round(self.lease_left, 1))
            except Exception:  # a bug, after which there are more heartbeats all the same
                log.exception("heartbeat_failed", lease_left=round(self.lease_left, 1))

    def _renewed(self, sent: float, host: Host) -> None:
        """The lease was renewed by a heartbeat that was sent at this time, whatever comes of its look at the others."""
        self._told_url = host.url
        self._valid_until = sent + self._lease_seconds * (1 - _MARGIN)
        if self._lease_timer is None:
            self._look_at_lease()

    def _saw(self, sent: float, view: View) -> None:
        """Note what a heartbeat saw that was sent at this time, and tell those who wait."""
        if view.lost:
            log.warning("runs_lost", count=view.lost, why="their hosts are dead")
        if _monotonic() - sent < _PROMPT_SECONDS and (apart := set_clock(view.at)):
            log.warning("clocks_apart", seconds=round(apart / 1e6, 1), then="the database's clock counts")
        self._view, self._seen_at = view, sent
        self._news.set()
        self._news = asyncio.Event()
        for call in self._on_beat:
            # Beside the next heartbeats, never before them.
            asyncio.create_task(_logged(call))  # noqa: RUF006  it is over in a moment, and nobody waits for it

    async def records(self) -> Sequence[HostRecord]:
        """See HomeStore."""
        return await self._store.records()

    @property
    def lease_left(self) -> float:
        """Seconds until this host may answer nothing more, unless a heartbeat comes before."""
        return max(self._valid_until - _monotonic(), 0.0)

    # -- homes ------------------------------------------------------------------------------------------------------

    def is_here(self, session_id: str) -> bool:
        """Whether a session is known to be at home here. Its commits find out if it isn't any more."""
        return session_id in self._here

    def is_another(self, session_id: str, session_key: int) -> bool:
        """Whether the session that was found under this id is another than was at home here under it. That one is then
        forgotten: it expired, or was deleted at another host. On any thread."""
        key = self._here.get(session_id, session_key)
        if key == session_key or self._loop is None:
            return False

        def forget() -> None:
            if self._here.get(session_id) == key:
                self.moved(session_id)

        self._loop.call_soon_threadsafe(forget)
        return True

    async def elsewhere(self, session: str | int, *, take: bool) -> Host | None:
        """The other host at which the session with this id or key is at home, alive as far as anybody knows. None where
        this host is to answer: it is at home here, from now on if nobody else has it and `take` says so, or there is no
        such session. Raises HostLost, Unavailable."""
        place = await self._store.find(session)
        if place is None:
            return None
        home = place.home
        if home is None and take:
            home = await self._store.take(place.session_key)
        if home is None:
            return None
        if home.host.id != self._host.id:
            return home.host
        if isinstance(session, str):
            if place.home is None:
                self._arrived[session] = place
            self._remember(session, place.session_key)
        return None

    async def others(self, session_keys: Sequence[int]) -> Mapping[int, Host]:
        """The other hosts at which sessions are at home, by key."""
        homes = await self._store.hosts_of(session_keys)
        return {key: host for key, host in homes.items() if host.id != self._host.id}

    async def owns(self, session_key: int) -> bool:
        """Whether the session with this key is at home here, from now on if nobody else has it: so what is to be done
        for a session is done by one host. False where the host has no lease."""
        if not self.has_lease or session_key in self._giving:
            return False
        place = await self._store.find(session_key)
        if place is None:
            return False
        home = place.home or await self._store.take(session_key)
        return home.host.id == self._host.id

    async def owned(self, session_keys: Sequence[int], most_new: int) -> Sequence[int]:
        """See Cluster. One query says where all of them are at home; each session without a home that is taken costs
        more. Sessions that are being given to another host are left out until the next call. A session that was given
        away during the query may be among the result: the fence in each transaction keeps this host from beginning
        anything of it."""
        if not session_keys:
            return []
        hosts = await self._store.hosts_of(session_keys)
        if not self.has_lease:
            return []
        here = [key for key in session_keys if key in hosts and hosts[key].id == self._host.id]
        own = [key for key in here if key not in self._giving]
        homeless = [key for key in session_keys if key not in hosts]
        taken = random.sample(homeless, min(max(most_new, 0), len(homeless)))
        return own + [key for key in taken if await self.owns(key)]

    def key_here(self, session_id: str) -> int | None:
        """The key of a session that is known to be at home here."""
        return self._here.get(session_id)

    def arrival(self, session_id: str) -> Place | None:
        """A session that had no home until it was called here: as it was then. None from the second time on."""
        return self._arrived.pop(session_id, None)

    async def give(self, session_id: str, session_key: int, host: Host) -> bool:
        """Have another host be a session's home from now on, with nothing of it under way here; whether it is. Raises
        Unavailable where nobody knows."""
        self._giving.add(session_key)
        try:
            return await self._store.give(session_key, host.id)
        finally:
            self._giving.remove(session_key)
            self.moved(session_id)
            self._store.forget(session_key)  # also where it had its home here without a call, as for a setup

    def moved(self, session_id: str) -> None:
        """Note that a session turned out not to be at home here."""
        self._arrived.pop(session_id, None)
        key = self._here.pop(session_id, None)
        if key is not None:
            self._store.forget(key)

    async def died(self, host_id: str) -> None:
        """Wait until a host is known to be dead. One that a heartbeat from before hasn't seen may have come since."""
        asked = _monotonic()
        while host_id in self._view.hosts or self._seen_at < asked:
            await self._news.wait()

    async def news(self, seconds: float) -> None:
        """Wait for the next heartbeat, at most so many seconds."""
        await _set_within(self._news, seconds)

    def _remember(self, session_id: str, session_key: int) -> None:
        self._here[session_id] = session_key
        self._here.move_to_end(session_id)
        if len(self._here) > _REMEMBERED:
            oldest, _ = self._here.popitem(last=False)
            self._arrived.pop(oldest, None)


def _not_alone(url: str) -> NotReady:
    return NotReady(
        f"Another host of this cluster is at {url}, too: give each an address of its own, with ERA_HOST and ERA_PORT, "
        "or ERA_HOST_URL."
    )


async def _set_within(event: asyncio.Event, seconds: float) -> None:
    """Wait until an event is set, at most so many seconds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


async def _logged(call: Callable[[], Awaitable[None]]) -> None:
    try:
        await call()
    except (EraError, OSError) as error:
        log.warning("heartbeat_followup_failed", error=str(error))


def _monotonic() -> float:
    """Seconds of a clock that nobody sets, and that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
