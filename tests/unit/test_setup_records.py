"""Setups whose end can't be recorded."""

from __future__ import annotations

from typing import Any

from era.core.setup.commands import Commands
from era.core.setup.setups import Setups
from era.errors import Unavailable
from tests.owners import mine
from tests.unit.core import Core


async def test_what_commands_left_is_not_kept_where_that_could_not_be_recorded(core: Core) -> None:
    """The setup is taken up again, with the files of the version in force."""
    none: Any = None
    bound: Any = core.runs._parts.history
    commands = Commands(core.pool, core.network, core.snapshots, bound)
    setups = Setups(core.store, none, none, core.turns, none, commands, core.liveness, 10.0)
    end_setup, failures = core.store.end_setup, [Unavailable("the disk is full")]

    async def failing(*args: Any, **fields: Any) -> bool:
        if failures:
            raise failures.pop()
        return await end_setup(*args, **fields)

    core.store.end_setup = failing  # type: ignore[method-assign]
    await core.session("s", setup='{"commands": ["echo tried >> log"]}')
    await setups.start()
    try:
        assert await setups.settled(mine("s"), 10)
        assert not failures
        core.setup_may_end.set()
        assert (await core.run("print(open('log').read())")).stdout == b"tried\n\n"
    finally:
        await setups.stop()
