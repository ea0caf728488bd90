"""Pictures that a run has left and that can't be had afterwards: what the run answered is told all the same."""

from __future__ import annotations

import json
from typing import Any

import httpx

from era.mcp.arguments import RunInSession
from era.mcp.calls import Calls
from era.mcp.tools import TOOLS
from tests.mcp.clients import text_of

DONE: dict[str, Any] = {
    "type": "done",
    "run_id": "run_1_a",
    "session_id": "s",
    "status": "ok",
    "exit_code": 0,
    "duration": "0.1s",
    "stdout_truncated": False,
    "stderr_truncated": False,
    "state": {"version": 1, "committed": True, "reason": None},
    "artifacts": [{"type": "image/png", "path": f"{n}.png", "size": 3} for n in range(3)],
}
EVENTS: list[dict[str, Any]] = [{"type": "stdout", "content": "paid once\n"}, DONE]


async def answer(request: httpx.Request) -> httpx.Response:
    """A server whose first picture is gone, and that breaks off in the second."""
    if request.method == "POST":
        return httpx.Response(200, text="".join(f"data: {json.dumps(event)}\n\n" for event in EVENTS))
    if request.url.path.endswith("0.png"):
        return httpx.Response(404, json={"error": "There is no file '0.png'.", "code": "no_file", "hint": ""})
    if request.url.path.endswith("1.png"):
        raise httpx.ReadError("cut off")
    return httpx.Response(200, content=b"PNG", headers={"content-type": "image/png"})


async def test_a_picture_that_can_not_be_had_takes_nothing_from_the_answer() -> None:
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://era") as client:
        body = RunInSession(session_id="s", code="pay()")
        result = await TOOLS["era_run_in_session"].answer(Calls(client), body)
    assert not result.is_error
    assert text_of(result).splitlines() == [
        "paid once",
        "[files to look at, with era_read_file: 0.png, 1.png, 2.png]",
        "[0.png can't be shown: There is no file '0.png'.]",
        "[1.png can't be shown: The ERA server hung up before its answer was complete (cut off).]",
    ]
    assert [part.type for part in result.content] == ["text", "image"]
