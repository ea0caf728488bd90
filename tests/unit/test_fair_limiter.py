"""FairLimiter: turns of owners and sessions, caps, cancellation, and bounded waiting."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from era.core.concurrency import fair_limiter
from era.core.concurrency.fair_limiter import FairLimiter, Release
from era.errors import TooBusy
from tests.unit.core import until


class Callers:
    """Calls that wait for a slot and keep it until `end`. A name is that of an owner and a session: "ax"."""

    def __init__(self, limiter: FairLimiter) -> None:
        self.limiter = limiter
        self.served: list[str] = []
        """The calls that got a slot, in order."""

        self.holding: list[tuple[str, Release]] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def ask(self, *names: str) -> None:
        """Ask for a slot each, in this order."""
        for name in names:
            self.tasks.append(asyncio.create_task(self._take(name)))
            await asyncio.sleep(0)

    async def _take(self, name: str) -> None:
        release = await self.limiter.take(name[0], name[1:])
        self.served.append(name)
        self.holding.append((name, release))

    async def end(self) -> None:
        """End the call that has held its slot longest, and wait until others have what comes free."""
        self.holding.pop(0)[1]()
        for _ in range(3):
            await asyncio.sleep(0)

    async def end_all(self) -> None:
        while self.holding:
            await self.end()


@asynccontextmanager
async def callers_of(limiter: FairLimiter) -> AsyncIterator[Callers]:
    callers = Callers(limiter)
    yield callers
    for task in callers.tasks:
        task.cancel()
    await asyncio.gather(*callers.tasks, return_exceptions=True)


def is_unused(limiter: FairLimiter) -> bool:
    return (limiter.taken, limiter.waiting, limiter._held, limiter._owners) == (0, 0, {}, {})


async def test_calls_of_one_session_are_served_in_order() -> None:
    async with callers_of(FairLimiter(1)) as calls:
        await calls.ask("a", "a", "a")
        assert (len(calls.served), calls.limiter.wanted, calls.limiter.counts()["waiting"]) == (1, 2, 2)
        order = [task for task in calls.tasks if not task.done()]
        for task in order:
            await calls.end()
            assert task.done()
        await calls.end()
        assert is_unused(calls.limiter)


async def test_owners_are_served_in_turn() -> None:
    async with callers_of(FairLimiter(1)) as calls:
        await calls.ask("a", "a", "a", "a", "b", "c")
        await calls.end_all()
        assert calls.served == ["a", "a", "b", "c", "a", "a"]


async def test_sessions_of_one_owner_are_served_in_turn() -> None:
    async with callers_of(FairLimiter(1)) as calls:
        await calls.ask("ax", "ax", "ax", "ay", "az", "bx", "bx")
        await calls.end_all()
        assert calls.served == ["ax", "ax", "bx", "ay", "bx", "az", "ax"]


async def test_a_newcomer_is_served_before_the_owner_served_last() -> None:
    async with callers_of(FairLimiter(1)) as calls:
        await calls.ask("a", "a", "a")
        await calls.end()
        await calls.ask("b")
        await calls.end()
        assert calls.served == ["a", "a", "b"]


async def test_a_stream_of_newcomers_doesnt_starve_an_owner() -> None:
    async with callers_of(FairLimiter(1)) as calls:
        await calls.ask("a", "a", "a", "b")
        for owner in "cdefgh":
            await calls.ask(owner)
            await calls.end()
        assert calls.served.count("a") == 3


async def test_an_owner_at_the_cap_leaves_slots_to_others() -> None:
    async with callers_of(FairLimiter(3, of_owner=2)) as calls:
        await calls.ask("ax", "ay", "az")
        assert calls.served == ["ax", "ay"]
        await calls.ask("bx")
        assert calls.served == ["ax", "ay", "bx"], "it waits for no queue of the other owner's"
        await calls.end()
        assert calls.served[3:] == ["az"]
        await calls.end_all()
        assert is_unused(calls.limiter)


async def test_a_session_at_the_cap_leaves_slots_to_the_owners_others() -> None:
    async with callers_of(FairLimiter(2, each=1)) as calls:
        await calls.ask("ax", "ax", "ax", "ay")
        assert calls.served == ["ax", "ay"]
        await calls.ask("bx", "az")
        await calls.end_all()
        assert calls.served[2:] == ["bx", "ax", "az", "ax"]
        assert is_unused(calls.limiter)


@pytest.mark.parametrize("caps", [(4, 3, 2), (3, 2, 1)])
async def test_no_cap_is_exceeded(caps: tuple[int, int, int]) -> None:
    total, of_owner, each = caps
    limiter = FairLimiter(total, of_owner=of_owner, each=each)
    held: Counter[tuple[str, str]] = Counter()
    reached = [0, 0, 0]
    chance = random.Random(5)

    async def work(owner: str, session: str) -> None:
        async with limiter.slot(owner, session):
            held[owner, session] += 1
            of_same = sum(count for (other, _), count in held.items() if other == owner)
            for n, count in enumerate((held.total(), of_same, held[owner, session])):
                reached[n] = max(reached[n], count)
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
            held[owner, session] -= 1

    await asyncio.gather(*(work(chance.choice("aaabc"), chance.choice("xy")) for _ in range(500)))
    assert tuple(reached) == caps
    assert is_unused(limiter)


@pytest.mark.parametrize("patience", [None, 60.0])
async def test_cancelled_calls_lose_no_slot(patience: float | None) -> None:
    """At random moments: while they wait, at the moment at which they are served, and after it."""
    chance = random.Random(3)
    limiter = FairLimiter(3, of_owner=2, each=1, hint="later", patience=patience)
    async with callers_of(limiter) as calls:
        for _ in range(600):
            await calls.ask(chance.choice("ab") + chance.choice("xyz"))
            if chance.random() < 0.6:
                chance.choice(calls.tasks).cancel()
            if calls.holding and chance.random() < 0.5:
                calls.holding.pop(0)[1]()
            if chance.random() < 0.5:
                await asyncio.sleep(0)
        async with asyncio.timeout(60):
            while not all(task.done() for task in calls.tasks):
                await calls.end_all()
                await asyncio.sleep(0.001)
        await calls.end_all()
        assert is_unused(limiter)


async def test_more_slots_serve_those_who_wait_and_fewer_none() -> None:
    async with callers_of(FairLimiter(1)) as calls:
        await calls.ask("a", "a", "a")
        calls.limiter.resize(3)
        await until(lambda: len(calls.served) == 3)
        calls.limiter.resize(1)
        assert calls.limiter.wanted == 2
        await calls.end()
        await calls.end()
        await calls.ask("a")
        assert (len(calls.served), calls.limiter.wanted) == (3, 1)


async def test_refused_when_no_slot_comes_free() -> None:
    limiter = FairLimiter(1, hint="later", patience=0.2)
    await limiter.take("a")
    with pytest.raises(TooBusy) as refused:
        await limiter.take("a")
    assert (refused.value.retry_after or 0) >= 1
    assert limiter.wanted == 0


async def test_refused_only_once_no_slot_is_being_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_limiter, "_COMING_SECONDS", 0.05)
    coming = True
    limiter = FairLimiter(1, hint="later", patience=0.1, is_coming=lambda: coming)
    await limiter.take("a")
    waiting = asyncio.create_task(limiter.take("a"))
    await asyncio.wait({waiting}, timeout=0.5)
    assert not waiting.done()
    coming = False
    with pytest.raises(TooBusy):
        await waiting


async def test_refused_when_clearing_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_limiter, "_COMING_SECONDS", 0.05)
    monkeypatch.setattr(fair_limiter, "_MOST_COMING_SECONDS", 0.3)
    limiter = FairLimiter(1, hint="later", patience=0.1, is_coming=lambda: True)
    await limiter.take("a")
    with pytest.raises(TooBusy):
        await limiter.take("a")


async def test_not_refused_while_slots_come_free() -> None:
    async with callers_of(FairLimiter(1, hint="later", patience=2.0)) as calls:
        await calls.ask(*["a"] * 8)
        for count in range(1, 8):
            await asyncio.sleep(0.3)
            await calls.end()
            assert len(calls.served) == count + 1
        await asyncio.gather(*calls.tasks)


async def test_refused_at_once_when_the_wait_would_be_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_limiter, "_LONGEST", 0.5)
    async with callers_of(FairLimiter(1, hint="later")) as calls:
        await calls.ask(*["a"] * 30)
        for _ in range(5):
            await asyncio.sleep(0.1)
            await calls.end()
        began = asyncio.get_running_loop().time()
        with pytest.raises(TooBusy) as refused:
            await calls.limiter.take("a")
        assert asyncio.get_running_loop().time() - began < 0.4
        assert (refused.value.retry_after or 0) >= 1
        await calls.ask("b")  # whose turn comes next
        await calls.end()
        assert calls.served[-1] == "b"


async def test_without_a_hint_nobody_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_limiter, "_LONGEST", 0.0)
    async with callers_of(FairLimiter(1)) as calls:
        await calls.ask("a", "a")
        await asyncio.sleep(0.01)
        await calls.ask("a")
        await calls.end_all()
        assert len(calls.served) == 3
