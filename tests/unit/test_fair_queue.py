"""core.Places: who gets a place that comes free, who waits, and who is told that it would take too long."""

from __future__ import annotations

import asyncio

import pytest

from era.core import fair_queue
from era.core.fair_queue import FairQueue
from era.errors import TooBusy
from tests.unit.core import until


class Order:
    """Who got a place, in order."""

    def __init__(self, places: FairQueue) -> None:
        self._places = places
        self.served: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def ask(self, owner: str, name: str = "") -> None:
        """Ask for a place; this returns when it was asked for, not when it was given."""
        self.tasks.append(asyncio.create_task(self._take(owner, name or owner)))
        await asyncio.sleep(0)

    async def until(self, count: int) -> None:
        """Wait until so many have been served."""
        await until(lambda: len(self.served) == count)

    async def _take(self, owner: str, name: str) -> None:
        await self._places.take(owner)
        self.served.append(name)


@pytest.fixture
def one() -> FairQueue:
    return FairQueue(1, hint="later")


async def test_who_waits_is_served_in_order(one: FairQueue) -> None:
    order = Order(one)
    for name in "abc":
        await order.ask("me", name)
    assert (order.served, one.wanted) == (["a"], 2)
    for count in (2, 3):
        one.give_back()
        await order.until(count)
    assert (order.served, one.wanted) == (["a", "b", "c"], 0)


async def test_owners_take_turns(one: FairQueue) -> None:
    order = Order(one)
    for number in range(4):
        await order.ask("many", f"many {number}")
    await order.ask("few")
    await order.ask("other")
    for _ in range(5):
        one.give_back()
    await asyncio.gather(*order.tasks)
    assert order.served == ["many 0", "many 1", "few", "other", "many 2", "many 3"]


async def test_a_place_is_not_lost_with_its_caller(one: FairQueue) -> None:
    order = Order(one)
    for name in "abc":
        await order.ask("me", name)
    order.tasks[1].cancel()
    await asyncio.sleep(0)
    one.give_back()
    order.tasks[2].cancel()  # at the moment at which it was served
    await asyncio.gather(*order.tasks, return_exceptions=True)
    await one.take("me")
    assert (order.served, one.wanted) == (["a"], 0)


async def test_fewer_and_more_places(one: FairQueue) -> None:
    order = Order(one)
    for name in "abc":
        await order.ask("me", name)
    one.resize(3)
    await order.until(3)
    one.resize(1)
    assert one.wanted == 2
    one.give_back()
    one.give_back()
    await order.ask("me", "d")
    assert (order.served, one.wanted) == (["a", "b", "c"], 1)


async def test_who_waits_while_nothing_comes_free_is_told(one: FairQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one, "_patience", 0.2)
    await one.take("me")
    with pytest.raises(TooBusy) as refused:
        await one.take("me")
    assert refused.value.retry_after is not None
    assert refused.value.retry_after >= 1
    assert one.wanted == 0


async def test_who_waits_while_a_place_is_coming_is_told_once_none_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_queue, "_COMING_SECONDS", 0.05)
    coming = True
    one = FairQueue(1, hint="later", patience=0.1, is_coming=lambda: coming)
    await one.take("me")
    waiting = asyncio.create_task(one.take("me"))
    await asyncio.wait({waiting}, timeout=0.5)
    assert not waiting.done()
    coming = False
    with pytest.raises(TooBusy):
        await waiting


async def test_a_place_that_never_comes_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_queue, "_COMING_SECONDS", 0.05)
    monkeypatch.setattr(fair_queue, "_MOST_COMING_SECONDS", 0.3)
    one = FairQueue(1, hint="later", patience=0.1, is_coming=lambda: True)
    await one.take("me")
    with pytest.raises(TooBusy):
        await one.take("me")


async def test_who_waits_while_places_come_free_is_patient(one: FairQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one, "_patience", 6.0)
    order = Order(one)
    for _ in range(8):
        await order.ask("me")
    for count in range(1, 8):
        await asyncio.sleep(0.9)
        one.give_back()
        await order.until(count + 1)
    await asyncio.gather(*order.tasks)


async def test_who_would_wait_for_too_long_is_told_at_once(one: FairQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_queue, "_LONGEST", 2.0)
    order = Order(one)
    for _ in range(30):
        await order.ask("me")
    for _ in range(5):
        await asyncio.sleep(0.4)
        one.give_back()
    began = asyncio.get_running_loop().time()
    with pytest.raises(TooBusy) as refused:
        await one.take("me")
    assert asyncio.get_running_loop().time() - began < 0.4
    assert refused.value.retry_after is not None
    assert refused.value.retry_after >= 1
    newcomer = asyncio.create_task(one.take("other"))  # whose turn comes next
    await asyncio.sleep(0)
    one.give_back()
    async with asyncio.timeout(60):
        await newcomer
    for task in order.tasks:
        task.cancel()
