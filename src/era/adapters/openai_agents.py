"""Tools of the OpenAI Agents SDK that work in a session."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agents import FunctionTool, function_tool

from era.adapters.session_tools import SessionTools

if TYPE_CHECKING:
    from era.sdk.aio.sessions import AsyncSession


def session_tools(session: AsyncSession, *, timeout: float | None = None) -> list[FunctionTool]:
    """Tools for `Agent(tools=…)`: run_code, run_command, read_file, write_file, list_files.

    Parameters
    ----------
    session
        Where they work. The agent must run in the event loop in which the session was made.
    timeout
        Seconds that each run may take; None: the session's own.
    """
    functions = SessionTools(session, timeout=timeout).functions()
    # What a model can help comes back as text. The rest, such as a wrong key, ends the agent's run.
    return [function_tool(function, failure_error_function=None) for function in functions]
