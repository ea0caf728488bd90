"""A cell whose state file can't be read: its answer says why."""

from __future__ import annotations

from typing import Any

import pytest

from era.core.live.context import CellOutcome
from era.core.live.file_helper import gone
from era.core.live.processes import ProcessRequest
from era.errors import NoIsolation
from tests.owners import mine
from tests.unit.core import URL, Core


class Interpreter:
    """In place of a Context. Its cells do nothing."""

    name, lost, alive = "c", None, True

    async def execute(self, cell: Any, output_bytes: int, write: Any) -> CellOutcome:
        result = {"data": {"text/plain": "42"}, "metadata": {}, "main": True}
        return CellOutcome("exit", 0, 0.1, [result], False, None, 1, False, False, None, True)

    async def stop_cell(self) -> None: ...

    async def close(self, why: str) -> None:
        self.alive = False


@pytest.mark.parametrize("refused", [False, True])
async def test_a_cell_whose_state_file_can_t_be_read_answers_all_the_same(
    core: Core, monkeypatch: pytest.MonkeyPatch, *, refused: bool
) -> None:
    """And its live session goes on. Its helper doesn't answer, or can't be started."""
    monkeypatch.setattr(core.contexts, "check_language", lambda session: None)
    session = await core.session()
    await core.processes.start(mine("s"), ProcessRequest(URL, "exec sleep 100"))
    live = core.live_sessions.get(session.key)
    assert live is not None
    of = core.contexts._of_session(live)
    interpreter: Any = Interpreter()
    of.contexts["c"] = interpreter
    asked: list[str] = []

    class Helper:
        async def call(self, op: str, *_: object, **arguments: object) -> tuple[dict[str, Any], bytes]:
            asked.append(op)
            if op == "read_state":
                raise NoIsolation("There is none today.") if refused else gone()
            return {}, b""

    async def helper() -> Any:
        return Helper()

    monkeypatch.setattr(live, "files", helper)
    ran = (await core.run("42", context="c")).result
    assert asked == ["write_state", *["read_state"] * (1 if refused else 2)]
    assert ran.cell is not None
    assert ran.cell["results"][0]["data"]["text/plain"] == "42"
    record = await core.record(ran.run_id)
    assert (record.status, record.committed) == ("ok", False)
    why = "read: There is none today" if refused else "reached: what reads and writes it in the sandbox doesn't answer"
    assert str(record.reason).startswith(f".session_data.json can't be {why}; data stays as it was")
    assert interpreter.alive
    assert core.live_sessions.get(session.key) is live
    assert live.processes.running
