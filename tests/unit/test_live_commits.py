"""What live sessions hold while the database is away for a while. Sandboxes are the fake driver's."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from era.core.live.processes import ProcessRequest
from era.core.models import Session
from era.core.trees.trees import SnapshotRefused
from era.errors import CommitFailed
from era.store.engine.database import DatabaseAway
from tests.owners import mine
from tests.unit.core import URL, Core, until

S = mine("s")


async def start(core: Core, command: str) -> None:
    await core.processes.start(S, ProcessRequest(URL, command))


@dataclass
class Away:
    """Makes commits of versions fail, since the database is away."""

    times: float
    """How many of the next ones."""

    answer_lost: bool = False
    """Whether they are made all the same."""


@pytest.fixture
def away(core: Core, monkeypatch: pytest.MonkeyPatch) -> Away:
    return going_away(core, monkeypatch)


def going_away(core: Core, monkeypatch: pytest.MonkeyPatch) -> Away:
    away, commit = Away(0), core.store.commit

    async def failing(*given: Any, **fields: Any) -> Session:
        if not away.times:
            return await commit(*given, **fields)
        away.times -= 1
        if away.answer_lost:
            await commit(*given, **fields)
        raise DatabaseAway(may_have_committed=away.answer_lost)

    monkeypatch.setattr(core.store, "commit", failing)
    monkeypatch.setattr("era.core.live.live_sessions._AGAIN_SECONDS", 0.02)
    return away


@pytest.mark.parametrize("answer_lost", [False, True])
async def test_a_checkpoint_is_tried_again_in_an_idle_session(core: Core, away: Away, *, answer_lost: bool) -> None:
    session = await core.session()
    away.times, away.answer_lost = 1 if answer_lost else 3, answer_lost
    with capture_logs() as logs:
        await start(core, "echo 1 > made")
        live = core.live_sessions.get(session.key)
        assert live is not None
        await until(lambda: logs and not live.retry_seconds)
    assert live.is_idle
    assert live.is_open
    stored = await core.store.session(S)
    assert (stored.version, stored.snapshot.file_count) == (2, 1)
    assert [line["event"] for line in logs].count("no_checkpoint") == 1, "one outage is one line"


async def test_a_checkpoint_that_was_refused_is_not_tried_again(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("era.core.live.live_sessions._AGAIN_SECONDS", 0.02)
    looks = 0

    async def refuse(*_: object, **__: object) -> None:
        nonlocal looks
        looks += 1
        raise SnapshotRefused("there is no end to it")

    monkeypatch.setattr(core.moments, "take", refuse)
    await core.session()
    await start(core, "echo 1 > made")
    await until(lambda: looks)
    await asyncio.sleep(0.3)
    assert looks == 1


async def test_an_idle_one_stays_live_while_the_database_is_away(
    directory: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Core.opened(directory, template, keep_alive=0.1) as core:
        away = going_away(core, monkeypatch)
        session = await core.session()
        away.times = math.inf
        await start(core, "echo 1 > made")
        await asyncio.sleep(0.6)
        live = core.live_sessions.get(session.key)
        assert live is not None, "it may be used"
        await start(core, "echo 2 >> made")
        await until(lambda: live.is_idle)
        away.times = 0
        await until(lambda: not core.live_sessions.count())
        assert (await core.store.session(S)).snapshot.file_count == 1
        assert (await core.run("print(open('made').read())")).stdout == b"1\n2\n\n"
        assert live.why_lost is None
        assert len(core.driver.made) == 1, "its sandbox stays warm"


@pytest.mark.parametrize("answer_lost", [False, True])
async def test_one_that_is_stopped_waits_for_the_database(core: Core, away: Away, *, answer_lost: bool) -> None:
    await core.session()
    await start(core, "echo 1 > made; exec sleep 100")
    await until(lambda: (core.driver.made[0].workspace / "made").exists())
    away.times, away.answer_lost = 1 if answer_lost else 3, answer_lost
    put_away = await core.live_sessions.put_away(S)
    assert (put_away.version, put_away.snapshot.file_count) == (2, 1)
    assert not core.live_sessions.count()
    assert len(core.driver.alive) == 1


async def test_one_that_is_stopped_goes_after_a_while(core: Core, away: Away, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("era.core.live.live_sessions._COMMIT_PATIENCE", 0.1)
    await core.session()
    await start(core, "echo 1 > made; exec sleep 100")
    await until(lambda: (core.driver.made[0].workspace / "made").exists())
    away.times = math.inf
    with pytest.raises(CommitFailed, match="could not be kept: the database"):
        await core.live_sessions.put_away(S)
    assert (await core.store.session(S)).version == 1
    assert not core.live_sessions.count()
    assert not core.driver.alive


@pytest.mark.parametrize("times", [3, math.inf])
async def test_the_stop_of_the_service_waits_for_the_database_as_long_as_it_may(
    core: Core, away: Away, times: float
) -> None:
    await core.session()
    await start(core, "echo 1 > made; exec sleep 100")
    await until(lambda: (core.driver.made[0].workspace / "made").exists())
    away.times = times
    async with asyncio.timeout(5):
        await core.live_sessions.stop(1)
        await until(lambda: not core.live_sessions.count())
    assert (await core.store.session(S)).version == (2 if times == 3 else 1)
