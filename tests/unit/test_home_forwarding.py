"""Calls that one host of a cluster passes on to another: how long they wait for it, and what they tell it."""

from __future__ import annotations

import asyncio
import base64
import json
import selectors
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, cast

import h11
import pytest
from pydantic import SecretStr
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from era.api.guard import Guard, LargeBodies, Room
from era.api.hosts import home_forwarding
from era.api.hosts.home_forwarding import HomeForwarding
from era.api.hosts.hop import HEADER, Hop, Hops
from era.api.hosts.other_hosts import Connection, HostConnections, HungUp, OtherHosts
from era.api.protocol.addresses import base_url, served_port
from era.core.cluster.homes import Home, Homes, Host, Place
from era.core.cluster.moves import Moves
from era.core.concurrency.fair_limiter import FairLimiter
from era.core.concurrency.turns import Turns
from era.core.live.live_sessions import LiveSessions
from era.core.owners.api_keys import Caller
from era.core.pool.pool import SandboxPool
from era.errors import Forbidden, HomeLost, HomeUnreachable, Unavailable
from era.settings import Settings
from tests.owners import mine
from tests.unit.test_homes import Rows
from tests.unit.test_moves import Cluster, Installed, Live, Sandboxes, cluster

SILENT = Host("silent", "")
SETTINGS = Settings(api_key=SecretStr("k"), host="0.0.0.0")


class Waits(selectors.DefaultSelector):
    """A selector that doesn't wait, but says for how long it would have."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout:
            self.seconds += timeout
        return ready


class QuickLoop(asyncio.SelectorEventLoop):
    """An event loop for which waiting takes no time."""

    def __init__(self) -> None:
        self.waits = Waits()
        super().__init__(self.waits)

    def time(self) -> float:
        return super().time() + self.waits.seconds


def scope(host: str = "localhost:8000", **fields: Any) -> Scope:
    return {
        "type": "http",
        "method": "POST",
        "scheme": "http",
        "path": "/api/sessions/a/run",
        "raw_path": b"/api/sessions/a/run",
        "query_string": b"",
        "headers": [(b"host", host.encode())],
        "server": ("192.168.7.5", 8787),
        "client": ("192.168.7.9", 40000),
        "state": {"request_id": "req_1"},
        **fields,
    }


async def nothing(*_: Any) -> Any: ...


async def sent(message: Any) -> None: ...


async def waited(rows: Rows, lease_seconds: float, drain_seconds: float, comes_after: float | None) -> float:
    """How long a call waits that is passed on to a host that answers nobody. `comes_after` so many seconds the session
    is at home at the host that was called. Raises HomeUnreachable."""
    rows.place = Place(1, Home(SILENT, 1))
    rows.others = {SILENT.id: SILENT}
    homes = Homes(rows, lease_seconds, lambda: None)
    await homes.start()
    loop = asyncio.get_running_loop()
    answered: list[float] = []

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        answered.append(loop.time())

    hops = Hops("secret", homes, SETTINGS)
    others = OtherHosts(homes, hops, HostConnections(hops, None))
    to_home = HomeForwarding(
        answer,
        homes=homes,
        session_of_site=lambda _: None,
        session_of_link=lambda _: None,
        drain_seconds=drain_seconds,
        other_hosts=others,
        moves=Moves(
            homes,
            others,
            Turns(),
            nothing,
            cast(SandboxPool, Sandboxes(FairLimiter(1, hint=""))),
            cast(LiveSessions, Live()),
            Installed(),
            (),
            lambda _: False,
            lambda: True,
        ),
        answers={},
    )
    began = loop.time()
    if comes_after is not None:
        here = Place(1, Home(Host(homes.host_id, ""), 2))
        loop.call_later(comes_after, setattr, rows, "place", here)
    try:
        await to_home(scope(), nothing, sent)
    except HomeUnreachable:
        answered.append(loop.time())
        if comes_after is not None:
            raise
    finally:
        await homes.leave()
    return answered[0] - began


@pytest.mark.parametrize(
    ("lease_seconds", "drain_seconds", "most"), [(5, 10, 53), (5, 100, 143), (40, 10, 63)], ids=str
)
def test_a_call_waits_for_a_host_that_ends(lease_seconds: float, drain_seconds: float, most: float) -> None:
    """As long as a host may take to end, or to be declared dead: whatever is more, and some seconds."""
    with asyncio.Runner(loop_factory=QuickLoop) as runner:
        took = runner.run(waited(Rows(), lease_seconds, drain_seconds, None))
        assert most <= took < most + 5
        took = runner.run(waited(Rows(), lease_seconds, drain_seconds, most - 5))
        assert most - 5 <= took < most


async def passed_on(**fields: Any) -> tuple[Scope, Hops]:
    """A request as another host of a cluster gets it, and that host's hops."""
    caller, home = (Homes(Rows(), 60, lambda: None) for _ in range(2))
    for homes in (caller, home):
        await homes.start()
        await homes.leave()
    reached = scope(**fields)
    header = Hops("secret", caller, SETTINGS).header(reached, home.host_id)
    arrived = scope(**fields, server=("10.0.0.8", 9000))
    arrived["headers"] = [*reached["headers"], (HEADER, header)]
    return arrived, Hops("secret", home, Settings(api_key=SecretStr("k"), host="10.0.0.8"))


@pytest.mark.parametrize(
    ("host", "told"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("192.168.7.5:8787", "http://192.168.7.5:8787"),
        ("evil.example", "http://192.168.7.5:8787"),
        ("10.0.0.8:9000", "http://192.168.7.5:8787"),
    ],
)
async def test_programs_are_told_the_address_that_was_called(host: str, told: str) -> None:
    """The host that was called decides which, so no unverified name gets there, of whichever host."""
    arrived, hops = await passed_on(host=host)
    hop = hops.received(arrived, arrived["headers"][-1][1])
    assert (hop.scheme, hop.client, hop.request_id) == ("http", ("192.168.7.9", 40000), "req_1")
    request = Request({**arrived, "state": {"hop": hop}})
    assert base_url(request, SETTINGS) == told
    assert served_port(request, SETTINGS) == 8787


async def test_what_is_said_of_a_request_is_good_for_no_other() -> None:
    arrived, hops = await passed_on()
    header = arrived["headers"][-1][1]
    hops.received(arrived, header)
    for changed in ({"method": "GET"}, {"raw_path": b"/api/sessions/b/run"}, {"headers": [(b"host", b"evil.example")]}):
        with pytest.raises(Forbidden):
            hops.received({**arrived, **changed}, header)


async def test_a_host_of_the_version_before_reads_what_this_one_says() -> None:
    """As that one does, which takes no field for missing and no caller of another length."""
    arrived, _ = await passed_on(state={"request_id": "req_1", "caller": Caller("ann", key_id="key_1")})
    content = arrived["headers"][-1][1].rpartition(b".")[0]
    said = json.loads(base64.urlsafe_b64decode(content))
    owner, is_operator, key_id, scopes = said["caller"]
    assert (owner, is_operator, key_id, set(scopes)) == ("ann", False, "key_1", {"read", "run", "write", "admin"})
    assert (said["client"], said["request_id"], said["scheme"]) == (["192.168.7.9", 40000], "req_1", "http")
    assert (said["base_url"], said["port"]) == ("http://localhost:8000", 8787)
    assert said["to"]
    assert said["at"]


async def test_what_a_host_does_not_say_gives_nobody_more_than_he_has() -> None:
    arrived, hops = await passed_on()
    said = json.loads(base64.urlsafe_b64decode(arrived["headers"][-1][1].rpartition(b".")[0]))
    for caller, known in ((None, None), ([], None), (["ann"], Caller("ann", scopes=frozenset()))):
        least = {"to": said["to"], "at": said["at"], "caller": caller}
        content = base64.urlsafe_b64encode(json.dumps(least).encode())
        hop = hops.received(arrived, content + b"." + hops._mac(arrived, content))
        assert hop.caller == known
        assert (hop.client, hop.scheme, hop.base_url, hop.port) == (None, "http", None, None)
        request = Request({**arrived, "state": {"hop": hop}})
        assert base_url(request, SETTINGS) == "http://10.0.0.8:9000"
        assert served_port(request, SETTINGS) == 9000


def forwarding_at(one: Cluster, answer: ASGIApp) -> HomeForwarding:
    """That of the host without room."""
    hops = Hops("secret", one.homes, SETTINGS)
    return HomeForwarding(
        answer,
        homes=one.homes,
        session_of_site=lambda _: None,
        session_of_link=lambda _: None,
        drain_seconds=0,
        other_hosts=OtherHosts(one.homes, hops, HostConnections(hops, None)),
        moves=one.moves,
        answers={},
    )


async def test_a_call_follows_a_session_of_which_it_is_not_known_whether_it_moved() -> None:
    """The answer to the move was lost: where the session is now is looked up, rather than taken to be as before."""
    async with cluster() as one:
        new_home = one.rows.others["b"]

        async def lost(session_key: int, host_id: str) -> bool:
            one.rows.place = Place(1, Home(new_home, 2))
            raise Unavailable("the database went away")

        one.rows.give = lost  # type: ignore[method-assign]  # committed, and not known to be
        forwarding = forwarding_at(one, nothing)
        state = {"request_id": "req_1", "caller": Caller(mine("s").owner)}
        async with one.moves.calling("s"):
            called = scope(path="/api/sessions/s/run", state=state)
            assert await forwarding._elsewhere(called, "s") == new_home


@pytest.mark.parametrize("again", [False, True])
async def test_a_call_is_passed_on_twice_at_most(again: bool) -> None:
    """So one that was has its session move no further, which it couldn't follow."""
    async with cluster() as one:
        answered: list[Scope] = []

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            answered.append(scope)

        hop = Hop(None, None, "req_1", "http", None, again, None)
        state = {"request_id": "req_1", "caller": Caller(mine("s").owner), "hop": hop}
        await forwarding_at(one, answer)(scope(path="/api/sessions/s/run", state=state), nothing, sent)
        assert one.rows.given == ([] if again else [(1, "b")])
        assert answered


def test_a_call_is_told_that_the_home_refuses_this_hosts_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    """It hangs up then, which a host does that ends, too: so it is called again, as long as that may take."""

    async def hangs_up(*_: Any) -> Any:
        raise HungUp("it hung up when it had seen this host's certificate")

    monkeypatch.setattr(HostConnections, "to", hangs_up)

    async def called() -> None:
        async with cluster() as one:
            one.homes.moved("s")
            one.rows.place = Place(1, Home(one.rows.others["b"], 2))
            await forwarding_at(one, nothing)(scope(path="/api/sessions/s/run"), nothing, sent)

    with asyncio.Runner(loop_factory=QuickLoop) as runner, pytest.raises(HomeUnreachable, match="certificate"):
        runner.run(called())


async def test_callers_of_one_host_have_a_share_of_the_loop_each() -> None:
    """A caller whose requests are dear to parse holds up no other caller of the host."""
    arrived, hops = await passed_on(state={"request_id": "req_1", "caller": Caller("ann")})
    payers: list[str] = []
    arrived["extensions"] = {"era.connection": SimpleNamespace(pays_for=payers.append)}
    guard = Guard(nothing, keys=None, names=(), idle_seconds=1, hops=hops)
    await guard(arrived, nothing, sent)
    assert payers == ["192.168.7.9"]


@pytest.mark.parametrize("problem", [None, ConnectionRefusedError(), HomeLost("it died")], ids=["", "away", "lost"])
async def test_who_answers_a_call_holds_its_body(problem: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has come as a whole isn't held twice, here and at its home; and here again if no other took it."""
    room, held = Room(LargeBodies(), ""), list[bool]()

    class Exchange:
        began = False

        def __init__(self, *_: object) -> None: ...

        async def run(self) -> None:
            held.append(not room.is_passed_on)
            if problem is not None:
                raise problem

    monkeypatch.setattr(home_forwarding, "_ToHost", Exchange)
    monkeypatch.setattr(HostConnections, "to", nothing)
    monkeypatch.setattr(HostConnections, "give_back", lambda *_: None)
    async with cluster() as one:
        called = scope(method="GET", state={"request_id": "req_1", "caller": Caller("ann"), "room": room})
        with suppress(ConnectionRefusedError):
            answered = await forwarding_at(one, nothing)._pass_on(one.rows.others["b"], called, nothing, sent)
            assert answered is (problem is None)
    assert held == [False]
    assert room.is_passed_on is (problem is None)


async def test_the_headers_of_a_request_are_passed_on_as_they_came() -> None:
    """A program sees the same, whichever host was called. Of an answer this host says the time and the id itself."""
    named = [(b"host", b"localhost"), (b"date", b"Tue, 15 Nov 1994 08:12:31 GMT"), (b"x-request-id", b"mine")]
    reached = scope(
        headers=[*named, (b"te", b"trailers"), (HEADER, b"forged")],
        extensions={"era.connection": SimpleNamespace(upgrading=False)},
    )
    ends = SimpleNamespace(), SimpleNamespace(), h11.Connection(h11.CLIENT)
    to_home = Connection(*cast(Any, ends))
    exchange = home_forwarding._ToHost(reached, nothing, sent, to_home, b"hop", Homes(Rows(), 60, lambda: None), SILENT)
    assert list(exchange.request().headers) == [*named, (HEADER, b"hop")]
    assert exchange.answer_headers(h11.Response(status_code=200, headers=named)) == named[:1]
