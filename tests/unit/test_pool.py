"""core.SandboxPool: who has which sandbox, who waits, who is evicted, and how many there are."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from era.core.models import EMPTY, Session, Snapshot
from era.core.pool import pool as pools
from era.core.pool import ready_sandboxes
from era.core.ports import Sandbox
from era.core.telemetry import Event, SandboxClosed
from era.errors import SandboxFailed, TooBusy
from era.languages import runtimes
from tests.owners import mine
from tests.unit.core import Core, until


async def used(core: Core, session: Session) -> Sandbox:
    """The session's sandbox, after a run that changed nothing."""
    sandbox = await core.pool.acquire(session)
    core.pool.committed(session.key, session.snapshot)
    return sandbox


async def sessions(core: Core, count: int) -> list[Session]:
    return [await core.session(f"s{number}") for number in range(count)]


async def snapshot_with(core: Core, name: str) -> Snapshot:
    """A snapshot that holds one file."""
    sandbox = await core.pool.acquire_temporary("python", owner="default")
    (sandbox.workspace / name).write_text(name)
    snapshot = await core.snapshots.take(sandbox, EMPTY, session_id=mine("s"))
    await core.pool.discard(sandbox)
    return snapshot


async def free_places(core: Core, most: int) -> int:
    """How many more sandboxes can be had at once, of at most so many; they are given back."""
    taken: list[Sandbox] = []
    try:
        while len(taken) <= most:
            async with asyncio.timeout(0.1):
                taken.append(await core.pool.acquire_temporary("python", owner="default"))
    except TimeoutError:
        pass
    for sandbox in taken:
        await core.pool.discard(sandbox)
    return len(taken)


async def test_a_session_keeps_its_sandbox(core: Core) -> None:
    session, other = await sessions(core, 2)
    sandbox = await used(core, session)
    assert await used(core, session) is sandbox
    assert await used(core, other) is not sandbox
    assert core.pool.counts() == {"live": 2, "busy": 0, "ready": 0}


@pytest.mark.parametrize("change", [{"limits": {"pids": 20}}, {"isolation": "bubblewrap"}, {"package_set": "digest"}])
async def test_another_kind_of_sandbox_replaces_it(core: Core, change: dict[str, Any]) -> None:
    (session,) = await sessions(core, 1)
    first = await used(core, session)
    second = await used(core, replace(session, **change))
    assert second is not first
    assert core.driver.alive == [second]
    assert core.packages.needed == ([change["package_set"]] if "package_set" in change else [])


async def test_a_dead_sandbox_is_replaced(core: Core) -> None:
    (session,) = await sessions(core, 1)
    first = await used(core, session)
    core.driver.made[0].kill()
    assert await used(core, session) is not first
    assert core.pool.counts()["live"] == 1


async def test_one_that_can_t_be_brought_to_a_snapshot_is_replaced(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    (session,) = await sessions(core, 1)
    first, snapshot, real, failures = (
        await used(core, session),
        await snapshot_with(core, "one"),
        core.snapshots.restore,
        [1],
    )

    async def restore(snapshot: Snapshot, sandbox: Sandbox, **options: Any) -> None:
        if failures:
            failures.pop()
            raise SandboxFailed("the disk said no")
        await real(snapshot, sandbox, **options)

    monkeypatch.setattr(core.snapshots, "restore", restore)
    second = await core.pool.acquire(replace(session, snapshot=snapshot))
    assert second is not first
    assert core.driver.alive == [second]
    assert [path.name for path in second.workspace.iterdir()] == ["one"]


async def test_a_new_one_that_can_t_be_filled_is_closed(small: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    (session,) = await sessions(small, 1)
    snapshot = await snapshot_with(small, "one")

    async def restore(*_: Any, **__: Any) -> None:
        raise SandboxFailed("the disk said no")

    with monkeypatch.context() as patch:
        patch.setattr(small.snapshots, "restore", restore)
        for _ in range(3):
            with pytest.raises(SandboxFailed):
                await small.pool.acquire(replace(session, snapshot=snapshot))
    assert small.driver.alive == []
    assert await free_places(small, 2) == 2


async def test_the_session_idle_longest_makes_room(small: Core) -> None:
    one, two, three = await sessions(small, 3)
    first, second = await used(small, one), await used(small, two)
    assert await used(small, one) is first
    third = await used(small, three)
    assert set(small.driver.alive) == {first, third}
    assert not second.alive
    assert small.idle() == [one.key, three.key]


async def test_a_busy_one_is_not_evicted(small: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, three = await sessions(small, 3)
    await small.pool.acquire(one)
    second = await used(small, two)
    await small.pool.acquire(three)
    assert not second.alive
    monkeypatch.setattr(small.pool.places, "_patience", 0.1)
    with pytest.raises(TooBusy) as refused:
        await small.pool.acquire(two)
    assert "busy" in str(refused.value.hint)
    assert small.pool.counts() == {"live": 2, "busy": 2, "ready": 0}


async def test_who_waits_for_room_gets_it_when_a_run_ends_badly(small: Core) -> None:
    one, two, three = await sessions(small, 3)
    first = await small.pool.acquire(one)
    await small.pool.acquire(two)
    waiting = asyncio.create_task(small.pool.acquire(three))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    await small.pool.discard(first)
    assert (await waiting).alive


async def test_the_run_that_was_offered_first_is_ended_where_none_is_idle(small: Core) -> None:
    one, two, three = await sessions(small, 3)
    ended = []
    for session in (one, two):
        sandbox = await small.pool.acquire(session)

        async def end(session: Session = session, sandbox: Sandbox = sandbox) -> None:
            ended.append(session)
            small.pool.committed(session.key, EMPTY)

        small.pool.offer(session.key, end)
    await small.pool.acquire(three)
    assert ended == [one]
    assert small.pool.counts() == {"live": 2, "busy": 2, "ready": 0}


async def test_an_offer_can_be_taken_back_and_ends_with_the_run(small: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, three = await sessions(small, 3)

    async def end() -> None:
        raise AssertionError("this run may not be ended")

    await small.pool.acquire(one)
    small.pool.offer(one.key, end)
    small.pool.offer(one.key, None)
    await small.pool.acquire(two)
    small.pool.offer(two.key, end)
    small.pool.committed(two.key, EMPTY)
    await small.pool.acquire(two)
    monkeypatch.setattr(small.pool.places, "_patience", 0.1)
    with pytest.raises(TooBusy):
        await small.pool.acquire(three)


async def test_temporary_ones_take_room_too(small: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [await small.pool.acquire_temporary("python", owner="default") for _ in range(2)]
    monkeypatch.setattr(small.pool.places, "_patience", 0.1)
    with pytest.raises(TooBusy):
        await small.pool.acquire_temporary("python", owner="default")
    for sandbox in made:
        await small.pool.discard(sandbox)
    assert small.driver.alive == []
    assert await free_places(small, 2) == 2


async def test_what_a_session_that_has_moved_leaves_is_removed(directory: Path, template: Path) -> None:
    notes: list[Event] = []
    async with Core.opened(directory, template, max_warm=2, note=notes.append) as core:
        session, other = await sessions(core, 2)
        sandbox = await core.pool.acquire(session)
        assert core.pool.is_busy(session.key)
        core.pool.committed(session.key, session.snapshot)
        assert core.pool.has(session.key)
        assert not core.pool.is_busy(session.key)
        await used(core, other)
        core.pool.release_soon(session.key, pools.MOVED)
        assert core.pool.is_busy(session.key), "it is just being closed"
        await until(lambda: not core.pool.has(session.key))
        assert not sandbox.alive
        assert SandboxClosed(sandbox.id, "moved", session.id, session.owner) in notes
        assert core.pool.counts() == {"live": 1, "busy": 0, "ready": 0}
        assert await free_places(core, 5) == 2, "the other one's makes way"


async def test_what_is_idle_for_long_or_dead_is_closed(
    directory: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "_SWEEP_SECONDS", 0.01)
    async with Core.opened(directory, template, idle_seconds=60) as core:
        await core.pool.start()
        busy, idle, dead = await sessions(core, 3)
        await core.pool.acquire(busy)
        for session in (idle, dead):
            await used(core, session)
        core.driver.made[-1].kill()
        await until(lambda: core.pool.counts()["live"] == 2)
        assert core.idle() == [idle.key]
        monkeypatch.setattr(core.pool, "_idle_seconds", 0.2)
        await until(lambda: core.pool.counts()["live"] == 1)
        await asyncio.sleep(0.3)
        assert core.pool.counts() == {"live": 1, "busy": 1, "ready": 0}


async def test_spares_are_ready_and_made_anew(directory: Path, template: Path) -> None:
    async with Core.opened(directory, template, spares=2) as core:
        await core.pool.start()
        await until(lambda: core.pool.counts()["ready"] == 2 * len(runtimes()))
        (session,) = await sessions(core, 1)
        spares: list[Sandbox] = [sandbox for sandbox in core.driver.made if sandbox._language == "python"]
        assert await used(core, session) is spares[0]
        await until(lambda: core.pool.counts()["ready"] == 2 * len(runtimes()))


async def test_spares_are_the_usual_kind_only(directory: Path, template: Path) -> None:
    async with Core.opened(directory, template, spares=1) as core:
        await core.pool.start()
        await until(lambda: core.pool.counts()["ready"] == len(runtimes()))
        spares: list[Sandbox] = list(core.driver.made)
        changes: list[dict[str, Any]] = [{"limits": {"pids": 20}}, {"package_set": "digest"}]
        for number, change in enumerate(changes):
            session = await core.session(f"s{number}")
            assert await used(core, replace(session, **change)) not in spares


async def test_spares_that_can_t_be_made_are_tried_again(
    directory: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ready_sandboxes, "_PAUSE", 0.01)
    async with Core.opened(directory, template, spares=1) as core:
        core.driver.refusals = 7
        await core.pool.start()
        await until(lambda: core.pool.counts()["ready"] == len(runtimes()))
