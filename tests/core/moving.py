"""A service without API and sandboxes, to export capsules from and import them into."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from era.core.capsules.service import Capsules
from era.core.metadata import Retention
from era.core.models import (
    JsonObject,
    KeptOutputs,
    NewSession,
    RecordedProgram,
    RunRecord,
    Session,
    Snapshot,
    StoredCode,
    now,
)
from era.core.setup.package_sets import InstalledPackageSets
from era.core.totals import Bounds
from era.core.trees.pins import Pins
from era.core.trees.spool import Slots
from era.store.metadata import SqlStore
from tests.core.lab import CountingBlobs, Lab, Place, described
from tests.owners import mine

LONG = os.urandom(40_000)
DESTINATION: JsonObject = {
    **{"host": "ü", "port": 443, "address": None, "allowed": False, "reason": "no_such_host"},
    **{"connections": 1, "sent": 0, "received": 0},
}
EGRESS: JsonObject = {"destinations": [DESTINATION], "more": 3}
PROGRAMS = {
    "run_1_a": RecordedProgram("print('ü')", {"args": ["-v"]}),
    "run_2_b": RecordedProgram(None, {"command": ["echo", "ü"], "truncated": True}),
    "run_3_c": RecordedProgram(),
}
"""What each of the runs of a session that `make` makes ran."""

FAR_NS = 2**63 + 10**9
"""A file's time in the year 2262: the first of those that take more than 64 bits in nanoseconds."""


class Service:
    """The stores of rows and of blobs, and the capsules over both. It stands for the package sets, too."""

    def __init__(self, place: Path, retention: Retention, *, shared: bool, grace_seconds: float) -> None:
        place.mkdir()
        self.place = place
        self.lab = Lab(place, grace_seconds=grace_seconds)
        self.blobs: CountingBlobs = self.lab.blobs
        self.store = SqlStore(f"sqlite:///{place}/era.sqlite", retention)
        self.pins = Pins(shared=shared)
        package_sets = cast(InstalledPackageSets, self)
        self.capsules = Capsules(
            self.store, self.lab.snapshots, self.blobs, self.pins, package_sets, place, Slots(4), 3600, Bounds()
        )
        self.locks: dict[str, JsonObject] = {}

    @classmethod
    @asynccontextmanager
    async def at(
        cls,
        place: Path,
        retention: Retention = Retention(),  # noqa: B008  it is frozen
        *,
        shared: bool = False,
        grace_seconds: float = 0,
    ) -> AsyncIterator[Service]:
        """A service that is open within the block; with `shared` as a host whose content others collect, too."""
        service = cls(place, retention, shared=shared, grace_seconds=grace_seconds)
        await service.store.open()
        try:
            yield service
        finally:
            await service.capsules.close()
            await service.lab.snapshots.close()
            await service.store.close()

    async def ensure(self, digest: str) -> None:
        """See InstalledPackageSets, for which this stands."""

    def lock(self, session: Session) -> JsonObject | None:
        return self.locks.get(session.package_set or "")

    async def export(self, session_id: str, *, history: bool = True) -> bytes:
        export = await self.capsules.open(mine(session_id), history=history)
        try:
            content = b"".join([chunk async for chunk in export.chunks()])
        finally:
            export.close()
        assert len(content) == export.size
        return content

    async def load(self, content: bytes, new_id: str | None = None) -> Session:
        async def chunks() -> AsyncIterator[bytes]:
            for at in range(0, len(content), 100_000):
                yield content[at : at + 100_000]

        return await self.capsules.load(chunks(), mine(""), new_id, public=True)

    async def collect(self) -> int:
        return await self.lab.snapshots.collect_garbage(*await self.pins.needed(self.store))

    def grow_old(self) -> None:
        """Have all blobs be put an hour ago."""
        for path in self._blob_files():
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 3600))

    def new(self) -> set[str]:
        """The blobs that count as put just now."""
        return {path.name for path in self._blob_files() if path.stat().st_mtime > time.time() - 60}

    def _blob_files(self) -> list[Path]:
        return [path for path in (self.place / "blobs").rglob("*") if path.is_file() and path.name != "lock"]

    def stored(self) -> set[str]:
        return {path.name for path in self._blob_files()}

    async def restored(self, snapshot: Snapshot) -> dict[bytes, tuple[Any, ...]]:
        place = self.lab.place()
        await self.lab.snapshots.restore(snapshot, place.sandbox, session_id=mine("s"))
        return described(place.workspace)

    async def make(self, session_id: str) -> Place:
        """A session with three versions, stored code, and runs whose outputs are long, short and not kept."""
        stored = StoredCode("print('ü')", "what it says", 7)
        await self.store.create_session(
            NewSession(
                mine(session_id),
                "node",
                True,
                '{"n":1}',
                {"a": ["b"]},
                False,
                True,
                12.5,
                ttl=1000,
                egress={"allow": ["*.a.test"]},
                record_code=False,
            )
        )
        await self.store.store_code(mine(session_id), stored)
        place = self.lab.place()
        furnish(place.workspace)
        snapshot = await self.lab.snapshots.take(place.sandbox, Snapshot(), session_id=mine("s"))
        await self._run(session_id, "run_1_a", '{"n":2.5e-07,"u":"\u2028ü"}', snapshot, LONG, b"\xff")
        (place.workspace / "new").write_text("new")
        snapshot = await self.lab.snapshots.take(place.sandbox, snapshot, session_id=mine("s"))
        await self._run(session_id, "run_2_b", None, snapshot, b"short", b"")
        await self._run(session_id, "run_3_c", None, None, None, None)
        await self.store.begin_run(mine(session_id), "run_4_d")  # this one is under way
        return place

    async def _run(
        self,
        session_id: str,
        run_id: str,
        data: str | None,
        snapshot: Snapshot | None,
        stdout: bytes | None,
        stderr: bytes | None,
    ) -> None:
        begun = await self.store.begin_run(mine(session_id), run_id, program=lambda _: PROGRAMS[run_id])
        kept = None
        if stdout is not None and stderr is not None:
            with self.blobs.batch() as batch:
                long = batch.put(stdout) if len(stdout) > 20_000 else None
            kept = KeptOutputs(None if long else stdout, stderr, long, None)
        record = RunRecord(
            run_id,
            begun.key,
            "ok",
            now(),
            now(),
            0,
            12,
            len(stdout or b"xx"),
            len(stderr or b""),
            committed=snapshot is not None,
            reason=None if snapshot else "no reason",
            peak_memory_bytes=5,
            cpu_us=6,
            reaped=0,
            enforced={"walls": ["a"]},
            egress=EGRESS,
            artifacts={"files": [{"type": "image/png", "path": "ü.png", "size": 7}], "more": 1},
        )
        await self.store.end_run(record, data=data, snapshot=snapshot, outputs=kept)


def furnish(workspace: Path) -> None:
    """Fill a working directory with every kind of entry and odd names."""
    (workspace / "empty").mkdir()
    (workspace / "shut").mkdir()
    (workspace / "shut" / "deep").write_bytes(LONG[:100])
    (workspace / "shut").chmod(0o500)
    (workspace / "run.sh").write_text("#!/bin/sh")
    (workspace / "run.sh").chmod(0o751)
    (workspace / "link").symlink_to("/etc/passwd")
    os.symlink(b"\xff gone", os.fsencode(workspace) + b"/dangling")
    for name in (b'quote"\\', b"new\nline", b"\xff\xfe", "schön €".encode(), b"x" * 255, b" "):
        Path(os.fsdecode(os.fsencode(workspace) + b"/" + name)).write_bytes(name)
    (workspace / "copy").write_bytes(LONG)
    (workspace / "nothing").touch()
    os.utime(workspace / "nothing", ns=(FAR_NS, FAR_NS))


def portable_fields(session: Session) -> dict[str, Any]:
    """The fields of a session that a capsule carries from one server to another."""
    values = {field.name: getattr(session, field.name) for field in fields(Session)}
    return {
        name: value
        for name, value in values.items()
        if name not in ("key", "id", "owner", "expires_at", "history_bytes")
    }
