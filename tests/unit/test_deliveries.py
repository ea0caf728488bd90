"""The delivery engine on queues in memory: order, slots, retries, outcomes that can't be recorded, faults, the stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial

import pytest
from structlog.testing import capture_logs

from era.core.concurrency.fair_limiter import FairLimiter
from era.core.concurrency.late_ends import delay
from era.core.models import now
from era.core.owners import deliveries
from era.core.owners.deliveries import Deliveries, Record, after_failure
from era.errors import Fenced, Unavailable
from tests.unit.core import until

type Item = tuple[str, int]
"""A queue, and the number of a delivery in it."""


class Queues(Deliveries[str, Item]):
    """Queues of numbers. An attempt succeeds unless `fails` has the item, and takes until `may_end` is set."""

    def __init__(self, *, slots: int = 4, **queues: list[int]) -> None:
        super().__init__("numbers", FairLimiter(slots, of_owner=max(1, slots - 1)))
        self.queues = queues
        self.fails: set[Item] = set()
        self.record_errors: list[Exception] = []
        self.due_errors: list[Exception] = []
        self.tried: list[Item] = []
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def due(self) -> Mapping[str, str]:
        if self.due_errors:
            raise self.due_errors.pop(0)
        return {key: key[0] for key, numbers in self.queues.items() if numbers and (key, numbers[0]) not in self.fails}

    async def next_due(self, key: str) -> Item | None:
        numbers = self.queues[key]
        return (key, numbers[0]) if numbers and (key, numbers[0]) not in self.fails else None

    async def attempt(self, item: Item) -> Record:
        self.tried.append(item)
        await self.may_end.wait()
        return partial(self.record, item)

    async def record(self, item: Item) -> None:
        if self.record_errors:
            raise self.record_errors.pop(0)
        self.queues[item[0]].remove(item[1])


@asynccontextmanager
async def running(queues: Queues) -> AsyncIterator[Queues]:
    await queues.start()
    try:
        yield queues
    finally:
        await queues.stop()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliveries, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(deliveries, "_LONGEST_PAUSE", 0.01)


async def test_queue_is_worked_off_in_order_and_one_that_fails_holds_up_no_other() -> None:
    queues = Queues(a1=[1, 2, 3], b1=[1, 2])
    queues.fails = {("a1", 2)}
    async with running(queues):
        await until(lambda: queues.queues == {"a1": [2, 3], "b1": []})
        assert sorted(queues.tried) == [("a1", 1), ("b1", 1), ("b1", 2)]
        queues.fails.clear()  # its next try is due
        await until(lambda: not queues.queues["a1"])
    assert [number for key, number in queues.tried if key == "a1"] == [1, 2, 3]


async def test_one_owner_leaves_a_slot_to_others() -> None:
    queues = Queues(slots=3, a1=[1], a2=[1], a3=[1], b1=[1])
    queues.may_end.clear()
    async with running(queues):
        await until(lambda: len(queues.tried) == 3)
        assert ("b1", 1) in queues.tried
        queues.may_end.set()
        await until(lambda: not any(queues.queues.values()))


async def test_delivery_that_goes_while_its_queue_waits_for_a_slot_is_not_attempted() -> None:
    queues = Queues(slots=1, a1=[1], b1=[1])
    queues.may_end.clear()
    async with running(queues):
        await until(lambda: len(queues.tried) == 1 and queues.is_working("b1"))
        queues.queues["b1"].clear()
        queues.may_end.set()
        await until(lambda: not queues._workers)
    assert queues.tried == [("a1", 1)]


async def test_delivery_is_not_attempted_again_while_its_outcome_can_not_be_recorded() -> None:
    queues = Queues(a1=[1, 2])
    queues.record_errors = [Unavailable("the database is full")] * 3
    async with running(queues):
        await until(lambda: not queues.queues["a1"])
    assert queues.tried == [("a1", 1), ("a1", 2)]


@pytest.mark.parametrize("error", [Fenced("it moved"), ValueError("a fault")])
async def test_delivery_whose_outcome_is_lost_is_attempted_again(error: Exception) -> None:
    queues = Queues(a1=[1])
    queues.record_errors = [error]
    async with running(queues):
        await until(lambda: not queues.queues["a1"])
    assert queues.tried == [("a1", 1)] * 2


async def test_polling_goes_on_after_an_error_or_a_fault() -> None:
    queues = Queues(a1=[1])
    queues.due_errors = [Unavailable("the database is away"), ValueError("nobody has thought of this")]
    with capture_logs() as logged:
        async with running(queues):
            await until(lambda: not queues.queues["a1"])
    assert [(line["event"], line.get("where", line.get("of"))) for line in logged] == [
        ("deliveries_not_looked_at", "numbers"),
        ("bug", "numbers"),
    ]


@pytest.mark.parametrize("patience", [0.0, 60.0])
async def test_stop_waits_for_attempts_as_long_as_it_may_and_leaves_the_rest(patience: float) -> None:
    queues = Queues(a1=[1, 2])
    queues.stop_seconds = patience
    queues.may_end.clear()
    async with running(queues):
        await until(lambda: queues.tried == [("a1", 1)])
        asyncio.get_running_loop().call_later(0.05, queues.may_end.set)
    assert queues.queues["a1"] == ([2] if patience else [1, 2])
    queues.wake("a1", "a")
    assert not queues.is_working("a1")


async def test_queues_are_not_looked_for_while_stop_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    queues, looks = Queues(a1=[1]), 0

    async def looked() -> Mapping[str, str]:
        nonlocal looks
        looks += 1
        return {"a1": "a"}

    queues.stop_seconds = 60.0
    queues.may_end.clear()
    monkeypatch.setattr(queues, "due", looked)
    await queues.start()
    await until(lambda: queues.tried == [("a1", 1)])
    stopping = asyncio.create_task(queues.stop())
    await asyncio.sleep(0)
    before = looks
    await asyncio.sleep(0.05)
    assert looks == before
    queues.may_end.set()
    await stopping


def test_retry_delay_grows_fourfold_up_to_900_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("era.core.concurrency.late_ends.FIRST_DELAY", 1.0)
    assert [delay(n) for n in (1, 2, 3, 4, 5, 6, 20)] == [1, 4, 16, 64, 256, 900, 900]
    before = now()
    status, due = after_failure(2, 2)
    assert due is not None
    assert (status, due >= before + 4_000_000) == ("pending", True)
    assert after_failure(3, 2) == ("failed", None)
