"""Routes that run code: in a session, streamed, or once in a temporary sandbox; and of runs' records and output."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response

from era.api.protocol.addresses import base_url
from era.api.protocol.answers import HUNG_UP, Answer
from era.api.routing.context import (
    REPLAY,
    CallerId,
    Context,
    Cursor,
    IdempotencyKey,
    Limit,
    Owner,
    SessionId,
    StrictRoute,
    UseContext,
    WithData,
    caller_of,
    check_env,
    check_timeout,
    claim_of,
    errors,
    key_of,
    language,
    moment,
    possible_id,
    secrets_of,
    until_barred,
)
from era.api.routing.event_stream import (
    STREAM_TYPE,
    After,
    Event,
    before_hang_up,
    described,
    event_stream,
    prefers,
    stream_content,
)
from era.api.routing.streaming import paged_response, ranged_response, run_response
from era.core import jsontext
from era.core.concurrency.event_log import Gap
from era.core.concurrency.meter import turn
from era.core.execution.run_messages import ExecuteRequest, RunRequest, RunResult, RunStarted
from era.core.execution.run_messages import RunEvent as CoreEvent
from era.core.metadata import RunFilter
from era.core.models import OwnedId, Status, command_of
from era.core.program import Invocation
from era.core.sessions.sessions import check_code
from era.core.trees.paths import parse
from era.errors import BadRequest, TooLarge
from era.wire.base import requested_limits, text
from era.wire.runs import (
    BackgroundAnswer,
    ExecuteAnswer,
    ExecuteBody,
    ExecuteEvent,
    InvokedBody,
    RunAnswer,
    RunBody,
    RunEvent,
    RunRecordAnswer,
    RunRecordsAnswer,
    execute_answer,
    execute_outcome,
    record_answer,
    result_answer,
    run_answer,
)

router = APIRouter(tags=["runs"], route_class=StrictRoute)

_MAX_FILES = 1000


async def run_request(body: RunBody, request: Request, context: Context, key: str | None) -> RunRequest:
    """The core's request for a run, from a body. Raises BadRequest or TooLarge for what can't be run."""
    check_timeout(body.timeout, context.settings)
    check_env(body.env)
    if body.code is not None:
        check_code(body.code)
    asked = RunRequest(
        base_url(request, context.settings),
        body.code,
        body.env,
        body.timeout,
        body.atomic,
        await claim_of(context, "run", key, body),
        body.background,
        secrets=secrets_of(body.secrets, body.env),
        invocation=_invocation_of(body, body.code),
        context=_context_of(body),
        record_code=body.record_code,
    )
    _let_go(body)
    return asked


async def _recorded(session_id: OwnedId, asked: RunRequest, request: Request, context: Context) -> RunRequest:
    """The run that is asked for, once the use of its secrets is in the audit log. Raises Unavailable."""
    await context.audit.secrets(caller_of(request), session_id.id, asked.secrets)
    return asked


def _context_of(body: RunBody) -> str | None:
    """The context of a run. Raises BadRequest for what a cell can't have."""
    if body.context is not None:
        if body.context in (".", ".."):
            raise BadRequest("'context' can't be '.' or '..'.", hint="No path can name it.", code="invalid_field")
        for name, given in (("args", body.args), ("command", body.command), ("atomic", body.atomic)):
            if given:
                raise BadRequest(
                    f"A run in a context has no '{name}'.",
                    hint="Leave out 'context' for an ordinary run.",
                    code="invalid_field",
                )
    return body.context


@router.post(
    "/api/sessions/{session_id}/run",
    responses={200: {"model": RunAnswer}, 202: {"model": BackgroundAnswer}, **errors(404, 409, 413, 429)},
)
async def run(
    session_id: SessionId,
    body: RunBody,
    request: Request,
    context: UseContext,
    key: IdempotencyKey,
    data: WithData = True,
) -> Response:
    """Run code in a session, and answer once its result is durable. With `background`, answer as soon as it has
    begun."""
    asked = await _recorded(session_id, await run_request(body, request, context, key), request, context)
    if body.background:
        begun = await context.runs.begin(session_id, asked)
        answer = {"run_id": begun.value, "status": "running"}
        return Answer(answer, 202, headers=REPLAY if begun.replayed else None)
    done = await context.runs.run(session_id, asked)
    if not data:
        done = replace(done, result=replace(done.result, data=None))
    return await run_response(done, run_answer, REPLAY if done.result.replayed else None)


@router.post(
    "/api/sessions/{session_id}/stream",
    **described(
        "Events `stdout` and `stderr` as the program writes, in a context also what the cell shows, then `done` or "
        "`error`.",
        "RunEvent",
        RunEvent,
        404,
        409,
        413,
        429,
        headers={"X-Era-Run": {"description": "The run's id.", "schema": {"type": "string"}}},
    ),
)
async def stream(
    session_id: SessionId,
    body: RunBody,
    request: Request,
    context: UseContext,
    key: IdempotencyKey,
    data: WithData = True,
) -> Response:
    """Run code in a session and stream its output: events `stdout`, `stderr`, then `done` or `error`. If the connection
    breaks, `GET …/runs/{run_id}/events` goes on behind the last event that came; the header X-Era-Run has the run's
    id."""
    if body.background:
        raise BadRequest("'background' is not a field of this call.", hint="POST …/run takes it.", code="invalid_field")
    asked = await _recorded(session_id, await run_request(body, request, context, key), request, context)
    events = context.runs.stream(session_id, asked)
    # An error before the run has started becomes an ordinary answer.
    first = await anext(events)
    headers = {}
    if isinstance(first, RunStarted):
        headers = {"X-Era-Run": first.run_id} | (REPLAY if first.replayed else {})
    return event_stream(_run_events(events, with_data=data), headers)


@router.post(
    "/api/execute",
    responses={
        200: {"model": ExecuteAnswer, "content": stream_content("ExecuteEvent", ExecuteEvent)},
        **errors(413, 429),
    },
)
async def execute(body: ExecuteBody, caller: CallerId, request: Request, context: UseContext) -> Response:
    """Run code once, in a temporary sandbox that is gone when this answers. Where the header
    Accept wants `text/event-stream` more than JSON, stream its output: events `stdout`, `stderr`, then `done` or
    `error`. Whoever hangs up ends the program."""
    check_timeout(body.timeout, context.settings)
    check_env(body.env)
    invocation = _invocation_of(body, body.code)
    if body.code is None and not invocation.command:
        raise BadRequest("'code' is missing, and there is no 'command' in its place.", code="invalid_field")
    check_code(body.code or "")
    chosen = language(body.language, to_run=True)
    limits = {name: value for name, value in requested_limits(body.limits).items() if value is not None}
    context.rules.check(limits)
    request_ = ExecuteRequest(
        owner=caller.owner,
        base_url=base_url(request, context.settings),
        language=chosen,
        code=body.code or "",
        env=body.env,
        timeout=body.timeout,
        files=_files(body.files),
        isolation=body.isolation,
        limits=context.rules.granted(limits),
        allow_internet=body.allowInternetAccess,
        secrets=secrets_of(body.secrets, body.env),
        invocation=invocation,
        key_id=caller.key_id,
    )
    _let_go(body)
    await context.audit.secrets(caller_of(request), "", request_.secrets)
    if prefers(",".join(request.headers.getlist("accept")), STREAM_TYPE, "application/json"):
        events = context.runs.execute_streamed(request_)
        # An error before the program has begun becomes an ordinary answer.
        if await before_hang_up(request, anext(events)) is None:
            return Response(status_code=HUNG_UP)
        return event_stream(_closing_run_events(events, partial(execute_outcome, language=chosen)))
    done = await before_hang_up(request, context.runs.execute(request_))
    if done is None:
        return Response(status_code=HUNG_UP)
    return await run_response(done, partial(execute_answer, language=chosen))


def _files(files: dict[str, str]) -> dict[str, bytes]:
    """The files of an execute call, as bytes. Raises BadRequest for paths that can't be used, TooLarge for too many."""
    if len(files) > _MAX_FILES:
        raise TooLarge(f"'files' has {len(files)} files, {_MAX_FILES} are allowed.")
    checked = {}
    for path, content in files.items():
        parts = path.split("/")
        if len(path.encode()) > 1024 or "\0" in path or any(part in ("", ".", "..") for part in parts):
            raise BadRequest(
                f"'files' has a path that can't be used: {path[:80]!r}.",
                hint="Paths are relative, separated by '/', with no '.', '..' or empty parts.",
            )
        checked[path] = content.encode()
    for path in checked:
        parent = path.rpartition("/")[0]
        while parent:
            if parent in checked:
                raise BadRequest(f"'files' has '{parent[:80]}' both as a file and as a directory.")
            parent = parent.rpartition("/")[0]
    return checked


async def _run_events(
    events: AsyncIterator[CoreEvent | Gap],
    *,
    with_data: bool = True,
    outcome: Callable[[RunResult], dict[str, Any]] = result_answer,
) -> AsyncGenerator[Event | Gap]:
    """Yield events `stdout` and `stderr`, those of a cell, and `done`, which `outcome` makes. A RunStarted is none: the
    headers say it."""
    async for event in events:
        if isinstance(event, RunStarted):
            continue
        if isinstance(event, Gap):
            yield event
        elif isinstance(event, RunResult):
            result = event if with_data else replace(event, data=None)
            yield Event(event.pieces + 1, "done", outcome(result))
        else:
            if event.stream == "event":
                fields = await jsontext.stored(event.data.decode())
                yield Event(event.number, str(fields.pop("type")), fields)
            else:
                yield Event(event.number, event.stream, {"content": text(event.data)})
            await turn()


async def _closing_run_events(
    events: AsyncGenerator[CoreEvent], outcome: Callable[[RunResult], dict[str, Any]]
) -> AsyncGenerator[Event | Gap]:
    """The same of events that nobody else takes: their source is closed as soon as these are."""
    async with aclosing(events):
        async for event in _run_events(events, outcome=outcome):
            yield event


records = APIRouter(prefix="/api/sessions/{session_id}/runs", tags=["runs"], route_class=StrictRoute)
all_runs = APIRouter(tags=["runs"], route_class=StrictRoute)

# Output may hold anything. A browser must not show it as a page of this server.
_HEADERS = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox; default-src 'none'"}


@records.get("", responses={200: {"model": RunRecordsAnswer}, **errors(404)})
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
        records = await context.history.list(session_id, limit=limit + 1, before=key_of(cursor))
    else:
        records = await context.history.of_key(session_id, idempotency_key)
    return await paged_response(
        "runs", records, limit, lambda record: record_answer(record, session_id.id), lambda record: record.key
    )


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
        key_of(cursor),
    )
    found = await context.history.of_owner(which)
    return await paged_response(
        "runs", found, limit, lambda each: record_answer(each[1], each[0]), lambda each: each[1].key
    )


@records.get("/{run_id}", responses={200: {"model": RunRecordAnswer}, **errors(404)})
async def get_run(session_id: SessionId, run_id: str, context: UseContext) -> Response:
    """Show the record of a run, also while it is under way."""
    record, cell = await context.history.get_with_cell(session_id, run_id)
    return Answer(record_answer(record, session_id.id, cell))


@records.delete("/{run_id}", responses={200: {"model": RunRecordAnswer}, **errors(404)})
async def stop_run(session_id: SessionId, run_id: str, context: UseContext) -> Response:
    """Stop a run that is under way, and answer with its record once that is durable. A run that has ended is left
    alone."""
    return Answer(record_answer(await context.runs.stop(session_id, run_id), session_id.id))


@records.get(
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
    events = _run_events(await context.history.events(session_id, run_id, after), with_data=data)
    return event_stream(events, barred=until_barred(context, request, "read"))


@records.get(
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


_MAX_WORD_BYTES = (128 << 10) - 1  # Linux: MAX_ARG_STRLEN, with its final NUL
_MAX_WORDS_BYTES = 1 << 20


def _invocation_of(body: InvokedBody, code: str | None) -> Invocation:
    """How the program is called. Raises BadRequest or TooLarge for what no program can be called with."""
    command: Sequence[str] = ()
    if body.command is not None:
        if code is not None:
            raise BadRequest("'code' and 'command' can't both be run.", hint="Leave one of them out.")
        if body.args:
            raise BadRequest("'args' are for code.", hint="A command has its arguments in 'command'.")
        command = command_words(body.command)
    _check_words("args", body.args)
    return Invocation(body.args, _encoded("stdin", body.stdin), directory(body.cwd), command)


def _let_go(body: InvokedBody) -> None:
    """The run has what the body of its request says: drop what may be long in it, since the run may wait for long. As
    text it takes up to four bytes a character."""
    body.stdin = ""
    if isinstance(body, ExecuteBody):
        body.files = {}


def command_words(command: str | list[str]) -> list[str]:
    """A command as an argument vector. Raises BadRequest or TooLarge for what no program can be called with."""
    named = command if isinstance(command, str) else "".join(command[:1])
    if not named.strip():
        raise BadRequest("'command' names no program.")
    words = command_of(command)
    _check_words("command", words)
    return words


def directory(cwd: str) -> str:
    """A directory below the working directory; empty for that itself. Raises BadRequest."""
    _encoded("cwd", cwd)
    name = "/".join(part for part in cwd.removesuffix("/").split("/") if part != ".")
    if name or cwd.startswith("/"):
        parse(name)
    return name


def _check_words(field: str, words: Sequence[str]) -> None:
    """Raises BadRequest or TooLarge for words that can't be arguments of a program (execve(2))."""
    total = 0
    for word in words:
        size = len(_encoded(field, word))
        if "\0" in word:
            raise BadRequest(f"'{field}' has a NUL character.")
        total += size
        if size > _MAX_WORD_BYTES or total > _MAX_WORDS_BYTES:
            raise TooLarge(
                f"'{field}' is too large: 128 KiB a word and 1 MiB in all are allowed.", hint="Send it as 'stdin'."
            )


def _encoded(field: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise BadRequest(f"'{field}' has a lone surrogate (half of a character).") from None
