"""Collections of garbage remove what processes left that were killed."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from structlog.testing import capture_logs

from era.core.concurrency.tasks import in_background
from era.core.metadata import Retention
from era.core.models import EMPTY, Session, Snapshot, Version, VersionContent, now
from era.core.operation.garbage import collect_once
from era.core.trees.pins import Pins
from era.core.trees.snapshots import Snapshots
from era.store import sessions
from era.store.blobs.blobs import LocalBlobs
from era.store.engine import tables
from era.store.engine.database import DatabaseAway
from era.store.metadata import SqlStore
from tests.owners import mine
from tests.unit.core import Core


async def cut_off_import(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """What there is when the service was killed after it had inserted an imported session's versions."""
    session = await core.session()
    with core.blobs.batch() as batch:
        root = batch.put(b"[]")

    def versions() -> Iterator[VersionContent]:
        data = json.dumps({"more than one transaction takes": "x" * (1 << 20)})
        yield VersionContent(Version(1, now(), "create", None, Snapshot(root, 0, 0)), data)
        raise KeyboardInterrupt

    async def nothing(*_: object) -> None:
        return None

    with monkeypatch.context() as patch:
        patch.setattr(sessions, "purge_removed", nothing)
        with pytest.raises(KeyboardInterrupt):
            await core.store.load(replace(session, id="copy"), versions(), iter(()))
    assert len(await core.store.snapshot_roots()) == 1


async def collected(core: Core) -> int:
    """How many blobs are left after one collection by a service that keeps nothing of the past."""
    store = SqlStore(f"sqlite:///{core.directory}/era.sqlite", Retention(grace_seconds=0))
    await store.open()
    await collect_once(Snapshots(core.blobs, grace_seconds=-1), store, Pins())
    await store.close()
    return sum(path.is_file() for path in Path(core.directory / "blobs").rglob("*"))


async def test_what_a_killed_import_left_goes_at_once(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    await cut_off_import(core, monkeypatch)
    assert await collected(core) == 0
    assert (await core.store.session(mine("s"))).version == 1


async def test_it_would_stay_if_its_rows_did(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    await cut_off_import(core, monkeypatch)

    async def nothing(*_: object) -> int:
        return 0

    monkeypatch.setattr(SqlStore, "purge", nothing)
    assert await collected(core) == 1


async def test_an_import_that_is_cancelled_as_it_begins_leaves_nothing(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await core.session()
    insert, began, go_on = sessions.insert_incomplete_session, threading.Event(), threading.Event()

    def slow(*args: Any) -> int:
        began.set()
        assert go_on.wait(60)
        return insert(*args)

    monkeypatch.setattr(sessions, "insert_incomplete_session", slow)
    loading = asyncio.create_task(core.store.load(replace(session, id="copy"), iter(()), iter(())))
    assert await asyncio.to_thread(began.wait, 60)
    loading.cancel()
    await asyncio.wait([loading], timeout=0.1)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert await core.store.database.write(lambda rows: rows.execute(select(tables.sessions.c.id)).scalars().all()) == [
        "s"
    ]
    assert core.store.incomplete == set()


async def test_what_an_earlier_process_left_goes_once_its_grace_is_over(core: Core) -> None:
    with core.blobs.batch() as batch:
        batch.put(b"named by no row")
    after = LocalBlobs(core.directory / "blobs")
    after.open()
    snapshots = Snapshots(after, grace_seconds=1)
    removed = await snapshots.collect_garbage([])
    await asyncio.sleep(1.1)
    assert removed + await snapshots.collect_garbage([]) == 1


async def test_it_would_stay_if_nothing_counted_as_put(core: Core) -> None:
    with core.blobs.batch() as batch:
        batch.put(b"named by no row")
    after = LocalBlobs(core.directory / "blobs")
    after.open()
    after.last_put = 0.0
    snapshots = Snapshots(after, grace_seconds=3600)
    assert await snapshots.collect_garbage([]) == 0
    snapshots.grace_seconds = 0
    assert await snapshots.collect_garbage([]) == 0


async def test_an_import_that_was_completed_without_an_answer_is_as_durable_as_any(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it was deleted since, before the service knew that nobody would answer."""
    session = await core.session()
    write = core.store.database.write

    async def without_answer(job: Callable[..., Any], *args: Any, **how: Any) -> Any:
        result = await write(job, *args, **how)
        if isinstance(result, Session):
            monkeypatch.undo()
            await core.store.delete_session(mine("copy"))
            raise DatabaseAway(may_have_committed=True)
        return result

    def versions() -> Iterator[VersionContent]:
        yield VersionContent(Version(1, now(), "create", None, EMPTY), "{}")

    monkeypatch.setattr(core.store.database, "write", without_answer)
    with pytest.raises(DatabaseAway):
        await core.store.load(replace(session, id="copy"), versions(), iter(()))
    assert (await core.store.restore_session(mine("copy"))).version == 1


async def test_a_collection_that_fails_by_a_bug_is_logged_and_the_next_succeeds(core: Core) -> None:
    failures = iter([ValueError("nobody has thought of this")])

    def local() -> list[str]:
        for error in failures:
            raise error
        return []

    snapshots, pins = Snapshots(core.blobs), Pins(local)
    with capture_logs() as logged:
        assert not await collect_once(snapshots, core.store, pins)
    assert [(line["event"], line["exc_info"]) for line in logged] == [("bug", True)]
    assert await collect_once(snapshots, core.store, pins)


async def test_a_job_that_fails_for_good_is_logged_at_once() -> None:
    async def failing() -> None:
        raise ValueError("nobody has thought of this")

    with capture_logs() as logged:
        await asyncio.wait(in_background([failing()]))
        await asyncio.sleep(0)
    assert [line["event"] for line in logged] == ["background_job_ended"]
