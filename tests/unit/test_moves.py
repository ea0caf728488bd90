"""Which sessions move to another host, and when: on rows that do as they are told."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from era.core.cluster.homes import Home, Homes, Host, Place
from era.core.cluster.moves import Moves
from era.core.concurrency.fair_limiter import FairLimiter
from era.core.concurrency.turns import Turns
from era.core.live.live_sessions import LiveSessions
from era.core.models import EMPTY, JsonObject, OwnedId, Session
from era.core.operation.readiness import Readiness
from era.core.owners.api_keys import Caller, Tickets
from era.core.pool.pool import SandboxPool
from era.core.setup.requirements import Packages
from era.errors import NoSession, Unavailable, Unready
from tests.owners import mine
from tests.unit.core import until
from tests.unit.test_homes import Rows

SESSION = Session(
    1,
    "s",
    mine("s").owner,
    "python",
    True,
    "{}",
    {},
    False,
    False,
    60,
    None,
    1,
    EMPTY,
    created_at=1,
    updated_at=1,
    last_run_at=None,
)
ROOM = {"a": {"sandboxes": 1, "live": 1}, "b": {"sandboxes": 3, "live": 0}, "c": {"sandboxes": 2, "live": 2}}


class Given(Rows):
    """Rows that note what was given to whom."""

    def __init__(self) -> None:
        super().__init__()
        self.others = {name: Host(name, f"http://{name}") for name in ROOM}
        self.given: list[tuple[int, str]] = []
        self.may_give = asyncio.Event()
        self.may_give.set()
        self.problem: Exception | None = None
        self.own: Host | None = None
        """Who takes a home; where nobody is said to, another host has taken it."""

    async def take(self, session_key: int) -> Home:
        return await super().take(session_key) if self.own is None else Home(self.own, 1)

    async def write(self) -> None:
        if self.problem is not None:
            raise self.problem

    async def give(self, session_key: int, host_id: str) -> bool:
        await self.may_give.wait()
        if self.problem is not None:
            raise self.problem
        self.given.append((session_key, host_id))
        return True


@dataclass
class Live:
    """Live sessions, as many as a test says."""

    number: int = 1
    most: int = 4
    keys: set[int] = field(default_factory=set)

    def count(self) -> int:
        return self.number

    def has(self, session_key: int) -> bool:
        return session_key in self.keys

    def has_room(self, owner: str) -> bool:
        return self.number < self.most


@dataclass
class Sandboxes:
    """The sandboxes of this host: whose there are, and whose are busy."""

    places: FairLimiter
    keys: set[int] = field(default_factory=set)
    busy: set[int] = field(default_factory=set)
    released: list[int] = field(default_factory=list)

    def has(self, session_key: int) -> bool:
        return session_key in self.keys | self.busy

    def is_busy(self, session_key: int) -> bool:
        return session_key in self.busy

    def release_soon(self, session_key: int, reason: str) -> None:
        assert reason == "moved"
        self.released.append(session_key)


@dataclass
class Installed:
    """The package sets of this machine, those that a test says."""

    here: set[str] = field(default_factory=set)

    def name(self, packages: Packages) -> str:
        return " ".join(packages.pip)

    def is_prepared(self, name: str) -> bool:
        return name in self.here

    def digests(self) -> set[str]:
        return self.here

    def is_here(self, digest: str) -> bool:
        return digest in self.here


@dataclass
class Cluster:
    """A host without room, at which session `s` is at home, and what is asked of the others."""

    rows: Given
    homes: Homes
    turns: Turns
    sandboxes: Sandboxes
    live: Live
    installed: Installed
    works: set[int]
    tickets: Tickets
    readiness: Readiness
    asked: list[str] = field(default_factory=list)
    told: dict[str, JsonObject | None] = field(default_factory=lambda: dict(ROOM))
    packages: str | None = None
    """Those of every session."""

    kicked: list[str] = field(default_factory=list)
    may_answer: asyncio.Event | None = None
    """What the others wait for before they say anything."""

    moves: Moves = field(init=False)

    async def find(self, session: OwnedId) -> Session:
        await asyncio.sleep(0)  # as a database has others go on meanwhile
        if session.owner != mine("s").owner:
            raise NoSession(session.id)
        return replace(SESSION, key=self.homes.key_here(session.id) or 0, package_set=self.packages)

    async def room(self, host: Host, packages: str | None = None) -> JsonObject | None:
        self.asked.append(host.id)
        if self.may_answer is not None:
            await self.may_answer.wait()
        told = self.told[host.id]
        return told and {**told, "prepared": packages in told.get("prepared", ())}

    async def look_for_setups(self, host: Host) -> None:
        self.kicked.append(host.id)

    async def move(self, *, live: bool = False, name: str = "s") -> bool:
        async with self.moves.calling(name):
            return await self.moves.move(mine(name), live=live)

    async def is_home(self, name: str = "s", key: int = 1) -> None:
        self.rows.place = Place(key, Home(Host(self.homes.host_id, ""), 1))
        assert await self.homes.elsewhere(name, take=True) is None

    async def arrives(self, name: str = "s", key: int = 1, packages: str | None = None) -> None:
        """A session that had no home is called here."""
        self.homes.moved(name)
        self.packages = packages
        self.rows.own = Host(self.homes.host_id, "")
        self.rows.place = Place(key, None, packages)
        assert await self.homes.elsewhere(name, take=True) is None


@asynccontextmanager
async def cluster(places: int = 0) -> AsyncIterator[Cluster]:
    rows = Given()
    homes = Homes(rows, 60, lambda: None)
    await homes.start()
    sandboxes, works, tickets = Sandboxes(FairLimiter(places, hint="")), set[int](), Tickets()
    readiness = Readiness(Path(tempfile.gettempdir()), rows.write)
    one = Cluster(rows, homes, Turns(), sandboxes, Live(), Installed(), works, tickets, readiness)
    one.moves = Moves(
        homes,
        one,
        one.turns,
        one.find,
        cast(SandboxPool, sandboxes),
        cast(LiveSessions, one.live),
        one.installed,
        [works.__contains__],
        tickets.has,
        readiness.is_likely,
    )
    await one.is_home()
    try:
        yield one
    finally:
        await homes.leave()


async def test_a_session_moves_to_the_host_with_most_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "era.core.cluster.moves._KNOWN_SECONDS", 3600.0
    )  # rather than a second, which may pass any time
    async with cluster() as one:
        assert await one.move()
        assert one.rows.given == [(1, "b")]
        assert not one.homes.is_here("s")
        assert one.moves.has_gone("s")
        assert one.moves.has_gone(1)
        assert one.moves.count == 1
        # What is known of others' room is asked once a second, and what was sent there counts at once.
        for key in (2, 3, 4, 5, 6, 7):
            await one.is_home(f"s{key}", key)
            await one.move(name=f"s{key}")
        assert sorted(host for _, host in one.rows.given) == ["a", "b", "b", "b", "c", "c"]
        assert one.asked == ["a", "b", "c"]


@pytest.mark.parametrize("has_sandbox", [False, True])
async def test_session_that_is_to_be_live_moves_where_it_can_be(has_sandbox: bool) -> None:
    async with cluster(places=8) as one:
        if has_sandbox:
            one.sandboxes.keys.add(1)
        assert not await one.move(live=True)
        one.live.number = 4
        assert not await one.move(), "it has what a run needs"
        one.sandboxes.busy.add(1)
        assert not await one.move(live=True), "its run could not go on elsewhere"
        one.sandboxes.busy.clear()
        assert await one.move(live=True)
        assert one.rows.given == [(1, "c")]
        assert one.sandboxes.released == [1]


async def test_sandbox_stays_when_move_fails() -> None:
    async with cluster(places=8) as one:
        one.live.number = 4
        one.sandboxes.keys.add(1)

        async def nobody(session_key: int, host_id: str) -> bool:
            return False

        one.rows.give = nobody  # type: ignore[method-assign]  # that host is dead by then
        assert not await one.move(live=True)
        assert one.sandboxes.released == []


async def has_a_sandbox(one: Cluster) -> None:
    one.sandboxes.keys.add(1)


async def is_live(one: Cluster) -> None:
    one.live.keys.add(1)


async def works(one: Cluster) -> None:
    one.works.add(1)


async def has_a_ticket(one: Cluster) -> None:
    one.tickets.give(Caller(mine("s").owner), "other")
    one.tickets.give(Caller(mine("s").owner), "s")


async def is_at_home_elsewhere(one: Cluster) -> None:
    one.homes.moved("s")


async def finds_no_room(one: Cluster) -> None:
    one.told = dict.fromkeys(ROOM, None) | {"a": {"sandboxes": 0, "live": 9}}


@pytest.mark.parametrize("why", [has_a_sandbox, is_live, works, has_a_ticket, is_at_home_elsewhere, finds_no_room])
async def test_what_stays(why: Callable[[Cluster], Any]) -> None:
    async with cluster() as one:
        await why(one)
        assert not await one.move()
        assert one.rows.given == []
        assert not one.moves.has_gone("s")


async def test_a_session_stays_while_anything_of_it_is_under_way() -> None:
    async with cluster() as one:
        for other in ("s", 1):  # another call, which may name it by its key
            async with one.moves.calling(other):
                assert not await one.move()
        async with one.turns.take(mine("s")):
            assert not await one.move()
        async with cluster(places=1) as roomy:
            assert not await roomy.move()
        assert await one.move()


async def test_nobody_has_a_session_of_somebody_elses_move() -> None:
    async with cluster() as one, one.moves.calling("s"):
        assert not await one.moves.move(OwnedId("another", "s"), live=False)
        assert (one.rows.given, one.asked) == ([], []), "nor does anybody wait for it"


async def test_calls_wait_at_the_gate_while_their_session_moves() -> None:
    async with cluster() as one:
        one.rows.may_give.clear()
        passed: list[str | int] = []

        async def call(session: str | int) -> None:
            async with one.moves.calling(session):
                assert one.moves.has_gone(session)
                passed.append(session)

        moving = asyncio.create_task(one.move())
        await until(lambda: one.turns.taken(mine("s")))
        assert not await one.homes.owns(1)
        calls = [asyncio.create_task(call(session)) for session in ("s", 1)]
        async with one.moves.calling("other"):
            await asyncio.sleep(0)
        assert passed == []
        one.rows.may_give.set()
        assert await moving
        await asyncio.gather(*calls)
        assert sorted(map(str, passed)) == ["1", "s"]


async def test_a_session_moves_also_where_its_new_home_has_fallen_silent_meanwhile() -> None:
    async with cluster() as one:
        await one.is_home("s2", 2)
        one.rows.may_give.clear()
        moving = asyncio.create_task(one.move())
        await until(lambda: one.turns.taken(mine("s")))
        one.told = dict.fromkeys(ROOM, None)
        one.moves._asked_at -= 60
        assert not await one.move(name="s2")
        one.rows.may_give.set()
        assert await moving
        assert one.moves.has_gone("s")


async def test_where_it_is_not_known_whether_it_moved_its_home_is_looked_up() -> None:
    async with cluster() as one:
        one.rows.problem = Unavailable("the database is away")
        assert not await one.move()
        assert not one.homes.is_here("s")
        assert one.moves.count == 0


def with_packages(host: str) -> dict[str, JsonObject | None]:
    return {**ROOM, host: {**ROOM[host], "packages": ["p"]}}


async def test_a_session_without_a_home_goes_where_its_packages_are() -> None:
    async with cluster(places=8) as one:
        one.told = with_packages("a")
        await one.arrives(packages="p")
        assert await one.move()
        assert one.rows.given == [(1, "a")]


async def test_a_session_that_has_all_it_needs_here_stays_and_asks_nobody() -> None:
    async with cluster(places=8) as one:
        one.told = with_packages("a")
        for packages in (None, "q"):
            one.installed.here = {"q"}
            await one.arrives(packages=packages)
            assert not await one.move()
        await one.is_home()  # one that was here before, wherever its packages are
        one.packages = "p"
        assert not await one.move()
        assert one.asked == []


async def test_where_packages_are_there_must_be_room() -> None:
    async with cluster(places=8) as one:
        one.told = with_packages("c") | {"c": {"sandboxes": 0, "live": 9, "packages": ["p"]}}
        await one.arrives(packages="p")
        assert not await one.move()


async def test_a_full_host_sends_a_session_where_its_packages_are_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("era.core.cluster.moves._KNOWN_SECONDS", 3600.0)
    async with cluster() as one:
        one.told = with_packages("a")
        one.packages = "p"
        assert await one.move()
        await one.is_home("s2", 2)
        assert await one.move(name="s2")
        assert one.rows.given == [(1, "a"), (2, "b")], "a has no room any more"


async def test_a_session_without_a_home_leaves_the_last_quarter_to_those_that_have_one() -> None:
    async with cluster(places=8) as one:
        for _ in range(6):
            await one.sandboxes.places.take("me")
        await one.arrives()
        assert not await one.move()
        await one.sandboxes.places.take("me")
        await one.is_home()
        assert not await one.move(), "it was here before"
        await one.arrives()
        assert await one.move()
        assert one.rows.given == [(1, "b")]


async def test_room_for_others_ends_at_three_quarters() -> None:
    async with cluster(places=8) as one:
        told = {"packages": [], "prepared": False}
        assert await one.moves.room_for_others() == {"sandboxes": 6, "live": 2, **told}
        for _ in range(7):
            await one.sandboxes.places.take("me")
        one.live.number = 4
        assert await one.moves.room_for_others() == {"sandboxes": 0, "live": 0, **told}


@pytest.mark.parametrize("why", ["database", "stopping"])
async def test_a_host_that_is_not_ready_has_no_room_for_others(why: str) -> None:
    async with cluster(places=8) as one:
        if why == "database":
            one.rows.problem = Unavailable("the database is away")
            with pytest.raises(Unready):
                await one.readiness.check()
        else:
            assert (await one.moves.room_for_others())["sandboxes"] == 6
            one.readiness.stop()
        assert await one.moves.room_for_others() == {"sandboxes": 0, "live": 0}


NEW = replace(SESSION, setup='{"pip": ["six"]}', setup_status="pending")


async def test_a_new_session_is_set_up_where_the_same_has_been_done() -> None:
    async with cluster(places=8) as one:
        one.rows.own = Host(one.homes.host_id, "")
        one.rows.place = Place(1, None)
        one.told = {**ROOM, "a": {**ROOM["a"], "prepared": ["six"]}}
        await one.moves.place(NEW)
        assert (one.rows.given, one.kicked) == ([(1, "a")], ["a"])
        assert one.moves.has_gone("s")


async def has_done_it(one: Cluster) -> None:
    one.installed.here = {"six"}


async def is_another_request(one: Cluster) -> None:
    one.told["a"] = {**ROOM["a"], "prepared": ["seven"]}


async def has_no_room(one: Cluster) -> None:
    one.told["a"] = {"sandboxes": 0, "live": 9, "prepared": ["six"]}


async def was_taken(one: Cluster) -> None:
    one.rows.own = one.rows.others["c"]


async def was_taken_up_meanwhile(one: Cluster) -> None:
    one.works.add(1)


@pytest.mark.parametrize("why", [has_done_it, is_another_request, has_no_room, was_taken, was_taken_up_meanwhile])
async def test_a_new_session_is_set_up_where_it_was_made(why: Callable[[Cluster], Any]) -> None:
    async with cluster(places=8) as one:
        one.rows.own = Host(one.homes.host_id, "")
        one.rows.place = Place(1, None)
        one.told = {**ROOM, "a": {**ROOM["a"], "prepared": ["six"]}}
        await why(one)
        await one.moves.place(NEW)
        assert (one.rows.given, one.kicked) == ([], [])


async def test_a_new_session_is_not_set_up_where_little_room_is_left() -> None:
    async with cluster(places=8) as one:
        one.rows.own = Host(one.homes.host_id, "")
        one.rows.place = Place(1, None)
        one.installed.here = {"six"}
        for _ in range(7):
            await one.sandboxes.places.take("me")
        await one.moves.place(NEW)
        assert one.rows.given == [(1, "b")]


async def test_calls_about_a_new_session_wait_until_it_has_its_place() -> None:
    async with cluster(places=8) as one:
        one.rows.own = Host(one.homes.host_id, "")
        one.rows.place = Place(1, None)
        one.told = {**ROOM, "a": {**ROOM["a"], "prepared": ["six"]}}
        one.rows.may_give.clear()
        placing = asyncio.create_task(one.moves.place(NEW))
        await until(lambda: one.turns.taken(mine("s")))
        called = asyncio.create_task(one.move())
        await asyncio.sleep(0.05)
        assert not called.done()
        one.rows.may_give.set()
        await placing
        assert not await called
        assert one.rows.given == [(1, "a")]


async def test_a_host_reports_no_room_while_its_disk_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so at once, whatever it is writing: others ask, who don't wait for long."""
    monkeypatch.setattr("era.core.operation.readiness._VALID_SECONDS", 0.0)
    monkeypatch.setattr("era.core.operation.readiness._ANSWER_SECONDS", 0.1)
    async with cluster(places=8) as one:
        may_end = asyncio.Event()
        monkeypatch.setattr(one.readiness, "_write_to_store", may_end.wait)
        assert (await one.moves.room_for_others())["sandboxes"] == 6
        with pytest.raises(Unready, match="too long"):
            await one.readiness.check()
        assert (await one.moves.room_for_others())["sandboxes"] == 0
        may_end.set()
        await one.readiness.check()
        assert (await one.moves.room_for_others())["sandboxes"] == 6
