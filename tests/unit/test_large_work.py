"""Work on a session's files is done in the session's turn, large work in that of its owner, whatever asks for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from era.core.files import file_threads
from era.core.files.file_threads import Budget, FileThreads
from era.core.files.session_files import Condition, SessionFiles
from era.core.live.processes import ProcessRequest
from era.core.models import DEFAULT_OWNER, KeptVersion, OwnedId, Session
from era.core.versions import HistoryBound
from era.errors import TooLarge
from tests.owners import mine
from tests.unit.core import URL, Core
from tests.unit.test_setup_records import setups_of

WRITE = "for n in range(40): open(f'f{n}', 'w').write(%r)"


class Turns:
    """Which functions had work done that may be large, each with the owner in whose turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.noted: set[tuple[str, str]] = set()
        self.sessions: set[OwnedId] = set()
        """In whose turn work was done that was taken for small, or had a slot."""

        small, slot, large = FileThreads.small, FileThreads.slot, FileThreads.large

        async def noted_small(threads: FileThreads, job: Callable[[], Any], session_id: OwnedId) -> Any:
            self.sessions.add(session_id)
            return await small(threads, job, session_id)

        def noted_slot(threads: FileThreads, session_id: OwnedId, *, is_large: bool) -> Any:
            if is_large:
                self.noted.add(("a slot", session_id.owner))
            self.sessions.add(session_id)
            return slot(threads, session_id, is_large=is_large)

        async def noted_large(threads: FileThreads, job: Callable[[], Any], session_id: OwnedId) -> Any:
            self._note(job, session_id.owner)
            return await large(threads, job, session_id)

        def noting(by_size: Callable[..., Any]) -> Any:
            async def noted_by_size(
                threads: FileThreads,
                job: Callable[[Budget | None], Any],
                session_id: OwnedId,
                *,
                is_large: bool = False,
            ) -> Any:
                self._note(job, session_id.owner)
                return await by_size(threads, job, session_id, is_large=is_large)

            return noted_by_size

        monkeypatch.setattr(FileThreads, "small", noted_small)
        monkeypatch.setattr(FileThreads, "slot", noted_slot)
        monkeypatch.setattr(FileThreads, "large", noted_large)
        for name in ("by_size", "to_its_end_by_size"):
            monkeypatch.setattr(FileThreads, name, noting(getattr(FileThreads, name)))

    def _note(self, job: Callable[..., Any], owner: str) -> None:
        function = getattr(job, "func", job)  # of a partial
        self.noted.add((function.__qualname__.partition(".<locals>")[0], owner))

    def had(self, *functions: str) -> None:
        """Assert that these had work done since the last time, all of it in the turn of the session and of its
        owner."""
        assert self.sessions == {mine("s")}
        noted, self.noted = self.noted, set()
        assert noted - {("FileThreads.by_size", DEFAULT_OWNER)} == {(name, DEFAULT_OWNER) for name in functions}


async def current(core: Core) -> Session:
    return await core.store.session(mine("s"))


async def test_all_work_is_done_in_its_sessions_turn_and_large_work_in_its_owners(
    directory: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_threads, "LARGE_BYTES", -1)
    turns = Turns(monkeypatch)
    async with Core.opened(directory, template, history_bytes=1) as core:
        await core.session()
        await core.run(WRITE % "first")
        first = (await current(core)).snapshot
        turns.had("Snapshots._take", "Snapshots._reading", "Snapshots.held_bytes")

        await core.run(WRITE % "second")
        turns.had("Snapshots._take", "Snapshots._reading", "Snapshots.held_bytes")

        bound = core.runs._parts.history
        with pytest.raises(TooLarge):
            await bound.check_names(await current(core), [KeptVersion(1, first.root, named=True)])
        turns.had("Snapshots.held_bytes")

        sandbox = await core.pool.acquire(replace(await current(core), snapshot=first))
        core.pool.committed((await current(core)).key, first)
        turns.had("Snapshots.restore", "a slot")  # into a warm directory

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
        turns.had("Snapshots.memory_of", "Snapshots._take", "Snapshots.held_bytes")

        await core.run(WRITE % "third")
        turns.had("Snapshots.restore", "a slot", "Snapshots._take", "Snapshots._reading", "Snapshots.held_bytes")

        core.snapshots.forget(core.driver.alive[0].id)
        await core.processes.start(mine("s"), ProcessRequest(URL, "exec sleep 1000"))
        await core.run(WRITE % "fourth")
        live = ("LiveSnapshots._loose_look", "LiveSnapshots._take", "Snapshots.held_bytes")
        turns.had("Snapshots.memory_of", "Snapshots._reading", *live)

        (core.driver.alive[0].workspace / "more").write_text("as a process would")
        await core.live_sessions.put_away(mine("s"))
        turns.had(*live)

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
        turns.had("Snapshots._reading", "Snapshots.edit", "Snapshots.held_bytes")


class NoProgress:
    """Nobody follows the setup."""

    def say(self, *_: object) -> None: ...

    def flush(self) -> None: ...
