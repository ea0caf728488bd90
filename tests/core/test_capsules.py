"""Sessions leave and come back as they were, and collections of garbage don't hurt."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import threading
from collections.abc import Sequence
from contextlib import closing
from contextvars import ContextVar
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from era.core.capsules import exports, imports
from era.core.capsules import service as service_module
from era.core.capsules.manifest import RECORD_FIELDS, CodeValues, RunValues, SessionValues
from era.core.capsules.service import _EXPORTS_OF_OWNER
from era.core.limits import Rules
from era.core.metadata import Retention, SessionFilter
from era.core.models import (
    DEFAULT_OWNER,
    KeptOutputs,
    KeptVersion,
    NewSession,
    OwnedId,
    RunRecord,
    Session,
    StoredCode,
    Version,
    VersionContent,
    now,
)
from era.core.sessions.versions import HistoryBound
from era.core.trees.pins import Pins
from era.core.trees.snapshots import Snapshots
from era.errors import BadRequest, Conflict, NotFound, TooBusy, TooLarge, Unavailable
from era.store.blobs.blobs import LocalBlobs
from era.wire.files import files_answer
from tests import capsules
from tests.capsules import document, edited, file, of_files, packed, parts, run, session, tree, version
from tests.conftest import eventually
from tests.core.lab import LIMITS, described
from tests.core.moving import Service, portable_fields
from tests.owners import mine
from tests.soaking import soak_the_rest


@pytest.mark.slow
async def test_all_of_a_session_comes_back(tmp_path: Path) -> None:
    """On the same server, on another one, and back there from a copy of the copy."""
    async with Service.at(tmp_path / "here") as here, Service.at(tmp_path / "there") as there:
        place = await here.make("s")
        content = await here.export("s")
        assert [name for name, _ in parts(content)[:3]] == ["capsule.json", "README.txt", "SHA256SUMS"]
        json.loads(parts(content)[0][1])

        original = await here.store.session(mine("s"))
        for service, name in ((here, "again"), (there, None)):
            made = await service.load(content, name)
            assert made.id == (name or "s")
            assert portable_fields(made) == portable_fields(original)
            assert await service.restored(made.snapshot) == described(place.workspace)
            assert await versions_of(service, made.id) == await versions_of(here, "s")
            assert await runs_of(service, made.id) == await runs_of(here, "s", imported=True)
        again = await there.export("s")
        made = await here.load(again, "third")
        assert await versions_of(here, "third") == await versions_of(here, "s")
        assert await runs_of(here, "third") == await runs_of(here, "again")
        ids = {record.id for key in (original.key, made.key) for record in await here.store.runs(key, 10)}
        assert len(ids) == 4 + 3
        assert (await here.store.counts())["runs"] == {"ok": 3, "running": 1}
        assert (await there.store.counts())["runs"] == {}
        assert await there.collect() == 0


async def versions_of(service: Service, session_id: str) -> list[tuple[Any, ...]]:
    found = []
    for each in await service.store.versions(mine(session_id), limit=100, before=None):
        content = await service.store.version(mine(session_id), each.n)
        run_id = each.run_id and each.run_id.partition("-")[0]
        if each.run_id:
            await service.store.run(mine(session_id), each.run_id)
        found.append((each.n, each.created_at, each.cause, run_id, each.snapshot, content.data))
    return found


async def runs_of(service: Service, session_id: str, *, imported: bool = False) -> list[tuple[Any, ...]]:
    found = []
    session = await service.store.session(mine(session_id))
    for record in await service.store.runs(session.key, 100):
        if record.status == "running":
            continue
        fields_ = {field: getattr(record, field) for field in RECORD_FIELDS}
        fields_["id"] = record.id.partition("-")[0]
        if imported:
            fields_["enforced"] = {"imported": True, **record.enforced}
        found.append((fields_, (await service.store.run(mine(session_id), record.id))[1]))
    return found


TIMES = [-(2**63) * 10**9, -(2**63) - 1, 2**63, 2**63 * 10**9 - 1]


@pytest.mark.parametrize("time", soak_the_rest(TIMES, [TIMES[0], TIMES[-1]]))
async def test_a_file_may_have_any_time_that_the_kernel_has(service: Service, time: int) -> None:
    """A program sets it as it likes, and some file systems store all. Where one doesn't, it is the nearest."""
    made = await service.load(of_files(tree(file("a", b"", mtime=time), ("link", "b", "a", time)), b""))
    assert set(await service.restored(made.snapshot)) == {b"a", b"b"}
    (shown, _) = files_answer(await service.lab.snapshots.entries(made.snapshot, mine("s")))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", shown["modified_at"])


async def test_history_can_be_left_out(service: Service) -> None:
    place = await service.make("s")
    made = await service.load(await service.export("s", history=False), "now")
    assert await service.restored(made.snapshot) == described(place.workspace)
    assert [each[0] for each in await versions_of(service, "now")] == [3]
    assert await service.store.runs(made.key, 10) == []
    assert (await service.store.versions(mine("now"), limit=1, before=None))[0].run_id is None
    changed = await service.store.commit(mine("now"), "data", data="{}", snapshot=None)
    assert changed.version == 4


async def test_who_has_many_exports_open_waits_with_the_next_and_keeps_no_other_owner(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has temporary files for as long as its client reads."""
    await service.make("s")
    others = OwnedId("another", "t")
    await service.load(await service.export("s"), "copy")
    await service.store.create_session(NewSession(others, "node", True, "{}", {}, True, True, 9.0))
    for _ in range(_EXPORTS_OF_OWNER + 1):
        with pytest.raises(NotFound):
            await service.capsules.open(mine("nobody"))
    opened = [await service.capsules.open(mine("s")) for _ in range(_EXPORTS_OF_OWNER)]
    waiting = asyncio.create_task(service.capsules.open(mine("copy")))
    await asyncio.wait([waiting], timeout=0.5)
    (await service.capsules.open(others)).close()
    assert not waiting.done()
    monkeypatch.setattr(service_module, "_WAIT_SECONDS", 0.1)
    with pytest.raises(TooBusy):
        await service.capsules.open(mine("copy"))
    opened.pop().close()
    for export in (await waiting, *opened):
        export.close()


async def test_nothing_of_an_export_is_cleared_away(service: Service) -> None:
    """Not even where the session is purged before the first byte is sent."""
    place = await service.make("s")
    expected = described(place.workspace)
    export = await service.capsules.open(mine("s"), history=True)
    await service.store.purge_session(mine("s"))
    before = service.stored()
    assert await service.collect() == 0
    content = b"".join([chunk async for chunk in export.chunks()])
    export.close()
    assert await service.collect() == len(before) > 0
    assert service.stored() == set()
    made = await service.load(content)
    assert await service.restored(made.snapshot) == expected


async def test_nothing_of_an_export_is_cleared_away_by_another_host(tmp_path: Path) -> None:
    """One host collects garbage for all, and knows nothing of the others' exports."""
    async with Service.at(tmp_path / "s", shared=True, grace_seconds=3) as service:
        place = await service.make("s")
        expected = described(place.workspace)
        service.grow_old()
        export = await service.capsules.open(mine("s"), history=True)
        await service.store.purge_session(mine("s"))
        await collected_elsewhere(service)
        assert service.new() == service.stored()
        for _ in range(2):
            service.grow_old()
            renewed = await asyncio.to_thread(eventually, lambda: service.new() == service.stored())
            assert renewed, "it counts as put again and again"
            assert await collected_elsewhere(service) == 0
        content = b"".join([chunk async for chunk in export.chunks()])
        export.close()
        service.grow_old()
        assert await collected_elsewhere(service) > 0
        made = await service.load(content)
        assert await service.restored(made.snapshot) == expected


async def test_an_export_whose_content_another_host_removes_fails_before_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Service.at(tmp_path / "s", shared=True, grace_seconds=3600) as service:
        await service.make("s")
        plan = service.capsules._exporter._plan

        def removed_after(contents: Any) -> Any:
            planned = plan(contents)
            service.grow_old()
            assert asyncio.run(collected_elsewhere(service, rows=False)) > 0
            return planned

        monkeypatch.setattr(service.capsules._exporter, "_plan", removed_after)
        with pytest.raises(Unavailable, match="removed meanwhile"):
            await service.capsules.open(mine("s"), history=True)
        assert not service.pins._held


async def collected_elsewhere(service: Service, *, rows: bool = True) -> int:
    """What another host removes, for which what was put a minute ago is old: what `rows` don't need, or all."""
    blobs = LocalBlobs(service.place / "blobs", "elsewhere")
    blobs.open()
    snapshots = Snapshots(blobs, grace_seconds=60)
    try:
        roots, others = await Pins().needed(service.store) if rows else ((), ())
        return await snapshots.collect_garbage(roots, others)
    finally:
        await snapshots.close()
        blobs.close()


async def test_a_collection_waits_for_what_an_export_reads(service: Service) -> None:
    await service.make("s")
    async with service.pins.pinning() as pin:
        collecting = asyncio.create_task(service.pins.needed(service.store))
        await asyncio.sleep(0.05)
        assert not collecting.done()
        pin.roots.add("a root")
    assert "a root" in (await collecting)[0]
    service.pins.release(pin)
    assert "a root" not in (await service.pins.needed(service.store))[0]
    with pytest.raises(NotFound):
        await service.capsules.open(mine("nobody"))
    assert not service.pins._held


async def test_what_is_refused_leaves_nothing(service: Service) -> None:
    """No row, no blob, no file; and what was put before the refusal is swept."""
    content = of_files(tree(file("a", b"a")), b"a")
    first, *rest = parts(content)[3:]
    damaged = packed([*parts(content)[:3], *sorted([(first[0], b"b" * len(first[1])), *rest])])
    slow = edited(content, lambda text: text.replace(b'"default_timeout": 30', b'"default_timeout": 3601'))
    for bad in (damaged, slow, content[:2000], b"", edited(content, lambda _: document(runs=[run(), run()]))):
        with pytest.raises(BadRequest):
            await service.load(bad)
        assert service.stored() == set()
    twice = edited(content, lambda text: document(versions=[version(tree(file("a", b"a")))], runs=[run(), run()]))
    with pytest.raises(BadRequest, match="two runs"):
        await service.load(twice)
    assert (await service.store.counts())["sessions"] == 0
    assert await service.collect() == 2
    assert service.stored() == set()

    await service.load(content)
    with pytest.raises(Conflict, match="exists"):
        await service.load(content)
    assert await service.collect() == 0
    assert len(list(service.place.iterdir())) == len({"blobs", "era.sqlite", "-wal", "-shm"})


async def test_retention_is_this_servers(tmp_path: Path) -> None:
    """A server that keeps less history than the capsule has makes none of the rest."""
    kept = {"stdout": capsules.digest(b"x"), "stderr": capsules.digest(b""), "stdout_bytes": 1}
    text = document(
        session(version=5),
        [version(version=n, data={"n": n}) for n in range(1, 6)],
        [run(id=f"run_{n}", **kept) for n in range(4)],
    )
    async with Service.at(tmp_path / "here", Retention(versions=2, outputs=1, runs=3)) as service:
        made = await service.load(capsules.capsule(text, b"x", b""))
        assert [each.n for each in await service.store.versions(mine("moved"), limit=9, before=None)] == [5, 4]
        outputs = [(await service.store.run(mine("moved"), f"run_{n}"))[1] for n in range(1, 4)]
        assert outputs == [None, None, KeptOutputs(b"x", b"")]
        assert [record.id for record in await service.store.runs(made.key, 9)] == ["run_3", "run_2", "run_1"]


class WatchedHistory(HistoryBound):
    """Notes the versions of each import that are to be counted."""

    counted: Sequence[int] = ()

    async def not_imported(self, session: Session, older: Sequence[KeptVersion]) -> Sequence[int]:
        self.counted = sorted(version.n for version in older)
        return await super().not_imported(session, older)


async def test_only_what_is_kept_is_counted(tmp_path: Path) -> None:
    """A capsule may have any number of versions."""
    listed = [version(version=n) for n in range(1, 10)]
    listed[1]["name"] = "first"
    for n in (3, 4, 5):
        listed[n - 1]["cause"] = "checkpoint"
    async with Service.at(tmp_path / "here", Retention(versions=2, checkpoints=1)) as service:
        history = WatchedHistory(service.store, service.lab.snapshots, Rules(LIMITS, LIMITS))
        service.capsules._importer._history = history
        await service.load(capsules.capsule(document(session(version=9), listed)))
        assert history.counted == [2, 5, 8]
        found = await service.store.versions(mine("moved"), limit=99, before=None)
        assert [each.n for each in found] == [9, 8, 5, 2]


@pytest.mark.parametrize("job", ["_write", "check", "_kept_versions", "kept_outputs"])
async def test_the_file_of_a_cancelled_import_is_open_while_a_thread_uses_it(
    job: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its descriptor could be another file's, which the thread would read or write."""
    whole, began, goes_on, over = getattr(imports, job), threading.Event(), threading.Event(), threading.Event()
    failures = []

    def held(*arguments: Any) -> Any:
        began.set()
        goes_on.wait(60)
        try:
            return whole(*arguments)
        except Exception as error:
            failures.append(error)
            raise
        finally:
            over.set()

    monkeypatch.setattr(imports, job, held)
    kept = {"stdout": capsules.digest(b"x"), "stderr": capsules.digest(b""), "stdout_bytes": 1}
    loading = asyncio.create_task(service.load(capsules.capsule(document(runs=[run(**kept)]), b"x", b"")))
    assert await asyncio.to_thread(began.wait, 60)
    for _ in range(2):
        loading.cancel()
        await asyncio.wait([loading], timeout=0.1)
    goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert await asyncio.to_thread(over.wait, 60)
    assert failures == []
    assert (await service.store.counts())["sessions"] == 0


def large(versions: int = 6, runs: int = 130) -> bytes:
    """A capsule whose import takes several transactions."""
    root = tree(file("a", b"a"))
    listed = [version(root, version=n, data={"n": n, "pad": "x" * 100_000}) for n in range(1, versions + 1)]
    return capsules.capsule(
        document(session(version=versions), listed, [run(id=f"run_{n}") for n in range(runs)]), root, b"a"
    )


_IMPORTS = ContextVar("_IMPORTS", default=False)
"""Whether it is an import that goes on."""


class Steps:
    """Calls a function after each transaction of an import, in which others can be seen to go on."""

    def __init__(self, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen = 0
        self._looks = False
        write = service.store.database.write

        async def write_and_look(job: Any, *args: Any, **kwargs: Any) -> Any:
            done = await write(job, *args, **kwargs)
            if _IMPORTS.get() and not self._looks:
                self.seen += 1
                self._looks = True
                try:
                    await self._look(self.seen)
                finally:
                    self._looks = False
            return done

        monkeypatch.setattr(service.store.database, "write", write_and_look)

    async def during(self, load: Any, look: Any) -> Session:
        async def imports() -> Session:
            _IMPORTS.set(True)
            made: Session = await load
            return made

        self._look = look
        self._task = asyncio.create_task(imports())
        made: Session = await self._task
        return made


async def test_an_import_is_in_nobodys_way_and_in_sight_when_it_is_complete(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    await service.make("s")
    steps = Steps(service, monkeypatch)

    async def look(step: int) -> None:
        """Another session goes on between two transactions of the import, of which nobody sees anything."""
        before = await service.store.session(mine("s"))
        after = await service.store.commit(mine("s"), "data", data=f'{{"step":{step}}}', snapshot=None)
        assert after.version == before.version + 1
        if step < LAST:
            with pytest.raises(NotFound):
                await service.store.session(mine("moved"))
            with pytest.raises(NotFound):
                await service.store.restore_session(mine("moved"))
            with pytest.raises(NotFound):
                await service.store.purge_session(mine("moved"))
            for gone in (None, "expired", "deleted"):
                listed = await service.store.sessions(SessionFilter(DEFAULT_OWNER, removed=gone))
                assert [each.id for each in listed] == (["s"] if gone is None else [])
            assert await service.store.purge(now()) == 0, "somebody is still at it"
        if step > 4:
            assert await service.collect() == 0, "its versions hold what they need also while nobody sees them"

    LAST = 1 + 3 + 2 + 1  # noqa: N806  itself, runs, versions, and the one that shows it
    made = await steps.during(service.load(large()), look)
    assert steps.seen == LAST
    assert (made.version, json.loads(made.data)["n"]) == (6, 6)
    assert len(await service.store.runs(made.key, 1000)) == 130
    assert len(await service.store.versions(mine("moved"), limit=100, before=None)) == 6


@pytest.mark.parametrize("at", range(1, 7))
async def test_an_import_cut_short_leaves_nothing(at: int, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(service, monkeypatch)

    async def look(step: int) -> None:
        if step == at:
            raise Unavailable("the database failed")

    with pytest.raises(Unavailable):
        await steps.during(service.load(large()), look)
    assert await service.store.snapshot_roots() == []
    assert await service.store.purge(now()) == 0
    assert rows_of_sessions(service) == 0
    await service.collect()
    assert service.stored() == set()


def rows_of_sessions(service: Service) -> int:
    with closing(sqlite3.connect(service.place / "era.sqlite")) as database:
        return int(database.execute("select count(*) from sessions").fetchone()[0])


async def test_an_id_taken_during_an_import(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(service, monkeypatch)

    async def look(step: int) -> None:
        if step == 3:
            await service.make("moved")

    with pytest.raises(Conflict, match="exists"):
        await steps.during(service.load(large()), look)
    assert (await service.store.session(mine("moved"))).language == "node"
    assert (await service.store.counts())["sessions"] == 1
    assert await service.store.purge(now()) == 0


async def test_no_capsule_is_written_that_could_not_be_read(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    await service.make("s")
    count = len(parts(await service.export("s"))) - 3
    monkeypatch.setattr(exports, "MAX_OBJECTS", count)
    await service.load(await service.export("s"), "again")
    monkeypatch.setattr(exports, "MAX_OBJECTS", count - 1)
    with pytest.raises(TooLarge, match=f"{count} files, directories and outputs; {count - 1} can"):
        await service.export("s")
    assert service.pins._held == set()


def test_a_capsule_has_every_field_of_a_session() -> None:
    """Adding a field to one of these classes means deciding here what a capsule does with it."""
    names = {field.name for field in fields(Session)}
    left_out = {"key", "data", "snapshot", "expires_at", "deleted_at", "expired"}
    left_out |= {"owner"}  # it is his who imports it
    left_out |= {"setup_status", "setup_result", "package_set"}  # importing starts the setup anew
    left_out |= {"history_bytes"}  # a bound of what the versions here hold
    renamed = {"stored": "code", "setup_lock": "lock"}
    assert {renamed.get(name, name) for name in names - left_out} == SessionValues.model_fields.keys()
    left_out = {"key", "session_key", "pieces"}  # nor is the order of the pieces in it
    assert {field.name for field in fields(RunRecord)} - left_out == RECORD_FIELDS
    assert RunValues.model_fields.keys() - RECORD_FIELDS == {"stdout", "stderr"}
    assert {field.name for field in fields(StoredCode)} == CodeValues.model_fields.keys()
    assert {field.name for field in fields(Version)} == {"n", "created_at", "cause", "run_id", "snapshot", "name"}
    assert {field.name for field in fields(VersionContent)} == {"version", "data"}
