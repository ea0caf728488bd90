"""Routes of a session's past and present runs: their records, and their output."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from era.api.context import (
    Answer,
    Cursor,
    Limit,
    Owner,
    SessionId,
    StrictRoute,
    UseContext,
    WithData,
    cursor_of,
    errors,
    key_of,
    moment,
    possible_id,
    until_barred,
)
from era.api.event_stream import After, described, event_stream
from era.api.run_events import run_events
from era.api.streaming import listing_response, page_pieces, ranged_response
from era.core.metadata import RunFilter
from era.core.models import Status
from era.wire.runs import RunEvent, RunRecordAnswer, RunRecordsAnswer, record_answer

router = APIRouter(prefix="/api/sessions/{session_id}/runs", tags=["runs"], route_class=StrictRoute)
all_runs = APIRouter(tags=["runs"], route_class=StrictRoute)

# Output may hold anything. A browser must not show it as a page of this server.
_HEADERS = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox; default-src 'none'"}


@router.get("", responses={200: {"model": RunRecordsAnswer}, **errors(404)})
async def list_runs(
    session_id: SessionId,
    context: UseContext,
    limit: Limit = 100,
    cursor: Cursor = None,
    idempotency_key: Annotated[
        str | None, Query(max_length=255, description="Only the run of this Idempotency-Key.")
    ] = None,
) -> Response:
    """List the records of a session's runs, newest first."""
    if idempotency_key is None:
        records = await context.history.list(session_id, limit=limit + 1, before=key_of(cursor) if cursor else None)
    else:
        records = await context.history.of_key(session_id, idempotency_key)
    page = records[:limit]
    following = cursor_of(page[-1].key) if len(records) > limit else None
    rest = {"count": len(page), "next_cursor": following}
    return await listing_response(page_pieces("runs", page, lambda record: record_answer(record, session_id.id), rest))


@all_runs.get("/api/runs", responses={200: {"model": RunRecordsAnswer}, **errors(404)})
async def list_all_runs(
    owner: Owner,
    context: UseContext,
    status: Annotated[Status | None, Query(description="Only those with this status.")] = None,
    session: Annotated[str | None, Query(max_length=128, description="Only those of this session.")] = None,
    since: Annotated[str | None, Query(description="Only those that began then or later (RFC 3339).")] = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Response:
    """List the records of runs of all the caller's sessions, newest first."""
    which = RunFilter(
        owner,
        limit + 1,
        status,
        None if session is None else possible_id(session),
        None if since is None else moment("since", since),
        key_of(cursor) if cursor else None,
    )
    found = await context.history.of_owner(which)
    page = found[:limit]
    following = cursor_of(page[-1][1].key) if len(found) > limit else None
    rest = {"count": len(page), "next_cursor": following}
    return await listing_response(page_pieces("runs", page, lambda each: record_answer(each[1], each[0]), rest))


@router.get("/{run_id}", responses={200: {"model": RunRecordAnswer}, **errors(404)})
async def get_run(session_id: SessionId, run_id: str, context: UseContext) -> Response:
    """Show the record of a run, also while it is under way."""
    record, cell = await context.history.get_with_cell(session_id, run_id)
    return Answer(record_answer(record, session_id.id, cell))


@router.delete("/{run_id}", responses={200: {"model": RunRecordAnswer}, **errors(404)})
async def stop_run(session_id: SessionId, run_id: str, context: UseContext) -> Response:
    """Stop a run that is under way, and answer with its record once that is durable. A run that has ended is left
    alone."""
    return Answer(record_answer(await context.runs.stop(session_id, run_id), session_id.id))


@router.get(
    "/{run_id}/events",
    **described(
        "Events `stdout` and `stderr`, in a context also what the cell shows, then `done` or `error`; `gap` for those "
        "that are gone.",
        "RunEvent",
        RunEvent,
        404,
        409,
    ),
)
async def follow_run(
    session_id: SessionId, run_id: str, request: Request, context: UseContext, after: After, data: WithData = True
) -> Response:
    """Follow a run while it lasts and afterwards: the events of `POST …/stream`, with the same numbers as there, from
    the first on or behind the one with the number `after`."""
    events = run_events(await context.history.events(session_id, run_id, after), with_data=data)
    return event_stream(events, barred=until_barred(context, request, "read"))


@router.get(
    "/{run_id}/{stream}",
    responses={200: {"content": {"text/plain": {}}}, 206: {"content": {"text/plain": {}}}, **errors(404, 409, 416)},
    response_class=Response,
)
async def get_output(
    session_id: SessionId, run_id: str, stream: Literal["stdout", "stderr"], request: Request, context: UseContext
) -> Response:
    """Download what a run wrote, or with a Range header a part of it. Of a run under way: what it wrote so far."""
    content = await context.history.output(session_id, run_id, stream)
    return await ranged_response(request, content, "text/plain; charset=utf-8", _HEADERS)
