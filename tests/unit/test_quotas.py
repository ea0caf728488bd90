"""core.quotas: how much owners and keys may use. Sixty-four calls at once get all that may be, and not one more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from era.core.execution.run_messages import Collected
from era.core.metadata import Retention
from era.core.models import OwnedId, Use, now
from era.core.owners import quotas as of_quotas
from era.core.owners.quotas import MINUTE_US, Window
from era.core.owners.usage import day_of
from era.errors import CommitFailed, QuotaReached, RateReached
from era.store.engine.database import DatabaseAway
from era.store.metadata import SqlStore
from tests.owners import mine
from tests.unit.core import SETTINGS, Core, request, until

CALLS = 64


async def all_at_once(calls: Sequence[Any]) -> tuple[list[Any], list[BaseException]]:
    """What came of the calls: answers and errors."""
    done = await asyncio.gather(*calls, return_exceptions=True)
    return [each for each in done if not isinstance(each, BaseException)], [
        each for each in done if isinstance(each, BaseException)
    ]


async def used_today(core: Core) -> tuple[int, int, int]:
    """Runs, microseconds and bytes of the owner's today."""
    today = day_of(now())
    [day] = await core.store.usage.days("default", today - 1, today)
    return day.runs, day.cpu_us, day.egress_bytes


async def test_runs_a_minute(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    await core.session()
    await core.quotas.set("default", {"runs_per_minute": 5})
    ran, refused = await all_at_once([core.runs.run(mine("s"), request("pass")) for _ in range(CALLS)])
    for each in ran:
        each.close()
    assert len(ran) == 5
    assert {type(error) for error in refused} == {RateReached}
    [error] = {error.details["used"]: error for error in refused if isinstance(error, RateReached)}.values()
    assert error.details == {"quota": "runs_per_minute", "of": "owner", "limit": 5, "used": 5}
    assert error.retry_after is not None
    assert 1 <= error.retry_after <= 60
    # It is honest: a moment before there is no place, and then there is one for each that began a minute ago.
    begun = [first / 1e6 for first, *_ in core.quotas._meters["owner", "default"].runs.entries]
    assert len(begun) == 5
    with monkeypatch.context() as clock:
        clock.setattr("era.core.owners.quotas.time.monotonic", lambda: begun[0] + 59.5)
        with pytest.raises(RateReached) as early:
            await begin_run(core)
        assert early.value.retry_after == 1
        clock.setattr("era.core.owners.quotas.time.monotonic", lambda: begun[0] + 60.001)
        await begin_run(core)


async def begin_run(core: Core) -> None:
    async with core.quotas.running(mine("s"), 0):
        pass


def test_a_minute_of_many_runs_is_kept_in_little_and_never_has_too_many() -> None:
    most, every = 600, 49_999  # microseconds: some 1,200 a minute are asked for
    window, begun, at = Window(), list[int](), 0
    while at < 3 * MINUTE_US:
        wait = window.wait(most, at)
        if wait is None:
            window.add(at)
            begun.append(at)
        else:
            assert 0 < wait <= MINUTE_US
            assert Window(window.entries).wait(most, at + wait) is None
        at += every
        assert len(window.entries) <= 300
    assert len(begun) >= 3 * most - 3 * 20  # what is kept by the second comes back up to a second later
    assert all(later - first >= MINUTE_US for first, later in zip(begun, begun[most:], strict=False))
    again = Window(json.loads(json.dumps(window.entries)))
    assert again.wait(most, at) == window.wait(most, at)


async def test_sandboxes_in_use(core: Core) -> None:
    """Runs of one session are one sandbox; whoever waits for it doesn't count twice."""
    await core.quotas.set("default", {"sandboxes": 3})
    code, go = core.paused()
    for n in range(8):
        await core.session(f"s{n}")
    runs = [asyncio.create_task(core.runs.run(mine(f"s{n % 8}"), request(code))) for n in range(CALLS)]
    await until(lambda: sum(run.done() for run in runs) == CALLS - 3 * CALLS // 8)
    errors = [run.exception() for run in runs if run.done()]
    assert {type(error) for error in errors} == {QuotaReached}
    [error] = [error for error in errors if isinstance(error, QuotaReached)][:1]
    assert error.details["filled_by"] == ["s0", "s1", "s2"]
    assert error.status == 409
    assert error.code == "quota_reached"
    go.touch()
    for run in runs:
        if not run.done():
            (await run).close()
    assert core.quotas.in_use("default")["sandboxes"] == 0
    await core.run("pass", "s7")


async def test_a_live_session_counts_until_it_is_put_away(core: Core) -> None:
    await core.quotas.set("default", {"sandboxes": 1})
    await core.session("live")
    await core.session("other")
    async with core.live_sessions.opened(mine("live")):
        await core.run("pass", "live")
        with pytest.raises(QuotaReached):
            await core.run("pass", "other")
    await core.live_sessions.put_away(mine("live"))
    await core.run("pass", "other")


async def test_sessions(core: Core) -> None:
    await core.quotas.set("default", {"sessions": 7})
    made, refused = await all_at_once([core.session(f"s{n}") for n in range(CALLS)])
    assert len(made) == 7
    assert {type(error) for error in refused} == {QuotaReached}
    assert (await core.store.sizes())["default"][0] == 7
    error = refused[0]
    assert isinstance(error, QuotaReached)
    assert error.details["filled_by"] == [session.id for session in made]
    # Another way to a session that is present is no way around it.
    gone = await core.store.delete_session(mine("s0"))
    await core.session("new")
    with pytest.raises(QuotaReached):
        await core.store.restore_session(gone.owned_id)
    # Of other owners nothing counts, and nothing is refused that makes no more of them.
    await core.store.create_session(replace(SETTINGS, id=OwnedId("ada", "hers")))
    await core.quotas.set("default", {"sessions": 1})
    await core.run("pass", "s1")
    await core.store.delete_session(mine("s1"))


async def test_files(core: Core) -> None:
    """A run that leaves too many is not kept, and says so; one that leaves fewer than before is."""
    await core.quotas.set("default", {"disk_mb": 2})
    write = "open('f', 'wb').write(b'x' * (1 << 20))"
    for n in range(3):
        await core.session(f"s{n}")
    for n in range(2):
        assert (await core.run(write, f"s{n}")).result.status == "ok"
    full = (await core.run(write, "s2")).result
    assert (full.status, full.state.committed, full.state.version) == ("disk_full", False, 1)
    assert "2 MiB of files" in (full.state.reason or "")
    record = await core.record(full.run_id, "s2")
    assert (record.status, record.committed) == ("disk_full", False)
    assert (await core.run("import os; print(os.path.exists('f'))", "s2")).stdout == b"False\n"
    await core.quotas.set("default", {"disk_mb": 1})
    assert (await core.run("open('f', 'wb').write(b'x' * 4096)", "s0")).result.state.committed
    assert (await used_today(core))[0] == 5


async def test_a_keys_own_quotas_bound_what_comes_with_it(core: Core) -> None:
    core.key_quotas["k"] = {"sessions": 1, "runs_per_minute": 1}
    with_key = replace(mine("a"), key_id="k")
    await core.store.create_session(replace(SETTINGS, id=with_key))
    with pytest.raises(QuotaReached) as full:
        await core.store.create_session(replace(SETTINGS, id=replace(with_key, id="b")))
    assert full.value.details["of"] == "key"
    await core.session("c")
    (await core.runs.run(with_key, request("pass"))).close()
    with pytest.raises(RateReached):
        await core.runs.run(with_key, request("pass"))
    await core.run("pass", "a")


async def test_a_day_that_is_used_up(core: Core) -> None:
    await core.session()
    await core.quotas.set("default", {"cpu_seconds_per_day": 10, "egress_mb_per_day": 1})
    today = day_of(now())
    core.quotas.used(Use("default", "", today, 1, 9_999_999, 1 << 19))
    await begin_run(core)
    core.quotas.used(Use("default", "", today, 1, 1, 0))
    with pytest.raises(RateReached) as used:
        await core.run("pass")
    assert used.value.details["quota"] == "cpu_seconds_per_day"
    assert used.value.retry_after is not None
    assert 0 < used.value.retry_after <= 86_400
    await core.quotas.set("default", {"cpu_seconds_per_day": None})
    core.quotas.used(Use("default", "", today, 1, 0, 1 << 19))
    with pytest.raises(RateReached) as used:
        await core.execute("pass")
    assert used.value.details["quota"] == "egress_mb_per_day"


async def test_usage_is_counted_by_the_commit_of_the_run(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run once, however it ends; and after a start the day goes on where it was."""
    await core.session()
    ran, _ = await all_at_once([core.runs.run(mine("s"), request("pass")) for _ in range(8)])
    for each in ran:
        assert isinstance(each, Collected)
        each.close()
    await core.execute("pass")
    runs, cpu_us, _ = await used_today(core)
    assert runs == 9
    records = await core.records()
    assert cpu_us >= sum(record.cpu_us or 0 for record in records)

    real = core.store.database.write_once

    async def fails_once(*_: Any, **__: Any) -> Any:
        monkeypatch.setattr(core.store.database, "write_once", real)
        raise CommitFailed("the disk is gone")

    code, go = core.paused()
    run = asyncio.create_task(core.run(code))
    await until(lambda: core.active_runs.of_session(1) is not None)
    monkeypatch.setattr(core.store.database, "write_once", fails_once)
    go.touch()
    with pytest.raises(CommitFailed):
        await run
    assert (await used_today(core))[0] == 10  # by the record that says that it failed

    again = of_quotas.Quotas(core.store.usage, {"cpu_seconds_per_day": 1}, lambda _: {})
    await again.open()
    assert again.in_use("default")["cpu_seconds_per_day"] == core.quotas.in_use("default")["cpu_seconds_per_day"]


@pytest.mark.parametrize("may_have_committed", [False, True])
async def test_a_program_ran_though_its_use_could_not_be_counted(
    core: Core, monkeypatch: pytest.MonkeyPatch, may_have_committed: bool
) -> None:
    """Else a client would run it again. What isn't counted yet is, once it can be."""
    write = core.store.database.write_unsynced

    async def away(*args: Any) -> None:
        if may_have_committed:
            await write(*args)
        raise DatabaseAway(may_have_committed=may_have_committed)

    monkeypatch.setattr(core.store.database, "write_unsynced", away)
    for _ in range(2):
        assert (await core.execute("print('hi')")).stdout == b"hi\n"
    assert [day.runs for day in await core.store.usage.days(None, 0, 1 << 20)] == ([2] if may_have_committed else [])
    monkeypatch.undo()
    await core.execute("pass")
    await until_counted(core, 3)


async def until_counted(core: Core, runs: int) -> None:
    async with asyncio.timeout(60):
        while [day.runs for day in await core.store.usage.days(None, 0, 1 << 20)] != [runs]:  # noqa: ASYNC110  nothing tells of it
            await asyncio.sleep(0.05)


async def test_what_was_not_counted_is_when_the_service_stops(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*args: Any) -> None:
        raise DatabaseAway(may_have_committed=False)

    monkeypatch.setattr("era.core.concurrency.late_ends.delay", lambda _: 3600.0)
    monkeypatch.setattr("era.core.concurrency.late_ends._LONGEST_PAUSE", 3600.0)
    with monkeypatch.context() as patch:
        patch.setattr(core.store.database, "write_unsynced", away)
        await core.execute("pass")
    await core.store.close()
    after = SqlStore(f"sqlite:///{core.directory}/era.sqlite", Retention())
    await after.open()
    assert [day.runs for day in await after.usage.days(None, 0, 1 << 20)] == [1]
    await after.close()


async def test_old_usage_is_dropped_and_sizes_are_the_most_that_was_seen(core: Core) -> None:
    today = day_of(now())
    await core.store.usage.add_use(Use("default", "", today - 10))
    await core.store.usage.note_sizes({"default": (5, 70)})
    await core.store.usage.note_sizes({"default": (9, 50)})
    days = await core.store.usage.days(None, 0, today + 1)
    assert [(day.runs, day.storage_bytes, day.disk_bytes) for day in days] == [(0, 9, 70), (1, None, None)]
    assert await core.store.usage.prune(9) == 1
    assert len(await core.store.usage.days("default", 0, today + 1)) == 1
