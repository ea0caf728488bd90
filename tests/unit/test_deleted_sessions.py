"""Sessions that are deleted before their run has a sandbox."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from era.core import pool as pools
from era.errors import SessionDeleted
from tests.owners import mine
from tests.unit.core import Core, Listener, request, until


async def waiting_for_room(core: Core) -> tuple[asyncio.Task[Any], Path]:
    """A run of "s" that waits for a place of the room, and the file that lets go on the runs that have all of them."""
    code, go = core.paused()
    for number in range(4):
        await core.session(f"busy{number}")
        await Listener(core.runs.stream(mine(f"busy{number}"), request(code))).wait_for_output("paused")
    await core.session()
    run = asyncio.create_task(core.run("pass"))
    await until(lambda: core.pool._acquiring)
    return run, go


async def test_deleting_a_session_ends_its_run_that_has_no_sandbox_yet(core: Core) -> None:
    run, go = await waiting_for_room(core)
    session = await core.store.delete_session(mine("s"))
    await core.pool.release(session.key)
    async with core.turns.take(mine("s")):
        assert not go.exists(), "the others needn't end for it"
    with pytest.raises(SessionDeleted, match="before its program began"):
        await run
    (record,) = await core.store.runs(session.key, 10)
    assert (record.status, record.reason) == ("failed", "the session was deleted while this run was under way")
    go.touch()
    await core.runs.drain(10)
    await core.session("other")
    assert (await core.run("print(1)", "other")).stdout == b"1\n", "its place is free"


async def test_it_would_wait_if_it_were_not_told(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools._Acquiring, "release", lambda _: None)
    run, go = await waiting_for_room(core)
    session = await core.store.delete_session(mine("s"))
    await core.pool.release(session.key)
    await asyncio.sleep(0.2)
    assert not run.done()
    go.touch()
    await until(core.pool.idle_session_keys)
    await core.pool.release(core.pool.idle_session_keys()[0])
    with pytest.raises(SessionDeleted):
        await run


async def test_a_run_is_not_tried_again_once_its_session_is_deleted(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await core.session()
    core.driver.dead_on_arrival = 1
    create = core.driver.create

    async def deleted_meanwhile(*given: Any) -> Any:
        sandbox = await create(*given)
        await core.store.delete_session(mine("s"))
        return sandbox

    monkeypatch.setattr(core.driver, "create", deleted_meanwhile)
    with pytest.raises(SessionDeleted):
        await core.run("pass")
    assert len(core.driver.made) == 1
    assert (await core.store.runs(session.key, 10))[0].status == "failed"
