"""Contexts of a live session. Sandboxes are the fake driver's, which have no interpreters."""

from __future__ import annotations

from typing import Any

import pytest

from era.core.live.processes import ProcessRequest
from era.errors import NoContext
from era.store.database import DatabaseAway
from tests.owners import mine
from tests.unit.core import URL, Core


class Interpreter:
    """In place of a Context."""

    name = "c"
    lost = None
    alive = True

    async def close(self, why: str) -> None:
        self.alive = False


@pytest.mark.parametrize("was_forgotten", [False, True])
async def test_a_deletion_that_failed_can_be_repeated(
    core: Core, monkeypatch: pytest.MonkeyPatch, *, was_forgotten: bool
) -> None:
    """The database is away, before or after it has forgotten the name."""
    session_id = mine("s")
    session = await core.session()
    await core.processes.start(session_id, ProcessRequest(URL, "exec sleep 100"))
    live = core.live_sessions.get(session.key)
    assert live is not None
    interpreter: Any = Interpreter()
    core.contexts._of_session(live).contexts["c"] = interpreter
    rows = core.store.processes
    await rows.note_context(session.key, "c")
    forget = rows.forget_context

    async def failing(*given: Any) -> bool:
        if was_forgotten:
            await forget(*given)
        raise DatabaseAway(may_have_committed=was_forgotten)

    with monkeypatch.context() as away:
        away.setattr(rows, "forget_context", failing)
        with pytest.raises(DatabaseAway):
            await core.contexts.delete(session_id, "c")
    assert [context.name for context in await core.contexts.list(session_id)] == ["c"]
    await core.contexts.delete(session_id, "c")
    assert not interpreter.alive
    assert not await core.contexts.list(session_id)
    with pytest.raises(NoContext):
        await core.contexts.delete(session_id, "c")
