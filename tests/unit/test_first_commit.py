"""The record that a run has begun waits for the disk only where somebody may hear of the run before it has ended."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from era.errors import Unavailable
from tests.owners import mine
from tests.unit.core import Core, Listener, request, until


@pytest.fixture
def durably(core: Core, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each record of a run that began, whether it was made durable."""
    kept: list[bool] = []
    begin_run = core.store.begin_run

    async def noted(*args: Any, durably: bool = True, **more: Any) -> Any:
        kept.append(durably)
        return await begin_run(*args, durably=durably, **more)

    monkeypatch.setattr(core.store, "begin_run", noted)
    return kept


async def test_a_run_that_is_answered_at_its_end(core: Core, durably: list[bool]) -> None:
    await core.session()
    await core.run("pass")
    await core.run("pass", claim=core.claim("key"))
    assert durably == [False, True]


async def test_a_run_that_is_streamed_or_in_the_background(core: Core, durably: list[bool]) -> None:
    await core.session()
    await Listener(core.runs.stream(mine("s"), request("pass"))).task
    await core.runs.begin(mine("s"), request("pass", background=True))
    await core.runs.drain(10)
    await core.runs.start(mine("s"), request("pass"))
    await core.runs.drain(10)
    assert durably == [True, True, True]


@pytest.fixture
async def committing(core: Core, monkeypatch: pytest.MonkeyPatch) -> asyncio.Future[None]:
    """What the commits of records of runs that begin wait for."""
    may_end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    begin_run = core.store.begin_run

    async def slow(*args: Any, **more: Any) -> Any:
        session = await begin_run(*args, **more)
        await may_end
        return session

    monkeypatch.setattr(core.store, "begin_run", slow)
    return may_end


async def test_no_program_begins_before_its_record_is_kept(core: Core, committing: asyncio.Future[None]) -> None:
    await core.session()
    begun = core.directory / "begun"
    listener = Listener(core.runs.stream(mine("s"), request(f"open({str(begun)!r}, 'w')", claim=core.claim("key"))))
    await until(lambda: [path for made in core.driver.made for path in made.workspace.iterdir()])
    assert not listener.events
    assert not begun.exists()
    committing.set_result(None)
    assert (await listener.task).status == "ok"
    assert begun.exists()


async def test_a_program_whose_record_could_not_be_kept_never_begins(
    core: Core, committing: asyncio.Future[None]
) -> None:
    await core.session()
    begun = core.directory / "begun"
    committing.set_exception(Unavailable("the disk is no more"))
    with pytest.raises(Unavailable, match="the disk is no more"):
        await core.run(f"open({str(begun)!r}, 'w')", claim=core.claim("key"))
    assert not begun.exists()
    assert (await core.store.session(mine("s"))).version == 1
