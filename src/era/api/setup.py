"""What a session has installed: shown, and installed once more."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse

from era.api.context import Answer, SessionId, StrictRoute, UseContext, errors, shown
from era.core.models import Session
from era.core.setup.package_sets import PackageSet
from era.core.setup.progress import Line
from era.core.setup.setups import UNDER_WAY
from era.errors import EraError
from era.wire.sessions import SessionAnswer
from era.wire.setup import EnvironmentAnswer

router = APIRouter(prefix="/api/sessions/{session_id}", tags=["setup"], route_class=StrictRoute)


@router.post("/setup", responses={200: {"model": SessionAnswer}, **errors(404, 429)})
async def set_up_again(session_id: SessionId, context: UseContext) -> Response:
    """Install the session's packages anew, after a failure or for newer versions. Waits for the run under way."""
    return Answer(shown(await context.setups.again(session_id), context))


@router.get(
    "/setup/events",
    responses={200: {"content": {"text/event-stream": {}}}, **errors(400, 404)},
    response_class=StreamingResponse,
)
async def setup_events(session_id: SessionId, context: UseContext) -> Response:
    """Follow the session's setup: events `status`, `line`, then `done` with its result. Begins with what was said so
    far."""
    events = context.setups.events(session_id)
    first = await anext(events)  # what can't be followed is an ordinary answer
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_server_sent(first, events), media_type="text/event-stream", headers=headers)


async def _server_sent(first: Session | Line, rest: AsyncIterator[Session | Line]) -> AsyncIterator[bytes]:
    try:
        yield _event(first)
        async for event in rest:
            yield _event(event)
    except EraError as error:
        yield _shown("error", {"error": error.message, "code": error.code, "hint": error.hint})


def _event(event: Session | Line) -> bytes:
    if isinstance(event, Line):
        return _shown("line", {"stream": event.stream, "text": event.text})
    told = {"setup_status": event.setup_status}
    if event.setup_status in UNDER_WAY:
        return _shown("status", told)
    return _shown("done", {**told, "setup_result": json.loads(event.setup_result or "null")})


def _shown(kind: str, fields: Mapping[str, object]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields}, ensure_ascii=False)}\n\n".encode()


@router.get("/environment", responses={200: {"model": EnvironmentAnswer}, **errors(404, 503)})
async def environment(session_id: SessionId, context: UseContext) -> Response:
    """List the packages that the session's programs have, with their versions."""
    return Answer(environment_answer(*await context.setups.package_set(session_id)))


def environment_answer(session: Session, package_set: PackageSet | None) -> dict[str, Any]:
    def listed(kind: str) -> list[dict[str, str]]:
        return [
            {name: item[name] for name in ("name", "version", "integrity") if item.get(name) is not None}
            for item in getattr(package_set, kind, ())
        ]

    return {
        "session_id": session.id,
        "setup_status": session.setup_status,
        "environment": session.package_set,
        "pip": listed("pip"),
        "npm": listed("npm"),
        "go": listed("go"),
    }
