"""A toolset of Pydantic AI that works in a session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic_ai import FunctionToolset

from era.adapters.session_tools import SessionTools

if TYPE_CHECKING:
    from era.sdk.aio.sessions import AsyncSession


class SessionToolset(FunctionToolset[Any]):
    """A toolset for `Agent(toolsets=[…])`: run_code, run_command, read_file, write_file, list_files.

    Parameters
    ----------
    session
        Where they work. The agent must run in the event loop in which the session was made.
    timeout
        Seconds that each run may take; None: the session's own.
    id
        Of the toolset, unique among an agent's.
    """

    def __init__(self, session: AsyncSession, *, timeout: float | None = None, id: str | None = None) -> None:
        functions = SessionTools(session, timeout=timeout).functions()
        # Two calls at once would wait for each other's turn in the session anyway, and then in no order.
        super().__init__(functions, id=id, sequential=True, require_parameter_descriptions=True)
