"""Snapshots of a sandbox's working directory while processes write to it. Each step is given the sandbox first."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from era.core.models import EMPTY, Snapshot
from era.core.ports import Sandbox
from era.core.process import ProcessSpec
from era.core.trees.live_snapshots import LiveSnapshots
from era.core.trees.snapshots import Snapshots
from era.core.trees.trees import SnapshotRefused
from era.store.blobs.blobs import LocalBlobs
from tests.drivers.process_steps import PATIENCE, process, running, shell, spec
from tests.owners import mine

WRITERS = 20
COUNTERS = f"""
import os
os.makedirs("counters", exist_ok=True)
for number in range({WRITERS}):
    files = [os.open(f"counters/{{number}}.{{name}}", os.O_CREAT | os.O_WRONLY) for name in "ab"]
    for file in files: os.pwrite(file, b"00000000", 0)
    if os.fork() == 0:
        n = 0
        while True:
            n += 1
            for file in files: os.pwrite(file, b"%08d" % n, 0)
print("up", flush=True)
os.wait()
"""
"""Processes each of which writes a counter to two files, in order."""


@dataclass
class Seen:
    """What snapshots have shown."""

    consistent: int = 0
    """How many of them say that they are of one moment."""

    reversed: int = 0
    """In how many of those the second file of a counter was ahead of the first."""

    moved: bool = False
    """Whether any counter had moved between two of those."""


async def emptied(sandbox: Sandbox) -> list[bool]:
    """Whether the supervisor says that no process is left: beside a helper, beside a process that a shell has left
    behind, and once that has ended."""
    supervisor = await sandbox.process_supervisor()
    helper = await supervisor.start(ProcessSpec((), {}, channel=True, module="live_files"))
    said = [await supervisor.is_empty()]
    pid = (await process(sandbox, shell("sleep 1000 > /dev/null 2>&1 & echo $!")))[0]["stdout"].decode().strip()
    said.append(await supervisor.is_empty())
    await process(sandbox, shell(f"kill {pid}; while kill -0 {pid} 2>/dev/null; do sleep 0.01; done"))
    said.append(await supervisor.is_empty())
    await helper.kill()
    return said


async def counters(sandbox: Sandbox, wanted: int, most: int) -> tuple[Seen, Seen]:
    """Take snapshots beside writers until `wanted` are consistent, `most` at most; then others, from a sandbox that
    says that it stands still and goes on, until one is reversed."""

    @contextlib.asynccontextmanager
    async def frozen() -> AsyncIterator[bool]:
        yield True

    sound, weak = Seen(), Seen()
    async with _writers(sandbox) as look:
        for _ in range(most):
            await look(sound)
            if sound.consistent == wanted:
                break
        deadline = time.monotonic() + 2 * PATIENCE
        with patch.object(sandbox, "frozen", frozen):
            while not weak.reversed and time.monotonic() < deadline:
                with contextlib.suppress(SnapshotRefused):
                    await look(weak)
    return sound, weak


@contextlib.asynccontextmanager
async def _writers(sandbox: Sandbox) -> AsyncIterator[Callable[[Seen], Awaitable[None]]]:
    """Writers within the block, and what takes a snapshot beside them."""
    with tempfile.TemporaryDirectory() as directory:
        blobs, aside = LocalBlobs(Path(directory) / "blobs"), Path(directory) / "aside"
        blobs.open()
        aside.mkdir()
        snapshots = Snapshots(blobs)
        moments, last = LiveSnapshots(snapshots, aside), EMPTY

        async def look(seen: Seen) -> None:
            nonlocal last
            before = last
            moment = await moments.take(sandbox, last, session_id=mine("s"))
            last = moment.snapshot
            if moment.consistent:
                seen.consistent += 1
                found = _counters_of(snapshots, last)
                seen.reversed += any(not 0 <= first - second <= 1 for first, second in found)
                seen.moved |= before != EMPTY and found != _counters_of(snapshots, before)

        try:
            async with running(sandbox, spec("python3", "-c", COUNTERS)) as beside:
                await beside.until(b"up")
                yield look
        finally:
            await snapshots.close()


def _counters_of(snapshots: Snapshots, snapshot: Snapshot) -> list[tuple[int, int]]:
    """What the files of each writer say."""

    def entries(digest: str) -> dict[str, str]:
        return {name: rest[0] for _, name, *rest in snapshots.read_tree(digest)}

    assert snapshot.root is not None
    files = entries(entries(snapshot.root)["counters"])
    return [
        (int(snapshots.blobs.get(files[f"{number}.a"])), int(snapshots.blobs.get(files[f"{number}.b"])))
        for number in range(WRITERS)
    ]
