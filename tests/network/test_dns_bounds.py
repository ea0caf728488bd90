"""How much runs' nameservers ask for, of the machine's own."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest

from era.core.allowlist import allowlist
from era.core.concurrency.shares import Shares
from era.network import dns
from era.network.descriptors import RunDescriptors
from tests.network import world
from tests.network.test_messages import query


class Nameserver:
    """The machine's, which takes a moment, or for ever if it is `silent`."""

    def __init__(self, patch: pytest.MonkeyPatch, *, silent: bool = False) -> None:
        self.asked = self.now = self.most = 0
        self.names: list[str] = []
        self._silent = silent
        patch.setattr(dns, "_ask_udp", self.ask)
        patch.setattr(dns, "_ask_tcp", self.ask)

    async def ask(self, _: object, message: bytes) -> bytes:
        self.asked += 1
        self.names.append(dns._question(message)[0])
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await (asyncio.Event().wait() if self._silent else asyncio.sleep(0.001))
        finally:
            self.now -= 1
        return world.resolved(message)


def names(
    descriptors: int = 10_000, lookups: dns.Lookups | None = None, owner: str = "me", sandbox: str = "a"
) -> dns.Names:
    turn = partial((lookups or dns.Lookups()).turn, owner, sandbox)
    return dns.Names(allowlist([]), lambda _: None, RunDescriptors(Shares(descriptors), owner), turn)


@asynccontextmanager
async def asking(*questions: tuple[dns.Names, list[str]]) -> AsyncIterator[None]:
    """These names are asked for within the block, all of them at once."""
    lookups = [
        asyncio.create_task(one._resolve(query(name), stream=False)) for one, wanted in questions for name in wanted
    ]
    try:
        yield
    finally:
        for lookup in lookups:
            lookup.cancel()
        await asyncio.gather(*lookups, return_exceptions=True)


async def comes_to_rest(nameserver: Nameserver) -> int:
    """How many questions it has got, once no more come."""
    asked = -1
    while asked != nameserver.asked:
        asked = nameserver.asked
        await asyncio.sleep(0.1)
    return asked


def few_lookups(patch: pytest.MonkeyPatch, all_: int, of_owner: int, turn_seconds: float = 0) -> dns.Lookups:
    for name, value in (("_ALL_LOOKUPS", all_), ("_OWNER_LOOKUPS", of_owner), ("_TURN_SECONDS", turn_seconds)):
        patch.setattr(dns, name, value)
    return dns.Lookups()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("bounded", [True, False])
async def test_so_many_a_second(monkeypatch: pytest.MonkeyPatch, *, bounded: bool, stream: bool) -> None:
    nameserver, one = Nameserver(monkeypatch), names()
    monkeypatch.setattr(dns, "_PER_SECOND", 10)
    if not bounded:
        monkeypatch.setattr(one, "_slots", asyncio.Semaphore(10_000))
        monkeypatch.setattr(one._pace, "step", lambda: asyncio.sleep(0))
    begun = time.monotonic()
    lookups = [asyncio.create_task(one._resolve(query("a.test"), stream=stream)) for _ in range(500)]
    await asyncio.sleep(0.5)
    assert (nameserver.asked <= 10 * (1 + time.monotonic() - begun) + 1) == bounded
    assert (nameserver.most <= dns._MAX_LOOKUPS) == bounded
    for lookup in lookups:
        lookup.cancel()
    await asyncio.gather(*lookups, return_exceptions=True)
    assert one._descriptors._held == 0


async def test_what_comes_at_once_is_answered_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    nameserver, one = Nameserver(monkeypatch), names()
    inside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    inside.bind(("127.0.0.1", 0))
    ended: list[bool] = []
    close = one.serve_datagrams(inside, lambda: ended.append(True))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as program:
        program.connect(inside.getsockname())
        for number in range(90):
            program.send(query(f"n{number}.test"))
        answers = {await asyncio.wait_for(asyncio.get_running_loop().sock_recv(program, 4096), 10) for _ in range(90)}
    assert len(answers) == 90
    assert nameserver.most <= dns._MAX_LOOKUPS
    close()
    assert ended == [True]


async def test_without_descriptors_the_answer_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    nameserver = Nameserver(monkeypatch)
    answer = await names(0)._resolve(query("a.test"), stream=False)
    assert (nameserver.asked, answer[3] & 15) == (0, 2)


GREEDY = [f"n{number}.test" for number in range(100)]


@pytest.mark.parametrize("bounded", [True, False], ids=["", "weakened"])
async def test_so_many_of_an_owner_and_of_all(monkeypatch: pytest.MonkeyPatch, *, bounded: bool) -> None:
    """Whoever has many runs asks no more, and others find turns that are free."""
    nameserver = Nameserver(monkeypatch, silent=True)
    lookups = few_lookups(monkeypatch, *((24, 12) if bounded else (1 << 20, 1 << 20)), turn_seconds=600)
    runs = [names(lookups=lookups, owner="greedy", sandbox=sandbox) for sandbox in "abcd"]
    async with asking(*((run, GREEDY) for run in runs)):
        assert await comes_to_rest(nameserver) == (12 if bounded else 4 * dns._MAX_LOOKUPS)
        async with asking((names(lookups=lookups), ["mine.test"])):
            await comes_to_rest(nameserver)
            assert nameserver.names[-1] == "mine.test"
        more = [names(lookups=lookups, owner="another"), names(lookups=lookups, owner="a third")]
        async with asking(*((run, GREEDY) for run in more)):
            assert await comes_to_rest(nameserver) == (24 if bounded else 6 * dns._MAX_LOOKUPS + 1)


@pytest.mark.parametrize("bounded", [True, False], ids=["", "weakened"])
async def test_names_that_nobody_answers_leave_turns_to_others(
    monkeypatch: pytest.MonkeyPatch, *, bounded: bool
) -> None:
    """Two owners take all turns with lookups that never end, but each has its turn for a moment only."""
    nameserver = Nameserver(monkeypatch, silent=True)
    lookups = few_lookups(monkeypatch, 24, 12, turn_seconds=0.01 if bounded else 600)  # as long as the lookup
    greedy = [names(lookups=lookups, owner=owner, sandbox=sandbox) for owner in ("a", "b") for sandbox in "cde"]
    async with asking(*((run, GREEDY) for run in greedy), (names(lookups=lookups), ["mine.test"])):
        asked = await comes_to_rest(nameserver)
        assert ("mine.test" in nameserver.names) == bounded, asked
        # Of each run no more than may be under way, however many turns there are.
        assert asked == (6 * dns._MAX_LOOKUPS + 1 if bounded else 24)


@pytest.mark.parametrize("bounded", [True, False], ids=["", "weakened"])
async def test_an_answered_lookup_counts_for_a_while(monkeypatch: pytest.MonkeyPatch, *, bounded: bool) -> None:
    """A nameserver that answers at once isn't asked more often than it may be."""
    nameserver = Nameserver(monkeypatch)
    lookups = few_lookups(monkeypatch, 24, 12, turn_seconds=600 if bounded else 0)
    runs = [names(lookups=lookups, owner="greedy", sandbox=sandbox) for sandbox in "ab"]
    async with asking(*((run, GREEDY[:40]) for run in runs)):
        assert await comes_to_rest(nameserver) == (12 if bounded else 80)
        assert await names(lookups=lookups)._resolve(query("mine.test"), stream=False)
    monkeypatch.setattr(dns, "_TURN_SECONDS", 0.01)
    lookups = dns.Lookups()
    async with asking(*((names(lookups=lookups, sandbox=sandbox), GREEDY[:40]) for sandbox in "ab")):
        nameserver.asked = 0
        assert await comes_to_rest(nameserver) == 80, "all of them have their turn"


@pytest.mark.parametrize("fair", [True, False], ids=["", "weakened"])
@pytest.mark.parametrize("of_one_owner", [True, False])
async def test_lookups_have_their_turn_between_those_who_ask(
    monkeypatch: pytest.MonkeyPatch, *, fair: bool, of_one_owner: bool
) -> None:
    nameserver = Nameserver(monkeypatch)
    lookups = few_lookups(monkeypatch, 4, 4)
    if not fair:
        turn = lookups.turn
        monkeypatch.setattr(lookups, "turn", lambda *_: turn("", ""))
    greedy = [names(lookups=lookups, owner="greedy", sandbox=sandbox) for sandbox in "ab"]
    late = names(lookups=lookups, owner="greedy" if of_one_owner else "me", sandbox="late")
    async with asking(*((one, GREEDY[:32]) for one in greedy), (late, ["late.test"])):
        await comes_to_rest(nameserver)
    assert len(nameserver.names) == 65
    assert (nameserver.names.index("late.test") < 12) == fair
