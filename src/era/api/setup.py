"""Routes of a session's setup: install again, follow the progress, list the packages."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping

from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse

from era.api.context import Answer, SessionId, StrictRoute, UseContext, errors, session_view
from era.api.event_stream import described
from era.core.models import Session
from era.core.setup.progress import Line
from era.core.setup.setups import UNDER_WAY
from era.errors import EraError
from era.wire.sessions import SessionAnswer
from era.wire.setup import EnvironmentAnswer, SetupEvent, environment_answer

router = APIRouter(prefix="/api/sessions/{session_id}", tags=["setup"], route_class=StrictRoute)


@router.post("/setup", responses={200: {"model": SessionAnswer}, **errors(404, 429)})
async def set_up_again(session_id: SessionId, context: UseContext) -> Response:
    """Install the session's packages again, after a failure or to get newer versions. Waits for the run under way."""
    return Answer(session_view(await context.setups.again(session_id), context))


@router.get(
    "/setup/events",
    **described("Events `status` and `line`, then `done` or `error`.", "SetupEvent", SetupEvent, 404),
)
async def setup_events(session_id: SessionId, context: UseContext) -> Response:
    """Follow the session's setup: events `status`, `line`, then `done` with its result. Lines written before the call
    come first."""
    events = context.setups.events(session_id)
    first = await anext(events)  # an error before the first event becomes an ordinary answer
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_server_sent(first, events), media_type="text/event-stream", headers=headers)


async def _server_sent(first: Session | Line, rest: AsyncIterator[Session | Line]) -> AsyncIterator[bytes]:
    """The events of a setup as server-sent events."""
    try:
        yield _event(first)
        async for event in rest:
            yield _event(event)
    except EraError as error:
        yield _encoded("error", {"error": error.message, "code": error.code, "hint": error.hint})


def _event(event: Session | Line) -> bytes:
    """A line of output, or the session's setup as it is now."""
    if isinstance(event, Line):
        return _encoded("line", {"stream": event.stream, "text": event.text})
    status = {"setup_status": event.setup_status}
    if event.setup_status in UNDER_WAY:
        return _encoded("status", status)
    return _encoded("done", {**status, "setup_result": json.loads(event.setup_result or "null")})


def _encoded(kind: str, fields: Mapping[str, object]) -> bytes:
    """A server-sent event."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields}, ensure_ascii=False)}\n\n".encode()


@router.get("/environment", responses={200: {"model": EnvironmentAnswer}, **errors(404, 503)})
async def environment(session_id: SessionId, context: UseContext) -> Response:
    """List the packages that are installed for the session's programs, with their versions."""
    return Answer(environment_answer(*await context.setups.package_set(session_id)))
