"""core.SandboxPool: sandboxes are removed while files are put back into them, whoever wants that, and whoever waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from era.core.models import Session
from era.core.pool.directory_cache import DirectoryCache
from era.core.ports import Sandbox
from era.core.trees import restoring
from era.core.trees.trees import Tree
from era.errors import SessionDeleted
from tests.drivers.fake import FakeSandbox
from tests.unit.core import Core, until
from tests.unit.test_pool import free_places, sessions, snapshot_with, used


class Writing:
    """The threads that write into working directories, held up until `go_on`; and what happens, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self._may_end = threading.Event()
        for name in ("restore", "move"):
            monkeypatch.setattr(restoring, name, self._held_up(getattr(restoring, name)))
        close = FakeSandbox.close

        async def closed(sandbox: FakeSandbox) -> None:
            self.events.append("closed")
            await close(sandbox)

        monkeypatch.setattr(FakeSandbox, "close", closed)

    def _held_up(self, write: Callable[..., Tree]) -> Callable[..., Tree]:
        def held_up(*arguments: Any) -> Tree:
            self.events.append("begun")
            assert self._may_end.wait(60)
            tree = write(*arguments)
            self.events.append("written")
            return tree

        return held_up

    async def begun(self) -> None:
        await until(lambda: "begun" in self.events)
        self.events = self.events[self.events.index("begun") :]

    async def go_on(self) -> None:
        """Once all has happened that doesn't wait for them."""
        for _ in range(50):
            await asyncio.sleep(0)
        self._may_end.set()


async def begun(
    core: Core, session: Session, monkeypatch: pytest.MonkeyPatch
) -> tuple[Sandbox, Writing, asyncio.Task[Sandbox]]:
    """The session's warm sandbox, into which another snapshot is just being put; and the task that acquires it."""
    changed = replace(session, snapshot=await snapshot_with(core, "new"))
    sandbox = await used(core, session)
    writing = Writing(monkeypatch)
    acquiring = asyncio.create_task(core.pool.acquire(changed))
    await writing.begun()
    return sandbox, writing, acquiring


async def test_a_deleted_session_s_sandbox_is_removed_when_no_thread_writes_into_it(
    small: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else files are made in a directory while it is removed, and it stays."""
    (session,) = await sessions(small, 1)
    sandbox, writing, acquiring = await begun(small, session, monkeypatch)
    releasing = asyncio.create_task(small.pool.release(session.key))
    await writing.go_on()
    await releasing
    assert writing.events[:3] == ["begun", "written", "closed"]
    assert not sandbox.workspace.exists()
    with pytest.raises(SessionDeleted):
        await acquiring
    assert small.driver.alive == []
    assert await free_places(small, 5) == 2


@pytest.mark.parametrize("gone", ["expired", "deleted"])
async def test_a_sweep_of_sessions_that_are_gone_waits_for_no_restore(
    small: Core, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """Else a call that lists one owner's sessions takes as long as another owner's files are put back."""
    session = await small.session("s", ttl=1 if gone == "expired" else None)
    sandbox, writing, acquiring = await begun(small, session, monkeypatch)
    if gone == "deleted":
        await small.store.delete_session(session.owned_id)
    while not small.pool.was_released(sandbox):
        async with asyncio.timeout(10):
            await small.expiry.sweep()
        await asyncio.sleep(0.1)
    assert small.pool.is_busy(session.key)
    assert writing.events == ["begun"]
    await writing.go_on()
    with pytest.raises(SessionDeleted):
        await acquiring
    await until(lambda: not small.pool.has(session.key))
    assert writing.events[:3] == ["begun", "written", "closed"]
    assert not sandbox.workspace.exists()
    assert await free_places(small, 5) == 2


@pytest.mark.parametrize("kind", ["warm", "new", "kept"])
async def test_a_sandbox_whose_restore_is_cancelled_is_removed_when_no_thread_writes_into_it(
    directory: Path, template: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(DirectoryCache, "is_worth_it", lambda *_: True)
    async with Core.opened(directory, template, max_warm=1, kept_bytes=1 << 30) as core:
        session, other = await sessions(core, 2)
        filled = replace(session, snapshot=await snapshot_with(core, "new"))
        if kind != "new":
            await used(core, session if kind == "warm" else filled)
        if kind == "kept":
            await used(core, other)
        writing = Writing(monkeypatch)
        acquiring = asyncio.create_task(core.pool.acquire(filled))
        await writing.begun()
        acquiring.cancel()
        await writing.go_on()
        with pytest.raises(asyncio.CancelledError):
            await acquiring
        await until(lambda: not list(core.driver.directory.iterdir()))
        assert writing.events[:3] == ["begun", "written", "closed"]
