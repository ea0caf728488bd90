"""A working directory in which processes go on, and snapshots of it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from era.core.models import EMPTY, Snapshot
from era.core.process import HeldFiles
from era.core.trees.live_snapshots import LiveSnapshot, LiveSnapshots
from era.drivers import processes
from tests.core.lab import Lab, Place
from tests.owners import mine


@dataclass
class Live(Place):
    """A working directory in which processes of the host go on. They stand still where that `can_freeze`: as under the
    freezer all of them at once, as far as anybody can see."""

    can_freeze: bool = True
    too_slow: int = 0
    """How many times more they don't come to a stand soon enough."""

    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[bool | None]:
        if not self.can_freeze or self.too_slow:
            self.too_slow -= self.can_freeze
            yield False if self.can_freeze else None
            return
        for process in self.running:
            process.send_signal(signal.SIGSTOP)
        for process in self.running:
            while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] not in "TZ":
                time.sleep(0.0001)
        try:
            yield True
        finally:
            for process in self.running:
                process.send_signal(signal.SIGCONT)

    def held_files(self, device: int) -> HeldFiles | None:
        return processes.held([process.pid for process in self.running], device)

    def start(self, code: str, *args: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *args], cwd=self.workspace, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.running.append(process)
        self.started.append(process)
        return process


class MomentLab(Lab):
    """A lab with a live place."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        (directory / "aside").mkdir()
        self.moments = LiveSnapshots(self.snapshots, directory / "aside")
        workspace = directory / "live"
        workspace.mkdir()
        self.live = Live(workspace, "live")
        self.last: Snapshot = EMPTY

    def moment(self) -> LiveSnapshot:
        """Take a snapshot."""
        moment = asyncio.run(self._take())
        self.last = moment.snapshot
        assert os.listdir(self.directory / "aside") == []
        return moment

    async def _take(self) -> LiveSnapshot:
        return await self.moments.take(self.live.sandbox, self.last, session_id=mine("s"))

    def contents(self, snapshot: Snapshot | None = None) -> dict[str, bytes]:
        """The files of a snapshot."""
        found: dict[str, bytes] = {}

        def add(digest: str | None, path: str) -> None:
            for kind, name, *rest in self.snapshots.read_tree(digest) if digest else ():
                if kind == "file":
                    found[path + name] = self.blobs.get(rest[0])
                    assert len(found[path + name]) == rest[1]
                elif kind == "dir":
                    add(rest[0], f"{path}{name}/")

        add((snapshot or self.last).root, "")
        return found


@contextmanager
def opened(directory: Path) -> Iterator[MomentLab]:
    lab = MomentLab(directory)
    try:
        yield lab
    finally:
        for process in lab.live.started:
            with process:
                process.kill()
        asyncio.run(lab.snapshots.close())


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[MomentLab]:
    with opened(tmp_path) as lab:
        yield lab


def write(lab: MomentLab, path: str, content: bytes) -> None:
    where = lab.live.workspace / path
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_bytes(content)
