"""Setups whose end can't be recorded, or is recorded while somebody looks for setups to do."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from era.core.metadata import SetupJob
from era.core.setup.commands import Commands, CommandsResult
from era.core.setup.setups import Setups
from era.errors import Unavailable
from tests.owners import mine
from tests.unit.core import Core, until


def setups_of(core: Core) -> tuple[Setups, Commands]:
    none: Any = None
    bound: Any = core.runs._parts.history
    commands = Commands(core.pool, core.network, core.snapshots, bound)
    return Setups(core.store, none, none, core.turns, none, commands, core.liveness, 10.0), commands


async def test_what_commands_left_is_not_kept_where_that_could_not_be_recorded(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setup is taken up again, with the files of the version in force."""
    setups, _ = setups_of(core)
    end_setup, failures = core.store.end_setup, [Unavailable("the disk is full")]

    async def failing(*args: Any, **fields: Any) -> bool:
        if failures:
            raise failures.pop()
        return await end_setup(*args, **fields)

    monkeypatch.setattr(core.store, "end_setup", failing)
    await core.session("s", setup='{"commands": ["echo tried >> log"]}')
    await setups.start()
    try:
        assert await setups.settled(mine("s"), 10)
        assert not failures
        core.setup_may_end.set()
        assert (await core.run("print(open('log').read())")).stdout == b"tried\n\n"
    finally:
        await setups.stop()


async def test_a_setup_that_ends_while_it_is_listed_is_not_done_again(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second time its commands would share the sandbox with a run, which would end with it."""
    setups, commands = setups_of(core)
    end_setup, run, unfinished_setups = core.store.end_setup, commands.run, core.store.unfinished_setups
    read, ended = asyncio.Event(), asyncio.Event()
    lists = runs = 0

    async def late() -> Sequence[SetupJob]:
        nonlocal lists
        jobs = await unfinished_setups()
        lists += 1
        if lists == 2:
            assert jobs, "the setup had ended before"
            read.set()
            await ended.wait()
        return jobs

    async def counted(*args: Any) -> CommandsResult:
        nonlocal runs
        runs += 1
        return await run(*args)

    async def end(*args: Any, **fields: Any) -> bool:
        setups.kick()
        await read.wait()
        return await end_setup(*args, **fields)

    monkeypatch.setattr(core.store, "unfinished_setups", late)
    monkeypatch.setattr(core.store, "end_setup", end)
    monkeypatch.setattr(commands, "run", counted)
    await core.session("s", setup='{"commands": ["echo done"]}')
    await setups.start()
    try:
        assert await setups.settled(mine("s"), 10)
        assert not setups._jobs, "the job was still about to hand on the sandbox"
        ended.set()
        await until(lambda: lists >= 3 and not setups._jobs)
        assert runs == 1
    finally:
        await setups.stop()
