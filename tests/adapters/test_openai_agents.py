"""The OpenAI Agents SDK with a scripted model, and tools that work in a real session."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("agents", reason="needs openai-agents, which scripts/setup --test installs where it can")

from agents import Agent, RunConfig, Runner, UserError, set_tracing_disabled
from agents.testing import ModelStep, ScriptedModel, assistant_message, function_call

from era import AsyncEra
from era.adapters.openai_agents import session_tools
from era.sdk.aio.sessions import AsyncSession
from era.sdk.errors import ServerAway
from tests.conftest import Server


@pytest.fixture(autouse=True)
def no_traces() -> Iterator[None]:
    """Nothing is sent to where traces of agents are collected."""
    set_tracing_disabled(True)
    yield
    set_tracing_disabled(False)


async def work(session: AsyncSession, *calls: tuple[str, dict[str, Any]]) -> list[str]:
    """Have a model make these calls of tools, one after the other; what it was answered."""
    steps = [function_call(name, arguments, call_id=f"call{n}") for n, (name, arguments) in enumerate(calls)]
    model = ScriptedModel(
        [*(ModelStep(output=[step]) for step in steps), ModelStep(output=[assistant_message("done")])]
    )
    agent = Agent(name="worker", model=model, tools=list(session_tools(session, timeout=120)))
    result = await Runner.run(agent, "Work.", run_config=RunConfig(tracing_disabled=True), max_turns=20)
    assert result.final_output == "done"
    return [str(item.output) for item in result.new_items if item.type == "tool_call_output_item"]


async def test_an_agent_works_in_a_session(session: AsyncSession) -> None:
    assert await work(
        session,
        ("write_file", {"path": "in/numbers.txt", "content": "12\n30\n"}),
        ("run_code", {"code": "print(sum(map(int, open('in/numbers.txt'))))"}),
        ("run_command", {"command": "ls -R; exit 3"}),
        ("read_file", {"path": "in/numbers.txt"}),
        ("list_files", {"prefix": ""}),
    ) == [
        "in/numbers.txt is written: 6 bytes.",
        "42",
        ".:\nin\n\n./in:\nnumbers.txt\n[failed, exit code 3]",
        "12\n30\n",
        "in/numbers.txt (6 bytes)",
    ]
    assert await session.files.text("in/numbers.txt") == "12\n30\n"


async def test_what_is_wrong_is_told_to_the_model(session: AsyncSession) -> None:
    missing, outside, failed, silent = await work(
        session,
        ("read_file", {"path": "none.txt"}),
        ("write_file", {"path": "../outside", "content": ""}),
        ("run_code", {"code": "1/0"}),
        ("run_code", {"code": "pass"}),
    )
    assert missing.startswith("[no_file]")
    assert outside.startswith("[bad_path]")
    assert "ZeroDivisionError" in failed
    assert failed.endswith("[failed, exit code 1]")
    assert silent == "[ok, nothing was printed]"


async def test_a_long_output_says_what_is_missing(session: AsyncSession) -> None:
    await session.files.write("binary", b"\xff\xfe")
    shown, binary = await work(
        session,
        ("run_code", {"code": "print('a' * 50_000 + 'end')"}),
        ("read_file", {"path": "binary"}),
    )
    assert len(shown) < 21_000
    assert shown.endswith("end")
    assert "[… 30004 characters are left out here" in shown
    assert binary == "binary is no text: 2 bytes. A program can read it."


async def test_what_a_model_cannot_help_ends_the_agent(server: Server) -> None:
    async with AsyncEra(server.url) as era, AsyncEra("http://127.0.0.1:9", retries=0) as away:
        session = await era.session("python")
        await session.delete(purge=True)
        (gone,) = await work(session, ("run_code", {"code": "print(1)"}))
        assert gone.startswith("[not_found]")
        session._connection = away._connection
        with pytest.raises(UserError, match="No server answers") as raised:
            await work(session, ("run_code", {"code": "print(1)"}))
        assert isinstance(raised.value.__cause__, ServerAway)


def test_every_tool_is_described_and_strict() -> None:
    tools = session_tools(AsyncSession.__new__(AsyncSession))
    assert [tool.name for tool in tools] == ["run_code", "run_command", "read_file", "write_file", "list_files"]
    for tool in tools:
        assert tool.description
        assert tool.strict_json_schema
        assert all(field["description"] for field in tool.params_json_schema["properties"].values()), json.dumps(
            tool.params_json_schema
        )
