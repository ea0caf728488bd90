"""Processes whose start or end is cut off from PostgreSQL, or falls into a time when it is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from era.core.live.processes import ProcessRequest
from era.core.models import Claim
from era.core.process import ProcessRecord
from era.store.engine import database
from era.store.engine.database import DatabaseAway
from tests.owners import mine
from tests.postgres import Postgres
from tests.store.postgres_proxy import PostgresProxy, postgres_proxy
from tests.store.rows import new, opened
from tests.unit.core import URL, Core, until

__all__ = ["postgres_proxy"]

S = mine("s")


@pytest.fixture
async def core(postgres_url: str, postgres_proxy: PostgresProxy, tmp_path: Path) -> AsyncIterator[Core]:
    async with Core.opened(tmp_path, None, url=postgres_proxy.url(postgres_url)) as core:
        yield core


async def recorded(core: Core, status: str) -> list[str]:
    """The ids of the processes that have this status in the database."""
    return [record.id for record in await core.store.processes(S) if record.status == status]


async def until_only_running(core: Core, count: int) -> None:
    """Wait until so many processes are `running` in the database."""
    async with asyncio.timeout(20):
        while len(await recorded(core, "running")) > count:  # noqa: ASYNC110  nothing tells of it
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("when", "stays_away"),
    # What is late is undone by the time a start gives up.
    [("before", False), ("after", False), ("late", False), ("before", True), ("after", True)],
)
async def test_a_start_that_was_cut_off_at_its_commit_can_be_repeated_with_its_key(
    core: Core, postgres_proxy: PostgresProxy, monkeypatch: pytest.MonkeyPatch, when: str, stays_away: bool
) -> None:
    await core.session()
    claim = core.idempotency.claim("process", "k", {"command": "x"})
    request = ProcessRequest(URL, f"echo >> {core.directory}/started; exec sleep 100", claim=claim)
    await core.processes.start(S, ProcessRequest(URL, "exec sleep 100", tag="other"))  # so that the session is live
    if stays_away:
        monkeypatch.setattr(database, "_PATIENCE_SECONDS", 0.0)
    postgres_proxy.cut(when)
    if stays_away:
        with pytest.raises(DatabaseAway, match="not known"):
            await core.processes.start(S, request)
    else:
        assert not (await core.processes.start(S, request)).replayed
    assert postgres_proxy.cuts == 1
    repeated = await core.processes.start(S, request)
    assert repeated.value.status == "running"
    assert repeated.replayed is not stays_away
    assert (await core.processes.start(S, request)).value.id == repeated.value.id
    other = await core.processes.get(S, "other")
    assert await recorded(core, "running") == [repeated.value.id, other.id]
    assert [each.id for each in await core.processes.list(S) if each.status == "running"] == [
        repeated.value.id,
        other.id,
    ]
    made = core.directory / "started"
    await until(lambda: made.exists() and made.read_text())
    assert made.read_text() == "\n"
    lost = stays_away and when == "after"
    assert [(await core.store.process(S, id)).reason for id in await recorded(core, "ended")] == (
        ["It could not be put on record."] if lost else []
    )


async def test_a_process_that_ends_while_the_database_is_away_is_recorded_when_it_is_back(
    core: Core, restarted: Postgres
) -> None:
    """And whoever follows it or asks hears of its end meanwhile."""
    session = await core.session(ttl=60)
    await core.processes.start(S, ProcessRequest(URL, "exec sleep 100", tag="other"))
    started = await core.processes.start(S, ProcessRequest(URL, "read line; exit 3", stdin=True))
    process = await core.processes.find(S, started.value.id)
    assert process is not None
    restarted.stop()
    await process.write(b"\n")
    async with asyncio.timeout(10):
        await process.ended.wait()
    shown = await core.processes.get(S, process.record.id)
    assert (shown.status, shown.exit_code) == ("ended", 3)
    assert process.log.exit is not None
    await asyncio.to_thread(restarted.start)
    await until_only_running(core, 1)
    assert (await core.store.process(S, process.record.id)).exit_code == 3
    await core.live_sessions.put_away(S)
    assert {each.status for each in await core.processes.list(S)} == {"ended"}
    assert await core.store.expire(session.created_at + 10**12) == [session.key]


async def test_a_session_that_is_lost_while_the_database_is_away_can_expire_later(
    core: Core, restarted: Postgres
) -> None:
    session = await core.session(ttl=60)
    started = await core.processes.start(S, ProcessRequest(URL, "exec sleep 100"))
    process = await core.processes.find(S, started.value.id)
    assert process is not None
    restarted.stop()
    await core.pool.discard(core.driver.alive[0], "Its host is full.")
    async with asyncio.timeout(10):
        await process.ended.wait()
    await asyncio.to_thread(restarted.start)
    listed = await core.processes.list(S)
    assert [(each.status, each.reason) for each in listed] == [("ended", "Its host is full.")]
    await until_only_running(core, 0)
    assert (await core.processes.get(S, process.record.id)).reason == "Its host is full."
    assert await core.store.expire(session.created_at + 10**12) == [session.key]
    await until(lambda: not core.live_sessions.count())


async def test_a_key_is_freed_by_its_own_process_only(postgres_url: str, postgres_proxy: PostgresProxy) -> None:
    """However often an end is recorded, of which nobody knows whether it was stored."""
    claim = Claim("process", "key", "h" * 64, "mark")
    async with opened(postgres_proxy.url(postgres_url)) as store:
        session = await store.create_session(new("a"))
        first, second = (ProcessRecord(f"proc_{n}_x", session.key, "true", n) for n in (1, 2))
        await store.begin_process(first, claim)
        ended = ProcessRecord("proc_1_x", session.key, "true", 1, status="ended", ended_at=2)
        postgres_proxy.cut("after")
        with pytest.raises(DatabaseAway):
            await store.end_process(ended, claim)
        await store.begin_process(second, claim)
        await store.end_process(ended, claim)
        claimed = await store.find_claim(mine("a"), claim)
        assert claimed is not None
        assert claimed.answer == '"proc_2_x"'
        assert [each.status for each in await store.processes(mine("a"))] == ["running", "ended"]
