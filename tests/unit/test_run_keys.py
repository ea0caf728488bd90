"""Runs with idempotency keys: done once, answered twice, and free again where nothing ran."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from era.core.execution.run_messages import RunResult, RunStarted
from era.core.execution.transcript import Piece
from era.core.models import Session
from era.core.sessions.idempotency import IdempotencyKeys
from era.errors import CommitFailed, Conflict, NotFound, RunLost, SandboxFailed, TooManyWaiting
from era.store.engine.database import DatabaseAway
from tests.owners import mine
from tests.unit.core import Core, Listener, request, until


def counting(core: Core) -> tuple[str, Path]:
    """Code that leaves a mark each time that it is run, and the file with the marks."""
    marks = core.directory / "marks"
    return f"open({str(marks)!r}, 'a').write('x')\n", marks


async def test_the_second_request_gets_the_first_one_s_answer(core: Core) -> None:
    await core.session(data='{"n": 1}')
    code, marks = counting(core)
    code += "import sys, json\nprint('out')\nprint('err', file=sys.stderr)\n"
    code += "json.dump({'n': 2}, open('.session_data.json', 'w'))"
    first = await core.run(code, claim=core.claim("key"))
    await core.run("import json\njson.dump({'n': 3}, open('.session_data.json', 'w'))")
    second = await core.run(code, claim=core.claim("key"))
    assert marks.read_text() == "x"
    assert (second.stdout, second.stderr) == (b"out\n", b"err\n")
    assert (first.result.replayed, second.result.replayed) == (False, True)
    assert second.result.data == {"n": 2}
    assert second.result.run_id == first.result.run_id
    assert second.result.state == first.result.state


@pytest.mark.parametrize(
    "code", ["raise SystemExit(3)", "import os; os.kill(os.getpid(), 9)", "import time; time.sleep(9)"]
)
async def test_a_run_that_failed_is_answered_again_too(core: Core, code: str) -> None:
    await core.session()
    first, second = [(await core.run(code, claim=core.claim("key"), timeout=0.2)).result for _ in range(2)]
    assert second.replayed
    assert (first.status, first.exit_code, first.run_id) == (second.status, second.exit_code, second.run_id)


async def test_a_replay_is_a_stream_like_any_other(core: Core) -> None:
    await core.session()
    long = 100_000
    code = f"print('o' * {long})"
    first, again = [
        [event async for event in core.runs.stream(mine("s"), request(code, claim=core.claim("key")))] for _ in range(2)
    ]
    pieces = [event for event in again if isinstance(event, Piece)]
    assert [type(event) for event in again] == [RunStarted, *[Piece] * len(pieces), RunResult]
    assert pieces == [event for event in first if isinstance(event, Piece)], "with the same numbers"
    assert len(b"".join(piece.data for piece in pieces)) == long + 1, "long output is kept as a blob"


async def test_after_a_restart_env_can_t_be_told_apart(core: Core) -> None:
    """The key of its hash was in the memory of the process that is gone."""
    await core.session()
    await core.run("pass", claim=core.claim("key", hidden={"env": {"A": "1"}}))
    core.idempotency = IdempotencyKeys(core.store)
    other = core.claim("key", hidden={"env": {"A": "2"}})
    assert (await core.run("pass", claim=other)).result.replayed


async def test_requests_with_the_same_key_wait_for_each_other(core: Core) -> None:
    await core.session()
    code, marks = counting(core)
    pause, go = core.paused()
    first = Listener(core.runs.stream(mine("s"), request(code + pause, claim=core.claim("key"))))
    await first.wait_for_output("paused")
    others = [asyncio.create_task(core.run(code + pause, claim=core.claim("key"))) for _ in range(3)]
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in others)
    go.touch()
    results = [(await task).result for task in others]
    assert marks.read_text() == "x"
    assert {result.run_id for result in results} == {(await first.task).run_id}
    assert all(result.replayed for result in results)


async def test_a_key_is_free_again_where_no_program_began(core: Core) -> None:
    await core.session()
    code, marks = counting(core)
    core.driver.dead_on_arrival = 2
    with pytest.raises(SandboxFailed):
        await core.run(code, claim=core.claim("key"))
    assert not (await core.run(code, claim=core.claim("key"))).result.replayed
    assert marks.read_text() == "x"


async def test_a_key_is_free_again_where_there_was_no_turn_or_no_session(core: Core) -> None:
    await core.session()
    pause, go = core.paused()
    first = Listener(core.runs.stream(mine("s"), request(pause)))
    await first.wait_for_output("paused")
    waiting = [asyncio.create_task(core.run("pass")) for _ in range(8)]
    await asyncio.sleep(0)
    with pytest.raises(TooManyWaiting):
        await core.run("pass", claim=core.claim("key"))
    go.touch()
    await asyncio.gather(first.task, *waiting)
    assert not (await core.run("pass", claim=core.claim("key"))).result.replayed
    with pytest.raises(NotFound):
        await core.run("pass", "nobody's", claim=core.claim("key"))


async def test_requests_with_one_key_wait_in_a_queue_with_a_bound(core: Core) -> None:
    await core.session()
    keys, claim = core.idempotency, core.claim("key")

    async def hold() -> None:
        async with keys.held(mine("s"), claim):
            pass

    async with keys.held(mine("s"), claim):
        waiting = [asyncio.create_task(hold()) for _ in range(100)]
        await until(lambda: sum(each.done() for each in waiting) == 36)
    ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert sum(isinstance(end, TooManyWaiting) for end in ends) == 36
    assert sum(end is None for end in ends) == 64


async def test_a_run_whose_commit_failed_is_not_run_again(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    async def failing(*_: Any, **__: Any) -> Any:
        raise CommitFailed("the disk is no more")

    await core.session()
    code, marks = counting(core)
    with monkeypatch.context() as patch:
        patch.setattr(core.snapshots, "take", failing)
        with pytest.raises(CommitFailed):
            await core.run(code, claim=core.claim("key"))
    with pytest.raises(CommitFailed, match="the disk is no more") as failed:
        await core.run(code, claim=core.claim("key"))
    assert "not run again" in failed.value.hint
    assert marks.read_text() == "x"


async def test_a_lost_run_is_not_run_again(core: Core) -> None:
    await core.session()
    await core.store.begin_run(mine("s"), "run_1", core.claim("key"))
    with pytest.raises(Conflict) as under_way:
        await core.run("pass", claim=core.claim("key"))
    assert under_way.value.code == "run_under_way"
    await core.store.mark_lost()
    with pytest.raises(RunLost):
        await core.run("pass", claim=core.claim("key"))
    assert core.driver.made == []


@pytest.mark.parametrize("is_told", [True, False], ids=["told before the commit", "as on PostgreSQL"])
async def test_a_run_that_may_be_on_record_but_never_began_frees_its_key(
    core: Core, monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    await core.session()
    begin = core.store.begin_run

    async def cut_off(*args: Any, known: Any, **how: Any) -> Session:
        await begin(*args, known=known if is_told else None, **how)
        raise DatabaseAway(may_have_committed=True)

    with monkeypatch.context() as patch:
        patch.setattr(core.store, "begin_run", cut_off)
        with pytest.raises(DatabaseAway):
            await core.run("pass", claim=core.claim("key"))
    await core.ended_record()
    assert (await core.run("print('now')", claim=core.claim("key"))).stdout == b"now\n"
    assert [record.status for record in await core.records()] == ["failed", "ok"]


async def test_a_key_in_the_background(core: Core) -> None:
    await core.session()
    code, marks = counting(core)
    pause, go = core.paused()
    first = await core.runs.begin(mine("s"), request(code + pause, background=True, claim=core.claim("key")))
    second = await core.runs.begin(mine("s"), request(code + pause, background=True, claim=core.claim("key")))
    assert (first.replayed, second.replayed, second.value) == (False, True, first.value)
    go.touch()
    await core.runs.drain(10)
    third = await core.runs.begin(mine("s"), request(code + pause, background=True, claim=core.claim("key")))
    assert (third.replayed, third.value) == (True, first.value)
    assert marks.read_text() == "x"


async def test_a_key_in_the_background_stays_taken_where_no_program_began(core: Core) -> None:
    """The caller was told of a run, so a second request is told of the same."""
    await core.session()
    core.driver.dead_on_arrival = 2
    first = await core.runs.begin(mine("s"), request("pass", background=True, claim=core.claim("key")))
    await core.runs.drain(10)
    assert (await core.record(first.value)).status == "failed"
    second = await core.runs.begin(mine("s"), request("pass", background=True, claim=core.claim("key")))
    assert (second.value, second.replayed) == (first.value, True)
