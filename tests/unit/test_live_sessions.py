"""Live sessions: how they come to be, what holds them, and how they end. Sandboxes are the fake driver's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from era.core.live.output_log import OutputLog, Piece
from era.core.live.processes import LiveProcess, ProcessRequest
from era.core.models import EMPTY, Claim, OwnedId
from era.core.process import ProcessRecord
from era.core.trees.trees import SnapshotRefused
from era.errors import (
    NotFound,
    RunUnderWay,
    SessionLive,
    TagInUse,
    TooManyLive,
    TooManyProcesses,
)
from tests.owners import mine
from tests.unit.core import SETTINGS, URL, Core, until

S = mine("s")


async def start(core: Core, command: str | list[str], session_id: OwnedId = S, **fields: Any) -> ProcessRecord:
    return (await core.processes.start(session_id, ProcessRequest(URL, command, **fields))).value


async def live_process(core: Core, name: str) -> LiveProcess:
    process = await core.processes.find(S, name)
    assert process is not None
    return process


async def output(log: OutputLog) -> bytes:
    return b"".join([event.data async for event in log.follow(0) if isinstance(event, Piece)])


async def test_a_process_executes_nothing_before_it_is_on_record(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    session = await core.session()
    begin, may_begin, problem = core.store.begin_process, asyncio.Event(), NotFound("It was deleted.")

    async def late_begin(record: ProcessRecord, claim: Claim | None = None) -> None:
        await may_begin.wait()
        if record.tag == "refused":
            raise problem
        await begin(record, claim)

    monkeypatch.setattr(core.store, "begin_process", late_begin)
    starting = asyncio.create_task(start(core, "echo > made"))
    refused = asyncio.create_task(start(core, "echo > refused", tag="refused"))
    cancelled = asyncio.create_task(start(core, "echo > cancelled"))
    await until(lambda: session.key in core.live_sessions._live)
    live = core.live_sessions._live[session.key]
    await until(lambda: len(live.processes.all) == 3)
    cancelled.cancel()
    await asyncio.sleep(0.2)
    [sandbox] = core.driver.alive
    assert not [*sandbox.workspace.iterdir()]
    may_begin.set()
    await live_process(core, (await starting).id)
    await until(lambda: (sandbox.workspace / "made").exists())
    with pytest.raises(NotFound) as raised:
        await refused
    assert raised.value is problem
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    await until(lambda: not live.processes.running)
    assert [path.name for path in sandbox.workspace.iterdir()] == ["made"]
    assert {record.status for record in await core.processes.list(S)} == {"ended"}
    assert len(await core.processes.list(S)) == 2, "the one that was refused is on no record"


async def test_an_end_is_told_once_it_is_on_record(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has heard how a process ended hears nothing else after a kill."""
    await core.session()
    recording, may_end, end = asyncio.Event(), asyncio.Event(), core.store.end_process

    async def slow_end(*given: Any) -> None:
        recording.set()
        await may_end.wait()
        await end(*given)

    monkeypatch.setattr(core.store, "end_process", slow_end)
    one = await start(core, "echo out; exit 3")
    await recording.wait()
    log = await core.processes.log(S, one.id)
    asked, listed = asyncio.create_task(core.processes.get(S, one.id)), asyncio.create_task(core.processes.list(S))
    assert log.total == 4
    for _ in range(20):
        await asyncio.sleep(0)
    assert log.exit is None
    assert not asked.done()
    assert not listed.done()
    may_end.set()
    assert (await asked).exit_code == 3
    assert [record.exit_code for record in await listed] == [3]
    assert log.exit is not None


async def test_what_processes_leave_is_committed_when_the_session_is_put_away(core: Core) -> None:
    session = await core.session()
    await start(core, "echo 1 > made; exec sleep 100")
    await until(lambda: (core.driver.made[0].workspace / "made").exists())
    await until(lambda: (core.driver.made[0].workspace / "made").stat().st_size)
    put_away = await core.live_sessions.put_away(S)
    assert put_away.version == 2
    assert put_away.snapshot.file_count == 1
    assert core.live_sessions.get(session.key) is None
    (record,) = await core.processes.list(S)
    assert (record.status, record.reason) == ("ended", "The session was stopped.")
    assert (await core.run("print(open('made').read())")).stdout == b"1\n\n"
    assert len(core.driver.made) == 1, "its sandbox stays warm"
    assert (await core.live_sessions.put_away(S)).version == 2, "nothing happens to one that isn't live"


async def test_a_process_joins_a_run_under_way(core: Core) -> None:
    await core.session()
    code, go = core.paused()
    run = asyncio.create_task(core.run(code))
    await until(lambda: any(r.sandbox for r in core.active_runs._runs.values()))
    process = await start(core, "exec sleep 100")
    assert not run.done()
    go.touch()
    await run
    assert (await core.processes.get(S, process.id)).status == "running"
    assert len(core.driver.made) == 1


async def test_a_process_does_not_join_a_run_that_may_be_undone(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("era.core.live.live_sessions._PATIENCE", 0.3)
    await core.session()
    code, go = core.paused()
    run = asyncio.create_task(core.run(code, atomic=True))
    await until(lambda: any(r.sandbox for r in core.active_runs._runs.values()))
    with pytest.raises(RunUnderWay):
        await start(core, "exec sleep 100")
    go.touch()
    await run
    await start(core, "exec sleep 100")
    with pytest.raises(SessionLive):
        await core.run("1", atomic=True)


async def test_a_failed_commit_remakes_the_sandbox_and_processes_are_told(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object, **__: object) -> None:
        raise SnapshotRefused("there is no end to it")

    session = await core.session()
    process = await start(core, "exec sleep 100")
    with monkeypatch.context() as refusing:
        refusing.setattr(core.moments, "take", refuse)
        ran = await core.run("open('f', 'w')")
    assert not ran.result.state.committed
    await until(lambda: session.key not in core.live_sessions._live)
    record = await core.processes.get(S, process.id)
    assert record.status == "ended"
    assert record.reason is not None
    assert "made anew" in record.reason
    assert ran.result.run_id in record.reason
    assert session.key not in core.liveness
    again = await start(core, "exec sleep 100")
    assert (await core.processes.get(S, again.id)).status == "running"


def meanwhile(core: Core, monkeypatch: pytest.MonkeyPatch, ending: Callable[[], Awaitable[object]], times: int) -> None:
    """Each of the next processes has its session ended between being recorded and being started."""
    begin, endings, tasks = core.store.begin_process, [ending] * times, []

    async def begin_and_end(record: ProcessRecord, claim: Claim | None = None) -> None:
        await begin(record, claim)
        if endings:
            tasks.append(asyncio.ensure_future(endings.pop()()))
            live = core.live_sessions._live[record.session_key]
            await until(lambda: not live.is_open)

    monkeypatch.setattr(core.store, "begin_process", begin_and_end)


async def test_a_process_waits_until_its_session_was_put_away(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    await core.session()
    await start(core, "exec sleep 100")
    meanwhile(core, monkeypatch, lambda: core.live_sessions.put_away(S), 2)
    claim = Claim("process", "k", "0" * 64, "")
    process = await start(core, "exec sleep 100", claim=claim)
    assert process.status == "running"
    again = await core.processes.start(S, ProcessRequest(URL, "exec sleep 100", claim=claim))
    assert (again.value.id, again.replayed) == (process.id, True), "the key is that of the process that runs"


async def test_a_dead_sandbox_is_told(core: Core) -> None:
    await core.session()
    process = await start(core, "exec sleep 100")
    core.driver.made[0].kill()
    await until(lambda: not core.live_sessions.count())
    assert (await core.processes.get(S, process.id)).reason == "The session's sandbox failed."
    assert (await core.run("print(1)")).stdout == b"1\n"


async def test_files_of_sessions_that_keep_none_live_as_long_as_the_session_is_live(core: Core) -> None:
    await core.session(persistent=False)
    await start(core, "exec sleep 100")
    await core.run("open('a', 'w').write('1')")
    assert (await core.run("print(open('a').read())")).stdout == b"1\n"
    await core.live_sessions.put_away(S)
    assert (await core.run("import os; print(os.path.exists('a'))")).stdout == b"False\n"
    assert (await core.store.session(S)).snapshot == EMPTY


async def test_live_sessions_are_bounded_and_shared(directory: Path, template: Path) -> None:
    async with Core.opened(directory, template, max_warm=6) as core:
        for name in "abcd":
            await core.session(name)
        await start(core, "exec sleep 100", mine("a"))
        await start(core, "exec sleep 100", mine("b"))
        with pytest.raises(TooManyLive) as refused:
            await start(core, "exec sleep 100", mine("c"))
        assert refused.value.details == {"live": ["a", "b"]}
        other = OwnedId("other", "theirs")
        await core.store.create_session(replace(SETTINGS, id=other))
        await start(core, "exec sleep 100", other)
        await core.live_sessions.put_away(mine("a"))
        await core.live_sessions.put_away(mine("b"))
        await start(core, "exec sleep 100", mine("c"))
        for name in "ab":
            assert (await core.run("print(1)", name)).stdout == b"1\n"


async def test_live_sessions_make_way_for_nobody(directory: Path, template: Path) -> None:
    async with Core.opened(directory, template, max_warm=2) as core:
        for name in "sabc":
            await core.session(name)
        process = await start(core, "exec sleep 100")
        for name in "abc":
            await core.run("print(1)", name)
        assert (await core.processes.get(S, process.id)).status == "running"
        with pytest.raises(TooManyLive):
            await start(core, "exec sleep 100", mine("a"))


async def test_too_many_processes_and_tags(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("era.core.live.live_session.MOST", 2)
    await core.session()
    first = await start(core, "exec sleep 100", tag="t")
    with pytest.raises(TagInUse):
        await start(core, "exec sleep 100", tag="t")
    second = await start(core, "exec sleep 100")
    with pytest.raises(TooManyProcesses) as refused:
        await start(core, "exec sleep 100")
    assert refused.value.details == [
        {"process_id": first.id, "tag": "t"},
        {"process_id": second.id, "tag": None},
    ]
    await core.processes.end(S, "t", "")
    await start(core, "exec sleep 100", tag="t")
    assert (await core.processes.get(S, "t")).status == "running", "the one that runs comes first"


async def test_records_outlive_their_session_and_a_killed_service(core: Core) -> None:
    await core.session()
    ended = await start(core, "echo hello; exit 1")
    await (await live_process(core, ended.id)).ended.wait()
    running = await start(core, "exec sleep 100", tag="r", env={"TOKEN": "secret-value"})
    assert b"secret-value" not in (core.directory / "era.sqlite").read_bytes()
    await core.live_sessions.put_away(S)
    assert await output(await core.processes.log(S, ended.id)) == b"hello\n"
    await core.store.begin_process(replace(await core.store.process(S, running.id), id="proc_1_lost"))
    row = ProcessRecord("proc_2_x", (await core.store.session(S)).key, "x", 1, tag="gone")
    await core.store.begin_process(row)
    assert await core.store.mark_processes_lost() == 1
    lost = await core.processes.get(S, "gone")
    assert lost.status == "lost"
    assert lost.reason == "The service stopped while this process ran."


async def test_a_session_does_not_expire_while_a_process_runs(core: Core) -> None:
    await core.session(ttl=60)
    process = await start(core, "exec sleep 100")
    later = (await core.store.session(S)).created_at + 200_000_000
    assert not await core.store.expire(later)
    await core.processes.end(S, process.id, "")
    assert await core.store.expire(later)
