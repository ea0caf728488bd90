"""Commits in a process of its own, for tests that trace or kill it.

`python -m tests.hostile.workload DIRECTORY COUNT` prints each version as a service would answer: after it was
committed. With a third argument, commits are no longer synced once a run has begun whose record wasn't.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import event

from era.core.metadata import Retention
from era.errors import Conflict, EraError
from era.store.blobs.blobs import LocalBlobs, make_directory
from era.store.engine import dialects
from era.store.metadata import SqlStore
from tests.hostile.commits import Commits


async def main(directory: Path, count: int) -> None:
    """Commit `count` times and collect garbage now and then. A failure is printed and the commit tried again."""
    data = directory / "data"
    make_directory(data)
    blobs = LocalBlobs(data / "blobs")
    blobs.open()
    store = SqlStore(f"sqlite:///{data / 'era.sqlite'}", Retention(versions=1))
    event.listen(store.database.engines.writer, "connect", _checkpoint_often)
    await store.open()
    commits = Commits(store, blobs, directory.parent / f"{directory.name}.workspace")
    with suppress(Conflict):
        await commits.create()
    say("created")
    for number in range(count):
        say("begin")
        try:
            say(f"committed {await commits.commit()}")
            if number % 3 == 2:
                await commits.collect()
        except (EraError, OSError) as error:
            say(f"failed {type(error).__name__}")
    await commits.snapshots.close()
    await store.close()


def _checkpoint_often(connection: Any, _record: object) -> None:
    """Checkpoint the WAL every few commits instead of every few hundred."""
    connection.execute("PRAGMA wal_autocheckpoint = 20")


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


if __name__ == "__main__":
    if len(sys.argv) > 3:
        set_synced = dialects.set_synced
        dialects.set_synced = lambda connection, syncs: set_synced(connection, False)
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
