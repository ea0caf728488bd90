"""Routes of a session's setup: install again, follow the progress, list the packages."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request, Response

from era.api.context import Answer, SessionId, StrictRoute, UseContext, errors, session_view, until_barred
from era.api.event_stream import After, Event, described, event_stream
from era.core.event_log import Gap
from era.core.setup.progress import Became, Line
from era.core.setup.setups import SetupNews
from era.wire.sessions import SessionAnswer
from era.wire.setup import EnvironmentAnswer, SetupEvent, environment_answer, result_view

router = APIRouter(prefix="/api/sessions/{session_id}", tags=["setup"], route_class=StrictRoute)


@router.post("/setup", responses={200: {"model": SessionAnswer}, **errors(404, 409, 429)})
async def set_up_again(session_id: SessionId, context: UseContext) -> Response:
    """Install the session's packages again, after a failure or to get newer versions. Waits for the run under way."""
    return Answer(session_view(await context.setups.again(session_id), context))


@router.get(
    "/setup/events",
    **described("Events `status` and `line`, then `done` or `error`.", "SetupEvent", SetupEvent, 404),
)
async def setup_events(session_id: SessionId, after: After, request: Request, context: UseContext) -> Response:
    """Follow the session's setup: events `status`, `line`, then `done` with its result. Lines written before the call
    come first, or those behind the event with the number `after`."""
    events = await context.setups.events(session_id, after)
    return event_stream(_sent(events), barred=until_barred(context, request, "read"))


async def _sent(events: AsyncGenerator[SetupNews]) -> AsyncGenerator[Event | Gap]:
    """The events of a setup, as they are sent."""
    async with aclosing(events):
        async for news in events:
            yield _event(news)


def _event(news: SetupNews) -> Event | Gap:
    if isinstance(news, Gap):
        return news
    number, what = news if isinstance(news, tuple) else (None, news)
    if isinstance(what, Line):
        return Event(number, "line", {"stream": what.stream, "text": what.text})
    if isinstance(what, Became):
        return Event(number, "status", {"setup_status": what.status})
    if number is None:
        return Event(number, "status", {"setup_status": what.setup_status})
    return Event(number, "done", {"setup_status": what.setup_status, "setup_result": result_view(what)})


@router.get("/environment", responses={200: {"model": EnvironmentAnswer}, **errors(404, 503)})
async def environment(session_id: SessionId, context: UseContext) -> Response:
    """List the packages that are installed for the session's programs, with their versions."""
    return Answer(environment_answer(*await context.setups.package_set(session_id)))
