"""core.live.state_file, and what a cell answers whose state file can't be read. The helper is one that a test speaks
for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from era.core.live import state_file as module
from era.core.live.context import CellOutcome
from era.core.live.processes import ProcessRequest
from era.core.live.state_file import StateFile
from era.core.process import ProcessEnded, ProcessOutput, ProcessSpec
from era.errors import NoIsolation
from tests.core.interpreters import until_ended
from tests.owners import mine
from tests.unit.core import URL, Core


class Helper:
    """In place of the helper's process. It takes `seconds` for each answer, and answers nothing where they are None."""

    def __init__(self, reads: float | None, writes: float | None = 0.0) -> None:
        self._seconds = {b"R": (reads, b"S", b"{}"), b"W": (writes, b"K", b"")}
        self._events: asyncio.Queue[ProcessOutput | ProcessEnded] = asyncio.Queue()

    async def start(self, spec: ProcessSpec) -> Any:
        return self

    def events(self) -> AsyncIterator[ProcessOutput | ProcessEnded]:
        return until_ended(self._events)

    async def send(self, data: bytes) -> None:
        seconds, kind, payload = self._seconds[data[:1]]
        if seconds is not None:
            answer = ProcessOutput("channel", kind + len(payload).to_bytes(4, "big") + payload)
            asyncio.get_running_loop().call_later(seconds, self._events.put_nowait, answer)

    async def kill(self) -> None:
        self._events.put_nowait(ProcessEnded(137, 9, "signal"))


class Interpreter:
    """In place of a Context. Its cells do nothing."""

    name, lost, alive = "c", None, True

    async def execute(self, cell: Any, output_bytes: int, write: Any) -> CellOutcome:
        result = {"data": {"text/plain": "42"}, "metadata": {}, "main": True}
        return CellOutcome("exit", 0, 0.1, [result], False, None, 1, False, False, None, True)

    async def stop_cell(self) -> None: ...

    async def close(self, why: str) -> None:
        self.alive = False


async def test_a_helper_whose_sandbox_computes_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS", 0.2)
    file = StateFile(Helper(reads=0.6).start, time.monotonic)
    assert await file.read() == (b"{}", None)
    await file.close()


@pytest.mark.parametrize("refused", [False, True])
async def test_a_cell_whose_state_file_can_t_be_read_answers_all_the_same(
    core: Core, monkeypatch: pytest.MonkeyPatch, *, refused: bool
) -> None:
    """And its live session goes on. Its helper doesn't answer, or can't be started."""
    monkeypatch.setattr(module, "_SECONDS", 0.2)
    monkeypatch.setattr(core.contexts, "check_language", lambda session: None)
    session = await core.session()
    await core.processes.start(mine("s"), ProcessRequest(URL, "exec sleep 100"))
    live = core.live_sessions.get(session.key)
    assert live is not None
    of = core.contexts._of_session(live)
    interpreter: Any = Interpreter()
    of.contexts["c"] = interpreter
    of.state_file = StateFile(Helper(None).start, lambda: 0.0)
    if refused:

        async def fail() -> Any:
            raise NoIsolation("There is none today.")

        monkeypatch.setattr(of.state_file, "read", fail)
    ran = (await core.run("42", context="c")).result
    assert ran.cell is not None
    assert ran.cell["results"][0]["data"]["text/plain"] == "42"
    record = await core.record(ran.run_id)
    assert (record.status, record.committed) == ("ok", False)
    why = "read: There is none today" if refused else "reached: what reads and writes it in the sandbox doesn't answer"
    assert str(record.reason).startswith(f".session_data.json can't be {why}; data stays as it was")
    assert interpreter.alive
    assert core.live_sessions.get(session.key) is live
    assert live.processes.running
