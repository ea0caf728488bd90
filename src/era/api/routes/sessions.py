"""Routes of sessions, their stored code, and their setup: install again, follow the progress, list the packages."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response

from era.api.protocol.answers import Answer, json_bytes
from era.api.routing.context import (
    CallerId,
    Context,
    IdempotencyKey,
    Include,
    Owner,
    SessionId,
    StrictRoute,
    UseContext,
    WithData,
    active_of,
    caller_of,
    check_timeout,
    claim_of,
    cursor_of,
    errors,
    key_of,
    language,
    made_answer,
    session_view,
    session_views,
    setup_of,
    states_of,
    until_barred,
)
from era.api.routing.event_stream import After, Event, described, event_stream
from era.api.routing.streaming import ClosingResponse, check_file_count, listing_response, with_files
from era.api.routing.validation import ANY_KEY
from era.common.spelling import did_you_mean
from era.core.concurrency.event_log import Gap
from era.core.metadata import KEEP, SessionChange, SessionFilter
from era.core.models import NewSession, Session, new_id, now, timestamp
from era.core.setup.progress import Became, Line
from era.core.setup.requirements import setup_text
from era.core.setup.setups import SetupNews
from era.errors import BadRequest
from era.wire.base import requested_limits
from era.wire.runs import CodeAnswer, CodeBody, CodeStoredAnswer, code_answer
from era.wire.sessions import (
    ChangedAnswer,
    ChangeSession,
    CreateSession,
    DeletedAllAnswer,
    DeletedAnswer,
    SessionAnswer,
    SessionsAnswer,
)
from era.wire.setup import EnvironmentAnswer, SetupEvent, environment_answer, result_view

router = APIRouter(prefix="/api/sessions", tags=["sessions"], route_class=StrictRoute)

Purge = Annotated[bool, Query(description="Delete at once and for good; it can't be restored.")]


@router.post("", status_code=201, responses={201: {"model": SessionAnswer}, **errors(409, 413, 429)})
async def create_session(
    body: CreateSession, caller: CallerId, request: Request, context: UseContext, key: IdempotencyKey
) -> Response:
    """Create a session."""
    check_timeout(body.default_timeout, context.settings, "default_timeout")
    new = NewSession(
        id=replace(caller, id=body.session_id or new_id("sess")),
        language=language(body.language, to_run=True),
        persistent=body.persistent,
        data="{}",
        metadata=body.metadata,
        allow_internet=body.allowInternetAccess,
        allow_public=body.allowPublicAccess,
        default_timeout=body.default_timeout,
        ttl=body.ttl,
        limits={name: value for name, value in requested_limits(body.limits).items() if value is not None},
        isolation=body.isolation,
        egress=body.egress.model_dump() if body.egress else {},
        service=body.service,
        setup=setup_text(setup_of(body.setup)),
        storage=body.storage,
        record_code=body.record_code,
    )
    made = await context.sessions.create(new, body.data, await claim_of(context, "create", key, body))
    return await made_answer(made, request, context)


_MOST_LABELS = 32
"""By which a list is filtered: a query grows with each."""


async def labels(
    request: Request,
    _documented: Annotated[
        str | None, Query(alias=f"metadata{ANY_KEY}", description="Only those whose label KEY has this value.")
    ] = None,
) -> dict[str, str]:
    """The labels that sessions must have, from the query parameters `metadata.KEY=VALUE`. Raises BadRequest for
    too many."""
    prefix, given = "metadata.", request.query_params.items()
    found = {name.removeprefix(prefix): value for name, value in given if name.startswith(prefix)}
    if len(found) > _MOST_LABELS:
        raise BadRequest(
            f"A list is filtered by at most {_MOST_LABELS} labels, and {len(found)} are given.", code="invalid_field"
        )
    return found


Labels = Annotated[dict[str, str], Depends(labels)]
OfLanguage = Annotated[str | None, Query(alias="language", description="Only those of this language.")]
Status = Literal["idle", "running", "live", "expired", "deleted"]
_LISTED_AT_ONCE = 250
_OF_NOW = ("idle", "running", "live")
OfStatus = Annotated[
    Status | None,
    Query(alias="status", description="Only those. `expired` and `deleted` are those that can be restored."),
]


async def _filter(
    owner: str, language_name: str | None, status: Status | None, labels: dict[str, str], context: Context
) -> SessionFilter:
    """Return the database's filter for a query. The database doesn't have `idle`, `running` and `live`, so the filter
    names the sessions that aren't idle now."""
    active = await active_of(owner, context) if status in _OF_NOW else {}
    return SessionFilter(
        owner,
        language=language(language_name) if language_name else None,
        metadata=labels or None,
        removed=status if status == "expired" or status == "deleted" else None,  # mypy follows no `in`
        ids=[name for name, now_is in active.items() if now_is == status] if status in ("running", "live") else None,
        without_ids=list(active) if status == "idle" else (),
    )


@router.get("", responses={200: {"model": SessionsAnswer}, **errors()})
async def list_sessions(
    owner: Owner,
    context: UseContext,
    labels: Labels,
    limit: Annotated[int | None, Query(ge=1, le=1000, description="Sessions per page; left out: all.")] = None,
    cursor: Annotated[str | None, Query(max_length=64, description="`next_cursor` of the page before.")] = None,
    language_name: OfLanguage = None,
    status: OfStatus = None,
    fields: Annotated[
        str | None,
        Query(max_length=1000, description="Show only these fields, separated by commas.", examples=["id,status"]),
    ] = None,
    data: WithData = True,
) -> Response:
    """List the caller's sessions, newest first. `metadata.KEY=VALUE` selects those with that label. Sessions that have
    expired or were deleted, and can be restored, are listed only where `status` asks for them."""
    shown = _shown(fields) - (set() if data else {"data"})
    which = await _filter(owner, language_name, status, labels, context)

    async def page(before: int | None, room: int) -> _Page:
        """Read some sessions, at most `room`, and the key of the last one looked at if there are more."""
        size = min(room, _LISTED_AT_ONCE)
        sessions, more = await context.sessions.page(replace(which, limit=size, before_key=before))
        views = await session_views(sessions, context)
        if status is not None:  # which may have changed since
            views = [session for session in views if session["status"] == status]
        views = [{name: value for name, value in session.items() if name in shown} for session in views]
        return views, sessions[-1].key if more else None

    first = await page(key_of(cursor), limit or _ALL)
    views, last = first
    if last is not None and len(views) != limit:
        return ClosingResponse(_pages(first, limit or _ALL, page), media_type=Answer.media_type)
    return Answer({"sessions": views, "count": len(views), "next_cursor": last and cursor_of(str(last))})


type _Views = list[dict[str, Any]]
type _Page = tuple[_Views, int | None]
_ALL = 1 << 62


async def _pages(page: _Page, room: int, following: Callable[[int, int], Awaitable[_Page]]) -> AsyncIterator[bytes]:
    """The answer that has `room` sessions, if there are as many, piece by piece: to make that of a hundred thousand at
    once, or of a few hundred large ones, would keep all other calls waiting for seconds, and take a gigabyte."""
    count, before = 0, b'{"sessions":['
    while True:
        views, last = page
        if views:
            yield before + json_bytes(views)[1:-1]
            count, before = count + len(views), b","
        room -= len(views)
        if last is None or not room:
            break
        page = await following(last, room)
    cursor = json_bytes(last and cursor_of(str(last)))
    yield (b"" if count else before) + b'],"count":%d,"next_cursor":%b}' % (count, cursor)


def _shown(fields: str | None) -> set[str]:
    """The names in a list of fields, None for all. Raises BadRequest for one that a session doesn't have."""
    known = list(SessionAnswer.model_fields)
    if fields is None:
        return set(known)
    names = [name.strip() for name in fields.split(",")]
    for name in names:
        if name not in known:
            raise BadRequest(
                f"'fields' names '{name[:80]}', which is not a field of a session.",
                hint=did_you_mean(name, known, f"The fields are {', '.join(known)}."),
                code="invalid_field",
            )
    return set(names)


@router.delete("", responses={200: {"model": DeletedAllAnswer}, **errors()})
async def delete_sessions(
    request: Request,
    owner: Owner,
    context: UseContext,
    labels: Labels,
    language_name: OfLanguage = None,
    status: OfStatus = None,
    purge: Purge = False,
) -> Response:
    """Delete the sessions that pass the filters, which are those of the list; without any, all of the caller's."""
    given = request.query_params.multi_items()
    for name, value in given:
        if name.startswith("_"):
            continue
        if not value or [other for other, _ in given].count(name) > 1:
            problem = "has several values" if value else "is empty"
            raise BadRequest(
                f"The query parameter '{name[:80]}' {problem}, so it doesn't say which sessions are to be deleted.",
                hint="Give it one value. GET /api/sessions with the same parameters shows what would be deleted.",
                code="invalid_field",
            )
    if status in ("expired", "deleted") and not purge:
        raise BadRequest(
            f"Sessions that are {status} are gone already.",
            hint="With purge=true they are deleted for good, and can't be restored.",
        )

    async def selected(sessions: Sequence[Session]) -> Sequence[Session]:
        states = await states_of(sessions, context)
        return [session for session in sessions if (states[session.key] or ("unknown",))[0] == status]

    gone = await context.sessions.delete_all(
        await _filter(owner, language_name, status, labels, context),
        selected=selected if status in _OF_NOW else None,
        purge=purge,
    )
    await context.audit.record(caller_of(request), "session.delete", *gone, purge=purge)
    return Answer(
        {"success": True, "deleted_count": len(gone), "deleted_sessions": gone, "deleted_at": timestamp(now())}
    )


@router.get("/{session_id}", responses={200: {"model": SessionAnswer}, **errors(404, 413)})
async def get_session(
    session_id: SessionId,
    context: UseContext,
    include: Include = None,
) -> Response:
    """Show a session."""
    session = await context.sessions.get(session_id)
    answer = session_view(session, context)
    if include == "files":
        check_file_count(session.snapshot, "/api/sessions/{id}/files")
        return await listing_response(with_files(answer, context.list_snapshot(session.snapshot, session_id)))
    return Answer(answer)


@router.patch("/{session_id}", responses={200: {"model": ChangedAnswer}, **errors(404, 409, 413, 429)})
async def change_session(session_id: SessionId, body: ChangeSession, request: Request, context: UseContext) -> Response:
    """Change a session's settings, data or setup. Changing data or setup waits for the run under way."""
    check_timeout(body.default_timeout, context.settings, "default_timeout")
    change = SessionChange(
        default_timeout=body.default_timeout,
        allow_internet=body.allowInternetAccess,
        allow_public=body.allowPublicAccess,
        metadata=body.metadata,
        ttl=body.ttl if "ttl" in body.model_fields_set else KEEP,
        limits=requested_limits(body.limits) or None,
        isolation=body.isolation,
        egress=body.egress.model_dump() if body.egress else None,
        service=body.service if "service" in body.model_fields_set else KEEP,
        storage=body.storage,
        record_code=body.record_code,
        setup=setup_text(setup_of(body.setup)) if "setup" in body.model_fields_set else KEEP,
    )
    session = await context.sessions.change(session_id, change, body.data)
    if body.allowPublicAccess is not None:
        await context.audit.record(caller_of(request), "session.public", session.id, public=body.allowPublicAccess)
    if any(changed is not None for changed in (change.allow_internet, change.egress, change.storage)):
        await context.live_sessions.follow(session_id)
    shown = session_view(session, context)
    return Answer(
        {
            "success": True,
            "id": session.id,
            "session": shown,
            "metadata": shown,
            "updated_at": timestamp(session.updated_at),
        }
    )


@router.delete("/{session_id}", responses={200: {"model": DeletedAnswer}, **errors(404)})
async def delete_session(
    session_id: SessionId, request: Request, context: UseContext, purge: Purge = False
) -> Response:
    """Delete a session. When this answers, its processes are dead and its working directory is gone."""
    await context.sessions.delete(session_id, purge=purge)
    await context.audit.record(caller_of(request), "session.delete", session_id.id, purge=purge)
    return Answer({"success": True, "id": session_id.id, "deleted_at": timestamp(now())})


@router.post("/{session_id}/restore", responses={200: {"model": SessionAnswer}, **errors(404, 409)})
async def restore_session(session_id: SessionId, request: Request, context: UseContext) -> Response:
    """Bring back a session that has expired or was deleted."""
    session = await context.sessions.restore(session_id)
    await context.audit.record(caller_of(request), "session.restore", session.id)
    return Answer(session_view(session, context))


@router.put("/{session_id}/code", tags=["code"], responses={200: {"model": CodeStoredAnswer}, **errors(404, 413)})
async def store_code(session_id: SessionId, body: CodeBody, context: UseContext) -> Response:
    """Store the code that is run where a run brings none."""
    stored = await context.sessions.store_code(session_id, body.code, body.description)
    return Answer({"success": True, "code_length": len(stored.code), "updated_at": timestamp(stored.updated_at)})


@router.get("/{session_id}/code", tags=["code"], responses={200: {"model": CodeAnswer}, **errors(404)})
async def stored_code(session_id: SessionId, context: UseContext) -> Response:
    """Show the stored code."""
    return Answer(code_answer(await context.sessions.stored_code(session_id)))


setup = APIRouter(prefix="/api/sessions/{session_id}", tags=["setup"], route_class=StrictRoute)


@setup.post("/setup", responses={200: {"model": SessionAnswer}, **errors(404, 409, 429)})
async def set_up_again(session_id: SessionId, context: UseContext) -> Response:
    """Install the session's packages again, after a failure or to get newer versions. Waits for the run under way."""
    return Answer(session_view(await context.setups.again(session_id), context))


@setup.get(
    "/setup/events",
    **described("Events `status` and `line`, then `done` or `error`.", "SetupEvent", SetupEvent, 404),
)
async def setup_events(session_id: SessionId, after: After, request: Request, context: UseContext) -> Response:
    """Follow the session's setup: events `status`, `line`, then `done` with its result. Lines written before the call
    come first, or those behind the event with the number `after`."""
    events = await context.setups.events(session_id, after)
    return event_stream(_setup_events(events), barred=until_barred(context, request, "read"))


async def _setup_events(events: AsyncGenerator[SetupNews]) -> AsyncGenerator[Event | Gap]:
    """The events of a setup, as they are sent."""
    async with aclosing(events):
        async for news in events:
            yield _setup_event(news)


def _setup_event(news: SetupNews) -> Event | Gap:
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


@setup.get("/environment", responses={200: {"model": EnvironmentAnswer}, **errors(404, 503)})
async def environment(session_id: SessionId, context: UseContext) -> Response:
    """List the packages that are installed for the session's programs, with their versions."""
    return Answer(environment_answer(*await context.setups.package_set(session_id)))
