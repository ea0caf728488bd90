"""Work on a session's files is done in the session's turn, large work in that of its owner, whatever asks for it."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from era.core.files.session_files import Condition, SessionFiles
from era.core.live.processes import ProcessRequest
from era.core.models import DEFAULT_OWNER, KeptVersion, OwnedId, Session
from era.core.sessions.versions import HistoryBound
from era.core.trees import file_threads
from era.core.trees.file_threads import FileThreads
from era.errors import TooLarge
from tests.owners import mine
from tests.unit.core import URL, Core
from tests.unit.test_setup_records import setups_of

WRITE = "for n in range(40): open(f'f{n}', 'w').write(%r)"


class Turns:
    """In whose turn file work was done, of sessions and as large work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sessions: set[OwnedId] = set()
        self.large: set[str] = set()
        slot = FileThreads.slot

        def noted_slot(threads: FileThreads, session_id: OwnedId, *, is_large: bool) -> Any:
            self.sessions.add(session_id)
            if is_large:
                self.large.add(session_id.owner)
            return slot(threads, session_id, is_large=is_large)

        monkeypatch.setattr(FileThreads, "slot", noted_slot)

    def check(self) -> None:
        """Assert that there was large work since the last time, and all was in the turn of the session and its
        owner."""
        assert self.sessions == {mine("s")}
        assert self.large == {DEFAULT_OWNER}
        self.sessions.clear()
        self.large.clear()


async def current(core: Core) -> Session:
    return await core.store.session(mine("s"))


async def test_all_work_is_done_in_its_sessions_turn_and_large_work_in_its_owners(
    directory: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_threads, "LARGE_BYTES", -1)
    monkeypatch.setattr(file_threads, "LARGE_ENTRIES", -1)
    turns = Turns(monkeypatch)
    async with Core.opened(directory, template, history_bytes=1) as core:
        await core.session()
        await core.run(WRITE % "first")
        first = (await current(core)).snapshot
        turns.check()

        await core.run(WRITE % "second")
        turns.check()

        bound = core.runs._parts.history
        with pytest.raises(TooLarge):
            await bound.check_names(await current(core), [KeptVersion(1, first.root, named=True)])
        turns.check()

        sandbox = await core.pool.acquire(replace(await current(core), snapshot=first))
        core.pool.committed((await current(core)).key, first)
        turns.check()  # into a warm directory

        core.snapshots.forget(sandbox.id)
        core.setup_may_end.set()
        _, commands = setups_of(core)
        with ExitStack() as naming:
            session = replace(await current(core), snapshot=first)
            progress: Any = NoProgress()
            result = await commands.run(session, ["echo > more"], None, time.monotonic() + 60, progress, naming)
            assert result.snapshot is not None, result.error
            assert await commands.trim(session, result.snapshot) is not None
            await commands.drop(session.key)
        turns.check()

        await core.run(WRITE % "third")
        turns.check()

        core.snapshots.forget(core.driver.alive[0].id)
        await core.processes.start(mine("s"), ProcessRequest(URL, "exec sleep 1000"))
        await core.run(WRITE % "fourth")
        turns.check()

        (core.driver.alive[0].workspace / "more").write_text("as a process would")
        await core.live_sessions.put_away(mine("s"))
        turns.check()

        nobody: Any = None
        history = HistoryBound(core.store, core.snapshots, core.rules, 1)
        files = SessionFiles(
            core.store, core.snapshots, core.blobs, core.turns, nobody, nobody, core.rules, history, core.liveness
        )
        await files.page(mine("s"), limit=1, after=(), prefix=())
        await files.stat(mine("s"), ("f1",))
        await files.check_room(await current(core), ("f1",), 1)
        assert await files.make_directory(mine("s"), ("d",)) == (True, 1)
        await files.move(mine("s"), ("d",), ("e",), replace=False)
        await files.delete(mine("s"), ("e",), recursive=True, condition=Condition())
        turns.check()


class NoProgress:
    """Nobody follows the setup."""

    def say(self, *_: object) -> None: ...

    def flush(self) -> None: ...
