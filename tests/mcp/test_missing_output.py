"""What tools and the command say where the server no longer has all of a run's output, or hangs up."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from era import Era
from era.client.runs import follow_once
from era.common.run_notes import GAP
from era.mcp.calls import CallFailed, Calls
from era.mcp.tools import _execute, _run
from tests.mcp.clients import text_of
from tests.sdk.scripted import Script, serving

GONE = {"type": "gap", "from": 1, "to": 3}
LATER = {"type": "stdout", "content": "later\n"}
DONE = {
    "type": "done",
    "session_id": "s",
    "run_id": "run_1",
    "status": "ok",
    "exit_code": 0,
    "duration": "1ms",
    "stdout_truncated": True,
    "stderr_truncated": False,
    "artifacts": [],
}


def told(*events: dict[str, Any]) -> Script:
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in ({"type": "start"}, *events))
    return 200, {"Content-Type": "text/event-stream"}, body.encode()


@pytest.mark.parametrize("in_session", [True, False])
async def test_a_tool_says_that_output_is_missing(*, in_session: bool) -> None:
    with serving() as server:
        async with httpx.AsyncClient(base_url=server.url) as client:
            calls = Calls(client)

            async def run(*events: dict[str, Any]) -> str:
                server.script = [told(*events)]
                ran = _run(calls, "s", {}) if in_session else _execute(calls, {})
                return text_of(await ran)

            assert GAP in await run(GONE, LATER, DONE)
            assert GAP not in await run(LATER, DONE)
            with pytest.raises(CallFailed, match="hung up"):
                await run(GONE)


def test_the_command_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as server:
        server.script = [told(GONE, LATER, DONE)]
        assert follow_once(Era(server.url).stream("python", "pass")) == 0
    printed = capsys.readouterr()
    assert printed.out == "later\n"
    assert printed.err.splitlines() == [
        "era: some of the output is missing here: it is no longer kept",
        "era: stdout went over the session's output limit, and the rest is lost",
    ]
