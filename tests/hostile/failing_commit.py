"""A commit and a collection of garbage, in a process of its own: for a test that has the disk fail, and then kills it.

`python -m tests.hostile.failing_commit DIRECTORY [impatient] [careless]` says `ready` after two versions, and waits for
a line. Then it says what came of another commit and of a collection, and waits to be killed. An impatient one doesn't
look up what became of a commit that nobody knows of; a careless one settles nothing.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from era.core.metadata import Retention
from era.core.operation.garbage import collect_unneeded
from era.core.trees.pins import Pins
from era.errors import CommitFailed, Unavailable
from era.store.blobs.blobs import LocalBlobs, make_directory
from era.store.engine import database, dialects
from era.store.metadata import SqlStore
from era.store.runs import OUTCOME_UNKNOWN
from tests.hostile.commits import Commits
from tests.hostile.workload import say


async def main(directory: Path) -> None:
    data = directory / "data"
    make_directory(data)
    blobs = LocalBlobs(data / "blobs")
    blobs.open()
    store = SqlStore(f"sqlite:///{data / 'era.sqlite'}", Retention(versions=1))
    await store.open()
    commits = Commits(store, blobs, directory / "workspace")
    await commits.create()
    # Two, so that the beginning of the next commit's run isn't synced: what is synced first is its end.
    for n in (2, 3):
        assert await commits.commit() == n
    await commits.check(directory / "scratch")  # a connection that reads, and stays open
    say("ready")
    sys.stdin.readline()
    try:
        say(f"committed {await commits.commit()}")
    except CommitFailed as error:
        say("unknown" if error.hint == OUTCOME_UNKNOWN else "failed")
    try:
        await collect_unneeded(commits.snapshots, store, Pins())
        say("collected")
    except Unavailable:
        say("refused")
    sys.stdin.read()


if __name__ == "__main__":
    if "impatient" in sys.argv:
        database._PATIENCE_SECONDS = 0.0
    if "careless" in sys.argv:
        dialects.settle = lambda connection: None
    asyncio.run(main(Path(sys.argv[1])))
