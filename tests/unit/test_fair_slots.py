"""Slots that are given in turn."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence

import pytest

from era.core.fair_slots import FairSlots, OwnersSlots, WaitedSlots


class Work[Holder]:
    """Tasks that have a slot until they are told to end, in the order in which they got it."""

    def __init__(self, slots: WaitedSlots[Holder]) -> None:
        self.slots = slots
        self.begun: list[Holder] = []
        self.waiting: list[asyncio.Event] = []
        """Of those that have begun: what ends them."""

        self.tasks: list[asyncio.Task[None]] = []

    def add(self, holder: Holder) -> asyncio.Task[None]:
        async def run() -> None:
            async with self.slots.slot(holder):
                self.begun.append(holder)
                end = asyncio.Event()
                self.waiting.append(end)
                await end.wait()

        task = asyncio.create_task(run())
        self.tasks.append(task)
        return task

    async def all_done(self) -> None:
        async with asyncio.timeout(60):
            while not all(task.done() for task in self.tasks):
                if self.waiting:
                    self.waiting.pop(0).set()
                await asyncio.sleep(0.001)


async def test_a_queue_of_one_doesnt_delay_another() -> None:
    work: Work[str] = Work(FairSlots(2, 2))
    for holder in "aaaaaabbc":
        work.add(holder)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert work.begun == ["a", "a"]
    await work.all_done()
    assert work.begun == ["a", "a", "a", "b", "c", "a", "b", "a", "a"]


async def test_nobody_gets_more_than_his_own() -> None:
    work: Work[str] = Work(FairSlots(3, 2))
    for holder in "aaaa":
        work.add(holder)
    await asyncio.sleep(0.01)
    assert work.begun == ["a", "a"]
    work.add("b")
    await asyncio.sleep(0.01)
    assert work.begun == ["a", "a", "b"]
    await work.all_done()
    assert len(work.begun) == 5


async def come_and_go[Holder](slots: WaitedSlots[Holder], holders: Sequence[Holder]) -> None:
    """Have slots asked for, given back and given up at random, to the end."""
    chance = random.Random(3)
    work = Work(slots)
    for _ in range(300):
        work.add(chance.choice(holders))
        if chance.random() < 0.6:
            chance.choice(work.tasks).cancel()
        if work.waiting and chance.random() < 0.5:
            work.waiting.pop(0).set()
        if chance.random() < 0.5:
            await asyncio.sleep(0)
    await work.all_done()


async def test_whoever_gives_up_leaves_nothing_behind() -> None:
    slots: FairSlots[str] = FairSlots(2, 1)
    await come_and_go(slots, "abcd")
    assert (slots._free, slots._held, slots._queues) == (2, {}, {})
    assert slots.is_idle


async def test_an_owner_who_gives_up_leaves_nothing_behind() -> None:
    slots: OwnersSlots[str] = OwnersSlots(3, 2, 1)
    await come_and_go(slots, [(owner, session) for owner in "ab" for session in "xyz"])
    assert slots._owners.is_idle
    assert slots._owners._free == 3
    assert slots._shares == {}


async def test_owners_have_their_turn_and_so_have_those_of_one() -> None:
    work = Work(OwnersSlots[str](2, 2, 1))
    for owner, sessions in ("a", "xxxyz"), ("b", "xx"):
        for session in sessions:
            work.add((owner, session))
    await asyncio.sleep(0.01)
    assert work.begun == [("a", "x"), ("a", "y")]
    await work.all_done()
    assert work.begun[2] == ("b", "x"), "b waits for no queue of a's"
    assert [session for owner, session in work.begun if owner == "a"] == ["x", "y", "x", "z", "x"]
    assert sorted(work.begun) == [("a", "x")] * 3 + [("a", "y"), ("a", "z")] + [("b", "x")] * 2


@pytest.mark.parametrize("most", [(4, 4, 2), (3, 2, 1)])
async def test_no_bound_is_exceeded_however_they_come_and_go(most: tuple[int, int, int]) -> None:
    slots: OwnersSlots[str] = OwnersSlots(*most)
    held: Counter[tuple[str, str]] = Counter()
    reached = [0, 0, 0]
    chance = random.Random(5)

    async def work(holder: tuple[str, str]) -> None:
        async with slots.slot(holder):
            held[holder] += 1
            of_owner = sum(count for (owner, _), count in held.items() if owner == holder[0])
            for n, count in enumerate((held.total(), of_owner, held[holder])):
                reached[n] = max(reached[n], count)
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
            held[holder] -= 1

    await asyncio.gather(*(work((chance.choice("abc"), chance.choice("xy"))) for _ in range(500)))
    assert tuple(reached) == most
    assert slots._shares == {}
