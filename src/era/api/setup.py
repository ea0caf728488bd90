"""What a session has installed: shown, and installed once more."""

from __future__ import annotations

from fastapi import APIRouter, Response

from era.api.context import Answer, SessionId, StrictRoute, UseContext, errors, shown
from era.wire import EnvironmentAnswer, SessionAnswer, environment_answer

router = APIRouter(prefix="/api/sessions/{session_id}", tags=["setup"], route_class=StrictRoute)


@router.post("/setup", responses={200: {"model": SessionAnswer}, **errors(404, 429)})
async def set_up_again(session_id: SessionId, context: UseContext) -> Response:
    """Install the session's packages anew, after a failure or for newer versions. Waits for the run under way."""
    return Answer(shown(await context.setups.again(session_id), context))


@router.get("/environment", responses={200: {"model": EnvironmentAnswer}, **errors(404)})
async def environment(session_id: SessionId, context: UseContext) -> Response:
    """List the packages that the session's programs have, with their versions."""
    return Answer(environment_answer(*await context.setups.environment(session_id)))
