"""Ends of processes that can't be put on record when they come. Sandboxes are the fake driver's."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from era.core.live import live_session, live_sessions
from era.core.live.processes import ProcessRequest
from era.core.models import Claim, OwnedId
from era.core.process import ProcessRecord
from era.errors import TooManyProcesses, Unavailable
from tests.owners import mine
from tests.unit.core import URL, Core, until

S = mine("s")


async def start(core: Core, command: str, session: OwnedId = S) -> ProcessRecord:
    return (await core.processes.start(session, ProcessRequest(URL, command))).value


class Away:
    """Ends of processes that can't be recorded as long as it `is_away`."""

    def __init__(self, core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_away = True
        self.tries = 0
        self._end = core.store.end_process
        monkeypatch.setattr(core.store, "end_process", self.end)
        monkeypatch.setattr("era.core.concurrency.late_ends._LONGEST_PAUSE", 0.05)

    async def end(self, record: ProcessRecord, freed: Claim | None = None) -> None:
        self.tries += 1
        if self.is_away:
            raise Unavailable("the database can't be reached")
        await self._end(record, freed)


async def test_ends_that_are_not_on_record_are_kept_and_there_are_not_more_than_may_run(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = Away(core, monkeypatch)
    session = await core.session()
    first = await start(core, "exit 3")
    live = core.live_sessions._live[session.key]
    live.processes._most = 2
    await start(core, "exit 4")
    await until(lambda: not live.processes.running and away.tries > 4)
    assert [record.exit_code for record in await core.processes.list(S)] == [4, 3]
    with pytest.raises(TooManyProcesses):
        await start(core, "true")
    putting_away = asyncio.create_task(core.live_sessions.put_away(S))
    await until(lambda: not live.is_open)
    assert [record.exit_code for record in await core.processes.list(S)] == [4, 3]
    assert (await core.processes.get(S, first.id)).status == "ended"
    assert [record.status for record in await core.store.processes(S)] == ["running"] * 2
    away.is_away = False
    await putting_away
    assert [record.exit_code for record in await core.store.processes(S)] == [4, 3]


async def test_a_service_that_stops_waits_for_ends_to_be_recorded_for_a_while_only(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = Away(core, monkeypatch)
    for module in (live_session, live_sessions):
        monkeypatch.setattr(module, "LAST_RECORDS_SECONDS", 0.2)
    for name in "ab":
        await core.session(name)
        await start(core, "exec sleep 100", mine(name))
    async with asyncio.timeout(10):
        await core.live_sessions.stop(0.2)
        await core.pool.stop()
        await core.live_sessions.close()
    tries = away.tries
    assert tries >= 2
    await asyncio.sleep(0.2)
    assert away.tries == tries, "it is still tried"
    assert await core.store.mark_processes_lost() == 2


async def test_a_session_is_put_away_though_ends_are_not_on_record(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    away = Away(core, monkeypatch)
    monkeypatch.setattr(live_session, "LAST_RECORDS_SECONDS", 0.2)
    await core.session()
    process = await start(core, "exec sleep 100")
    with capture_logs() as logs:
        async with asyncio.timeout(10):
            await core.live_sessions.put_away(S)
        await until(lambda: away.tries > 4)
    assert [log["event"] for log in logs if log["log_level"] == "warning"] == ["process_not_recorded"]
    await start(core, "true")  # it can be live again
    away.is_away = False
    await until(lambda: core.live_sessions.count() and core.live_sessions.running(S) is None)
    async with asyncio.timeout(10):
        while (await core.store.process(S, process.id)).status == "running":  # noqa: ASYNC110  nothing tells of it
            await asyncio.sleep(0.05)
