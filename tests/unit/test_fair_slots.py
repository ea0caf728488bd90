"""Slots that are given in turn."""

from __future__ import annotations

import asyncio
import random

from era.core.fair_slots import FairSlots


class Work:
    """Tasks that have a slot until they are told to end, in the order in which they got it."""

    def __init__(self, slots: FairSlots[str]) -> None:
        self.slots = slots
        self.begun: list[str] = []
        self.waiting: list[asyncio.Event] = []
        """Of those that have begun: what ends them."""

        self.tasks: list[asyncio.Task[None]] = []

    def add(self, holder: str) -> asyncio.Task[None]:
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
        while not all(task.done() for task in self.tasks):
            if self.waiting:
                self.waiting.pop(0).set()
            await asyncio.sleep(0.001)


async def test_a_queue_of_one_doesnt_delay_another() -> None:
    work = Work(FairSlots(2, 2))
    for holder in "aaaaaabbc":
        work.add(holder)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert work.begun == ["a", "a"]
    await work.all_done()
    assert work.begun == ["a", "a", "a", "b", "c", "a", "b", "a", "a"]


async def test_nobody_gets_more_than_his_own() -> None:
    work = Work(FairSlots(3, 2))
    for holder in "aaaa":
        work.add(holder)
    await asyncio.sleep(0.01)
    assert work.begun == ["a", "a"]
    work.add("b")
    await asyncio.sleep(0.01)
    assert work.begun == ["a", "a", "b"]
    await work.all_done()
    assert len(work.begun) == 5


async def test_whoever_gives_up_leaves_nothing_behind() -> None:
    chance = random.Random(3)
    slots: FairSlots[str] = FairSlots(2, 1)
    work = Work(slots)
    for _ in range(300):
        work.add(chance.choice("abcd"))
        if chance.random() < 0.6:
            chance.choice(work.tasks).cancel()
        if work.waiting and chance.random() < 0.5:
            work.waiting.pop(0).set()
        if chance.random() < 0.5:
            await asyncio.sleep(0)
    await work.all_done()
    assert (slots._free, slots._held, slots._queues) == (2, {}, {})
