"""Pydantic AI with a scripted model, and a toolset that works in a real session."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("pydantic_ai", reason="needs pydantic-ai-slim, which scripts/setup --test installs where it can")

from pydantic_ai import Agent, ModelMessage, ModelResponse, TextPart, ToolCallPart, ToolReturnPart
from pydantic_ai.models.function import AgentInfo, FunctionModel

from era.adapters.pydantic_ai import SessionToolset
from era.sdk.aio.sessions import AsyncSession


async def work(session: AsyncSession, *rounds: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Have a model make these calls of tools, all of a round at once; what it was answered."""
    script = iter([*rounds, []])

    def model(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        assert [tool.name for tool in info.function_tools] == [
            "run_code", "run_command", "read_file", "write_file", "list_files",
        ]  # fmt: skip
        calls = [ToolCallPart(name, arguments) for name, arguments in next(script)]
        return ModelResponse(parts=[*calls] or [TextPart("done")])

    agent = Agent(FunctionModel(model), toolsets=[SessionToolset(session, timeout=120)])
    result = await agent.run("Work.")
    assert result.output == "done"
    parts = [part for message in result.all_messages() for part in message.parts]
    return [str(part.content) for part in parts if isinstance(part, ToolReturnPart)]


async def test_an_agent_works_in_a_session(session: AsyncSession) -> None:
    assert await work(
        session,
        [("write_file", {"path": "a.txt", "content": "süß"}), ("run_code", {"code": "print(open('a.txt').read())"})],
        [("run_command", {"command": "echo no >&2; exit 3"}), ("list_files", {"prefix": "a"})],
        [("read_file", {"path": "none"})],
    ) == [
        "a.txt is written: 5 bytes.",
        "süß",
        "[stderr]\nno\n[failed, exit code 3]",
        "a.txt (5 bytes)",
        "[no_file] There is no file 'none'.",
    ]
