"""Cost is charged to who is behind it, and who owes waits at marked points."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import Counter

import pytest
import uvloop

from era.core.concurrency import meter
from era.core.concurrency.meter import account, charged, current, known_account, turn
from tests.unit.core import until

LOOPS = pytest.mark.parametrize("loops", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])


def work(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


async def at_the_cost_of(payer: meter.Account, steps: int, seconds: float, done: Counter[str]) -> None:
    current.set(payer)
    for _ in range(steps):
        await turn()
        work(seconds)
        done[f"{payer.owner}/{payer.session}"] += 1


@LOOPS
def test_steps_are_charged_to_the_account_of_their_task(loops: object) -> None:
    async def main() -> None:
        meter.install()
        ann, bob = account("ann", "s"), account("bob", "s")
        assert account("ann", "s") is ann

        async def child() -> None:
            work(0.02)

        async def parent() -> None:
            current.set(ann)
            await asyncio.create_task(child())

        await asyncio.create_task(parent())
        assert 0.02 <= ann.debt < 0.04
        assert bob.debt == 0

    asyncio.run(main(), loop_factory=loops)  # type: ignore[arg-type]  # loops is a test parameter


async def test_callbacks_and_the_tasks_that_they_make_are_charged() -> None:
    meter.install()
    payer, tasks = account("ann"), list[asyncio.Task[None]]()

    async def task() -> None:
        work(0.01)

    def callback() -> None:
        work(0.01)
        tasks.append(asyncio.get_running_loop().create_task(task()))

    asyncio.get_running_loop().call_soon(charged, payer, callback)
    await asyncio.sleep(0)
    await tasks[0]
    assert 0.02 <= payer.debt < 0.04


@LOOPS
def test_many_tasks_of_one_account_get_no_more_than_one_of_another(loops: object) -> None:
    async def main() -> Counter[str]:
        meter.install()
        done, greedy, other = Counter[str](), account("ann"), account("bob")
        many = [asyncio.create_task(at_the_cost_of(greedy, 1000, 0.002, done)) for _ in range(20)]
        await asyncio.sleep(0.05)
        before = done.copy()
        await asyncio.create_task(at_the_cost_of(other, 20, 0.002, done))
        for task in many:
            task.cancel()
        return done - before

    done = asyncio.run(main(), loop_factory=loops)  # type: ignore[arg-type]  # loops is a test parameter
    assert done["ann/"] <= 1.5 * done["bob/"]


async def test_sessions_of_one_owner_have_turns_of_one_owner() -> None:
    meter.install()
    done = Counter[str]()
    payers = [account("ann", f"s{number}") for number in range(5)] + [account("bob", "s")]
    tasks = [asyncio.create_task(at_the_cost_of(payer, 1000, 0.002, done)) for payer in payers]
    await asyncio.sleep(0.02)  # until all owe
    done.clear()
    await until(lambda: done["bob/s"] >= 50)
    for task in tasks:
        task.cancel()
    assert sum(done[f"ann/s{number}"] for number in range(5)) < 2 * done["bob/s"]


async def test_who_owes_nothing_goes_on_at_once_beside_who_does() -> None:
    meter.install()
    done = Counter[str]()
    busy = asyncio.create_task(at_the_cost_of(account("ann"), 1000, 0.002, done))
    await asyncio.sleep(0.02)

    async def light() -> int:
        current.set(account("bob"))
        before = done.total()
        for _ in range(10):
            await turn()
        return done.total() - before

    assert await asyncio.create_task(light()) == 0
    busy.cancel()


async def test_a_burst_begins_a_few_at_a_time_whoever_they_are_of() -> None:
    meter.install()
    begun = 0

    async def request(number: int) -> None:
        nonlocal begun
        current.set(account("ann", number))
        await turn(begins=True)
        work(0.0005)
        begun += 1

    requests = [asyncio.create_task(request(number)) for number in range(100)]
    most = before = 0
    while begun < 100:
        await asyncio.sleep(0)
        most, before = max(most, begun - before), begun
    await asyncio.gather(*requests)
    assert most <= 6


async def test_debt_is_paid_as_time_passes() -> None:
    meter.install()
    payer = account("ann")
    payer.debt = 0.02

    async def owes() -> bool:
        current.set(payer)
        return meter.owes()

    assert await asyncio.create_task(owes())
    await asyncio.sleep(0.1)
    assert not await asyncio.create_task(owes())


async def test_who_gives_up_while_paying_is_in_nobody_s_way() -> None:
    meter.install()
    payer = account("ann")
    payer.debt = 1000.0

    async def pay() -> None:
        current.set(payer)
        await turn()

    tasks = [asyncio.create_task(pay()) for _ in range(3)]
    await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    payer.debt = 0.0
    async with asyncio.timeout(5):
        await asyncio.create_task(pay())


async def test_made_up_names_of_sessions_have_their_owner_s_account() -> None:
    meter.install()
    assert known_account("ann", "made up") is account("ann")
    real = account("ann", "real")
    assert known_account("ann", "real") is real


async def test_failures_and_cancellation_pass_unchanged() -> None:
    meter.install()

    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError("a mistake")

    async def wait() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "cleaned up"
        return ""

    with pytest.raises(ValueError, match="a mistake"):
        await asyncio.create_task(fail())
    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    assert inspect.getcoroutinestate(waiting.get_coro()) == inspect.CORO_SUSPENDED  # type: ignore[arg-type]  # a wrapper
    assert [frame.f_code.co_name for frame in waiting.get_stack()] == ["wait"]
    waiting.cancel()
    assert await waiting == "cleaned up"
