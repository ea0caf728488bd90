"""Runs that nobody waits for, services, and stopping either."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from era.core.execution.active_runs import ActiveRun
from era.errors import NotFound, SandboxFailed
from tests.owners import mine
from tests.unit.core import Core, request, until

STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
KEEPS_ON_TERM = """
import json, signal, sys, time
def end(*_):
    json.dump({"ended": "well"}, open(".session_data.json", "w"))
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("ready")
time.sleep(60)
"""


async def started(core: Core, code: str, says: bytes) -> ActiveRun:
    """A run in the background, once it has written something."""
    run = await core.runs.start(mine("s"), request(code, background=True))
    await until(lambda: run.transcript.stdout.size >= len(says))
    return run


async def test_a_run_in_the_background_is_told_of_once_it_is_on_record(core: Core) -> None:
    await core.session()
    code, go = core.paused()
    begun = await core.runs.begin(mine("s"), request(code, background=True))
    record = await core.record(begun.value)
    assert record.status == "running"
    go.touch()
    await core.runs.drain(10)
    assert (await core.record(begun.value)).status == "ok"
    assert await core.output(begun.value) == b"paused\n"


async def test_one_that_fails_later_is_logged_and_recorded(core: Core) -> None:
    await core.session()
    core.driver.dead_on_arrival = 2
    with capture_logs() as logs:
        run = await core.runs.start(mine("s"), request("pass", background=True))
        await core.runs.drain(10)
    assert [log["event"] for log in logs] == ["run_failed"]
    assert isinstance(run.error, SandboxFailed)
    assert (await core.record(run.run_id)).reason == "The sandbox is gone."


async def test_stopping_tells_the_program_again_until_it_ends(core: Core) -> None:
    await core.session()
    code, go = core.paused()
    run = await started(core, STUBBORN + code, b"paused")
    stopping = asyncio.create_task(core.runs.stop(mine("s"), run.run_id))
    await until(lambda: run.is_stopping)
    await asyncio.sleep(0.3)
    assert not stopping.done()
    go.touch()
    assert (await stopping).committed


async def test_only_the_session_s_own_runs_can_be_stopped(core: Core) -> None:
    await core.session("s")
    await core.session("other")
    code, go = core.paused()
    run = await started(core, code, b"paused")
    for session_id in ("other", "nobody's"):
        with pytest.raises(NotFound):
            await core.runs.stop(mine(session_id), run.run_id)
    assert not run.is_stopping
    go.touch()
    await core.runs.drain(10)


async def test_a_service_ends_when_somebody_wants_the_turn(core: Core) -> None:
    await core.session()
    service = await core.runs.start(mine("s"), request(service=["/bin/sh", "-c", "echo ready; exec sleep 60"]))
    await until(lambda: service.transcript.stdout.size)
    async with asyncio.timeout(60):
        collected = await core.run("print('mine')")
    assert collected.stdout == b"mine\n"
    assert service.ended.is_set()
    assert [record.status for record in await core.records()] == ["killed", "ok"]


async def test_other_runs_don_t_yield(core: Core) -> None:
    await core.session()
    code, go = core.paused()
    run = await started(core, code, b"paused")
    waiting = asyncio.create_task(core.run("pass"))
    await asyncio.sleep(0.05)
    assert not run.is_stopping
    go.touch()
    await waiting
