"""Large work on a session's files is done in the turn of its owner, whatever asks for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from era.core.files import file_threads
from era.core.files.file_threads import FileThreads
from era.core.live.processes import ProcessRequest
from era.core.models import DEFAULT_OWNER, KeptVersion, Session
from era.errors import TooLarge
from tests.owners import mine
from tests.unit.core import URL, Core
from tests.unit.test_setup_records import setups_of

WRITE = "for n in range(40): open(f'f{n}', 'w').write(%r)"


class Turns:
    """Which functions had work done that may be large, each with the owner in whose turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.noted: set[tuple[str, str | None]] = set()
        large, by_size = FileThreads.large, FileThreads.by_size

        async def noted_large(threads: FileThreads, job: Callable[[], Any], owner: str | None) -> Any:
            self._note(job, owner)
            return await large(threads, job, owner)

        async def noted_by_size(
            threads: FileThreads, job: Callable[[bool], Any], holder: Any, owner: str | None
        ) -> Any:
            self._note(job, owner)
            return await by_size(threads, job, holder, owner)

        monkeypatch.setattr(FileThreads, "large", noted_large)
        monkeypatch.setattr(FileThreads, "by_size", noted_by_size)

    def _note(self, job: Callable[..., Any], owner: str | None) -> None:
        function = getattr(job, "func", job)  # of a partial
        self.noted.add((function.__qualname__.partition(".<locals>")[0], owner))

    def had(self, *functions: str) -> None:
        """Assert that these had work done since the last time, all of it in the turn of the sessions' owner."""
        noted, self.noted = self.noted, set()
        assert noted - {("FileThreads.by_size", DEFAULT_OWNER)} == {(name, DEFAULT_OWNER) for name in functions}


async def current(core: Core) -> Session:
    return await core.store.session(mine("s"))


async def test_all_large_work_is_done_in_its_owners_turn(
    directory: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_threads, "LARGE_BYTES", -1)
    turns = Turns(monkeypatch)
    async with Core.opened(directory, template, history_bytes=1) as core:
        await core.session()
        await core.run(WRITE % "first")
        first = (await current(core)).snapshot
        turns.had("Snapshots._take", "Snapshots.held_bytes")

        await core.run(WRITE % "second")
        turns.had("Snapshots._take", "Snapshots.held_bytes")

        bound = core.runs._parts.history
        with pytest.raises(TooLarge):
            await bound.check_names(await current(core), [KeptVersion(1, first.root, named=True)])
        turns.had("Snapshots.held_bytes")

        sandbox = await core.pool.acquire(replace(await current(core), snapshot=first))
        core.pool.committed((await current(core)).key, first)
        turns.had("Snapshots.restore")  # into a warm directory

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
        turns.had("Snapshots.restore", "Snapshots._take", "Snapshots.held_bytes")

        core.snapshots.forget(core.driver.alive[0].id)
        await core.processes.start(mine("s"), ProcessRequest(URL, "exec sleep 1000"))
        await core.run(WRITE % "fourth")
        turns.had("Snapshots.memory_of", "LiveSnapshots._agreeing_look", "LiveSnapshots._take", "Snapshots.held_bytes")

        (core.driver.alive[0].workspace / "more").write_text("as a process would")
        await core.live_sessions.put_away(mine("s"))
        turns.had("LiveSnapshots._agreeing_look", "LiveSnapshots._take", "Snapshots.held_bytes")


class NoProgress:
    """Nobody follows the setup."""

    def say(self, *_: object) -> None: ...

    def flush(self) -> None: ...
