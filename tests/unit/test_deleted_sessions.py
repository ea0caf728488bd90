"""Sessions that are deleted before their run has a sandbox, or exchanged before their service starts, and that are
restored as they are being purged."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from era.core.concurrency.shares import Shares
from era.core.metadata import SessionChange, SessionFilter
from era.core.models import DEFAULT_OWNER, Session
from era.core.ports import Sandbox
from era.core.public.live_servers import LiveServers
from era.errors import EraError, Forbidden, NotFound, SessionDeleted
from era.store.engine.database import DatabaseAway
from tests.owners import mine
from tests.unit.core import URL, Core, Listener, request, until


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
    go.touch()
    with pytest.raises(SessionDeleted, match="before its program began"):
        await run
    (record,) = await core.store.runs(session.key, 10)
    assert (record.status, record.reason) == ("failed", "the session was deleted while this run was under way")
    await core.runs.drain(10)
    await core.session("other")
    assert (await core.run("print(1)", "other")).stdout == b"1\n", "its place is free"


async def test_a_run_ends_whose_session_was_deleted_without_an_answer(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database has committed that, and was away before it said so. Nobody can delete the session again."""
    code, go = core.paused()
    session = await core.session()
    await Listener(core.runs.stream(mine("s"), request(code))).wait_for_output("paused")
    write = core.store.database.write

    async def unanswered(*args: Any, **fields: Any) -> Any:
        await write(*args, **fields)
        raise DatabaseAway(may_have_committed=True)

    with monkeypatch.context() as away:
        away.setattr(core.store.database, "write", unanswered)
        with pytest.raises(DatabaseAway):
            await core.sessions.delete(mine("s"))
    with pytest.raises(NotFound):
        await core.sessions.delete(mine("s"))
    assert core.pool.is_busy(session.key)
    await core.expiry.sweep()
    async with asyncio.timeout(10), core.turns.take(mine("s")):
        assert not go.exists(), "the run has ended, although its program hasn't"
    (record,) = await core.store.runs(session.key, 10)
    assert (record.status, record.reason) == ("failed", "the session was deleted while this run was under way")


async def test_a_session_that_is_back_has_nothing_that_was_read_while_it_went(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Restored before the run that was under way is committed, whose files are being removed as they are read."""
    session = await core.session()
    await core.run("open('kept', 'w').write('1')")
    before = await core.store.session(mine("s"))
    take = core.snapshots.take

    async def read_while_it_goes(sandbox: Sandbox, *given: Any, **named: Any) -> Any:
        await core.store.delete_session(mine("s"))
        await core.pool.release(session.key)
        Path(sandbox.workspace).mkdir(parents=True, exist_ok=True)  # all that is left of it so far
        await core.store.restore_session(mine("s"))
        return await take(sandbox, *given, **named)

    monkeypatch.setattr(core.snapshots, "take", read_while_it_goes)
    with pytest.raises(SessionDeleted, match="under way"):
        await core.run("open('more', 'w').write('2')")
    monkeypatch.undo()
    now = await core.store.session(mine("s"))
    assert (now.version, now.snapshot) == (before.version, before.snapshot)
    assert (await core.run("print(open('kept').read())")).stdout == b"1\n"


async def test_what_is_restored_while_the_deleted_are_purged_stays(core: Core) -> None:
    for name in ("stays", "goes"):
        await core.session(name)
        await core.sessions.delete(mine(name), purge=False)

    async def restoring(found: Sequence[Session]) -> Sequence[Session]:
        await core.store.restore_session(mine("stays"))
        return found

    which = SessionFilter(DEFAULT_OWNER, removed="deleted")
    assert await core.sessions.delete_all(which, selected=restoring) == ["goes"]
    assert (await core.store.session(mine("stays"))).version == 1


@pytest.mark.parametrize("error", [NotFound, Forbidden])
async def test_a_service_starts_in_the_public_session_that_was_called_only(core: Core, error: type[EraError]) -> None:
    """Where another has the id by now, or it is not public any more."""
    called = await core.session(allow_public=True, service="true")
    if error is NotFound:
        await core.store.delete_session(mine("s"))
        await core.session(allow_public=True, service="true")
    else:
        await core.store.change_session(mine("s"), SessionChange(allow_public=False))
    live_servers = LiveServers(
        core.runs, core.active_runs, core.live_sessions, core.pool, Shares(8), idle_seconds=60, service_seconds=60
    )
    with pytest.raises(error):
        async with live_servers.connection(called, 8000, URL):
            pass
    assert await core.records() == []
