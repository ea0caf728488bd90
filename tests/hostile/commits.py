"""Commits as runs make them, without a sandbox: files, data and a version that belong together.

The files and the data of version n follow from n alone, so any version can be checked to be whole and to have nothing
of another.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import cast

from era.core.models import NewSession, RunRecord, Session, now
from era.core.ports import Sandbox
from era.core.trees.blob_store import BlobStore
from era.core.trees.snapshots import Snapshots
from era.store.metadata import SqlStore
from tests.core.lab import LIMITS
from tests.owners import mine

SESSION = "s"
LARGE = 1_200_000


class FakeSandbox:
    """The part of a sandbox that snapshots use."""

    uid, limits, opens_on_host = None, LIMITS, True

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace
        self.id = str(workspace)
        workspace.mkdir(exist_ok=True)

    def may_have_packages(self) -> bool:
        return False

    @property
    def sandbox(self) -> Sandbox:
        return cast(Sandbox, self)


def files_of(n: int) -> dict[str, bytes]:
    """The files of version n: some change with each version, some now and then, some exist in a few versions only."""
    if n <= 1:
        return {}
    files = {f"f{i}": f"content {i} of {(n - i) // 3}".encode() * 20 for i in range(3)}
    files["always"] = b"the same in all versions"
    files[f"d{n % 4}/deep/file"] = f"only in {n}".encode()
    if n % 5 == 0:
        files["large"] = n.to_bytes(4, "big") * (LARGE // 4)
    if n % 7 == 6:
        files |= {f"many/{i}": f"{i} of {n}".encode() for i in range(300)}
    return files


def fill(workspace: Path, files: dict[str, bytes]) -> None:
    """Make a working directory hold exactly `files`."""
    for path in sorted(workspace.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in files:
            path.unlink()
    for name, content in files.items():
        path = workspace / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)


def read(workspace: Path) -> dict[str, bytes]:
    """The files of a working directory, by path."""
    return {str(path.relative_to(workspace)): path.read_bytes() for path in workspace.rglob("*") if path.is_file()}


class Commits:
    """One session's commits over stores that the caller opens and closes."""

    def __init__(self, store: SqlStore, blobs: BlobStore, workspace: Path, *, session: str = SESSION) -> None:
        self.store = store
        self.snapshots = Snapshots(blobs, grace_seconds=0.0)
        self.place = FakeSandbox(workspace)
        self.session_id = mine(session)
        self._runs = 0

    async def create(self) -> None:
        """Create the session."""
        await self.store.create_session(
            NewSession(
                id=self.session_id,
                language="python",
                persistent=True,
                data=json.dumps({"n": 1}),
                metadata={},
                allow_internet=False,
                allow_public=False,
                default_timeout=30.0,
            )
        )

    async def commit(self) -> int:
        """Make the next version as a run does; returns its number. Raises what a commit raises."""
        self._runs += 1
        run_id = f"{self.session_id} {os.getpid()} {self._runs}"
        # Of every second run nobody is told before it has ended.
        session = await self.store.begin_run(self.session_id, run_id, durably=self._runs % 2 == 0)
        n = session.version + 1
        fill(self.place.workspace, files_of(n))
        try:
            snapshot = await self.snapshots.take(self.place.sandbox, session.snapshot, session_id=mine("s"))
            record = RunRecord(run_id, session.key, "ok", started_at=now(), ended_at=now(), committed=True)
            ended = await self.store.end_run(replace(record), data=json.dumps({"n": n}), snapshot=snapshot)
        except BaseException:
            self.snapshots.forget(self.place.id)  # As with the sandbox of a run that failed.
            raise
        assert ended.version == n
        return n

    async def check(self, scratch: Path) -> Session:
        """Check that data and files are those of one version, and that each version has its run; returns the
        session."""
        session = await self.store.session(self.session_id)
        records = await self.store.runs(session.key, session.version + 1000)  # many failed where the disk is full
        assert [record.version for record in records if record.status == "ok"] == [*range(session.version, 1, -1)]
        assert json.loads(session.data) == {"n": session.version}
        shutil.rmtree(scratch, ignore_errors=True)
        place = FakeSandbox(scratch)
        await self.snapshots.restore(session.snapshot, place.sandbox, session_id=mine("s"))
        self.snapshots.forget(place.id)
        assert read(scratch) == files_of(session.version)
        shutil.rmtree(scratch)
        return session

    async def collect(self) -> int:
        """Collect garbage; returns how many blobs went."""
        return await self.snapshots.collect_garbage(await self.store.snapshot_roots())

    async def reachable(self) -> set[str]:
        """The digests of all blobs that some row needs."""
        return set(self.snapshots.sizes_of(await self.store.snapshot_roots()))
