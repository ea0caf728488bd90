"""core.Admission: how many runs work at a time, and which of them give their slot to the next."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Hashable
from pathlib import Path
from typing import cast

import pytest

from era.core.concurrency.fair_limiter import Release
from era.core.execution.run_messages import ExecuteRequest
from era.core.pool import admission as admissions
from era.core.pool.admission import Admission, Slot
from era.core.ports import Sandbox
from tests.owners import mine
from tests.unit.core import URL, Core, Listener, Ran, request, until

SLOTS = 2
BUSY = "print('paused')\nwhile not __import__('os').path.exists({go!r}): pass"
BRIEF = "import time\nsince = time.process_time()\nwhile time.process_time() < since + {seconds}: pass"


@pytest.fixture
async def core(directory: Path, template: Path) -> AsyncIterator[Core]:
    """With the slots of one processor."""
    async with Core.opened(directory, template, processors=1, max_warm=20) as core:
        yield core


async def begun(core: Core, codes: list[str]) -> list[Listener]:
    """Runs of so many sessions that have said that they are `paused`."""
    listeners = []
    for number, code in enumerate(codes):
        await core.session(f"s{number}", default_timeout=120)
        listeners.append(Listener(core.runs.stream(mine(f"s{number}"), request(code))))
    for listener in listeners:
        await listener.wait_for_output("paused")
    return listeners


@pytest.mark.parametrize("kind", ["waits", "works for long"])
async def test_runs_give_way(core: Core, kind: str) -> None:
    """More runs that go on for ever than there are slots, and one more that answers meanwhile."""
    waits, go = core.paused()
    code = waits if kind == "waits" else BUSY.format(go=str(go))
    listeners = await begun(core, [code] * (SLOTS + 1))
    await core.session("other")
    assert (await core.run("print('meanwhile')", "other")).stdout == b"meanwhile\n"
    go.touch()
    assert {result.status for result in await asyncio.gather(*(listener.task for listener in listeners))} == {"ok"}


async def test_runs_that_did_not_give_way_would_keep_all_others_from_beginning(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above finds what it is for."""
    monkeypatch.setattr(Slot, "_look", lambda self: None)
    waits, go = core.paused()
    listeners = await begun(core, [waits] * SLOTS)
    await core.session("other")
    other = asyncio.create_task(core.run("print('meanwhile')", "other"))
    await asyncio.sleep(1)
    assert not other.done()
    assert await core.records("other") == [], "who waits for a slot is not on record"
    go.touch()
    assert (await other).stdout == b"meanwhile\n"
    await asyncio.gather(*(listener.task for listener in listeners))


async def test_no_more_work_at_a_time_than_there_are_slots(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    now, most = 0, 0
    acquire = core.admission.places.take

    async def take(owner: str, session: Hashable = "") -> Release:
        nonlocal now, most
        release = await acquire(owner, session)
        now += 1
        most = max(most, now)

        def give_back() -> None:
            nonlocal now
            now -= 1
            release()

        return give_back

    monkeypatch.setattr(core.admission.places, "take", take)

    async def one(number: int) -> Ran:
        await core.session(f"n{number}")
        return await core.run(BRIEF.format(seconds=0.01), f"n{number}")

    results = await asyncio.gather(*(one(number) for number in range(10)))
    assert [each.result.status for each in results] == ["ok"] * 10
    assert (now, most) == (0, SLOTS)


async def test_a_failed_run_gives_its_slot_back(core: Core) -> None:
    await core.session("s")
    core.driver.refusals = 2 * (SLOTS + 1)
    for _ in range(SLOTS + 1):
        with pytest.raises(Exception, match="no sandbox today"):
            await core.run("pass")
    assert (await core.run("print(1)")).stdout == b"1\n"


async def test_runs_outside_of_sessions_have_slots_too(core: Core) -> None:
    waits, go = core.paused()
    running = [asyncio.create_task(core.execute(waits)) for _ in range(SLOTS + 2)]
    assert (await core.execute("print('meanwhile')")).stdout == b"meanwhile\n"
    go.touch()
    await asyncio.gather(*running)


async def test_a_stream_outside_of_sessions_whose_caller_leaves_gives_its_place_in_the_queue_back(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slot, "_look", lambda self: None)
    waits, go = core.paused()
    running = [asyncio.create_task(core.execute(waits)) for _ in range(SLOTS)]
    left = ExecuteRequest("default", URL, "python", "print(1)", env={}, timeout=None, files={})
    caller = asyncio.ensure_future(anext(core.runs.execute_streamed(left)))
    await until(lambda: core.admission.places.waiting == 1)
    caller.cancel()
    await until(lambda: core.admission.places.waiting == 0)
    assert len(core.driver.made) == SLOTS, "nothing was made for it"
    go.touch()
    await asyncio.gather(*running)


class Starved:
    """A sandbox whose program gets no processor."""

    wants = True

    def cpu_seconds(self) -> float:
        return 0.0

    def wants_processor(self) -> bool:
        return self.wants


async def test_a_run_that_wants_a_processor_and_gets_none_keeps_its_slot() -> None:
    sandbox, admission = Starved(), Admission(processors=1)
    async with admission.admitted("a") as slot:
        slot.use(cast(Sandbox, sandbox))
        await asyncio.sleep(0.5)
        assert admission.places.taken == 1
        sandbox.wants = False
        await until(lambda: admission.places.taken == 0)


class Unreadable(Starved):
    """One of which nothing can be found out, while all file descriptors are taken."""

    is_unreadable, looks = True, 0

    def cpu_seconds(self) -> float:
        self.looks += 1
        if self.is_unreadable:
            raise OSError(errno.EMFILE, "Too many open files")
        return 0.0


async def test_a_run_that_can_t_be_looked_at_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admissions, "_LOOK_LATER", 0.05)
    sandbox, admission = Unreadable(), Admission(processors=1)
    sandbox.wants = False
    async with admission.admitted("a") as slot:
        slot.use(cast(Sandbox, sandbox))
        await until(lambda: sandbox.looks >= 2)
        assert admission.places.taken == 1
        sandbox.is_unreadable = False
        await until(lambda: admission.places.taken == 0)
