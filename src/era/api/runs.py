"""Routes that run code: in a session, streamed, or once in a temporary sandbox."""

from __future__ import annotations

import codecs
import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import structlog
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from era.api.addresses import base_url
from era.api.context import (
    REPLAY,
    Answer,
    Context,
    IdempotencyKey,
    Owner,
    SessionId,
    StrictRoute,
    UseContext,
    check_env,
    check_timeout,
    claim_of,
    errors,
    language,
    secrets_of,
)
from era.api.invocations import invocation_of
from era.api.streaming import run_response
from era.core.program import Output
from era.core.run_messages import ExecuteRequest, RunEvent, RunRequest, RunStarted
from era.core.sessions import check_code
from era.errors import BadRequest, EraError, TooLarge
from era.wire.limits import requested_limits
from era.wire.runs import (
    BackgroundAnswer,
    ExecuteAnswer,
    ExecuteBody,
    RunAnswer,
    RunBody,
    execute_answer,
    result_answer,
    run_answer,
)

log = structlog.get_logger()

router = APIRouter(tags=["runs"], route_class=StrictRoute)

_MAX_FILES = 1000


def run_request(body: RunBody, request: Request, context: Context, key: str | None) -> RunRequest:
    """The core's request for a run, from a body. Raises BadRequest or TooLarge for what can't be run."""
    check_timeout(body.timeout, context.settings)
    check_env(body.env)
    if body.code is not None:
        check_code(body.code)
    return RunRequest(
        base_url(request, context.settings),
        body.code,
        body.env,
        body.timeout,
        body.atomic,
        claim_of(context, "run", key, body),
        body.background,
        secrets=secrets_of(body.secrets, body.env),
        invocation=invocation_of(body, body.code),
    )


@router.post(
    "/api/sessions/{session_id}/run",
    responses={200: {"model": RunAnswer}, 202: {"model": BackgroundAnswer}, **errors(404, 409, 413, 429)},
)
async def run(
    session_id: SessionId, body: RunBody, request: Request, context: UseContext, key: IdempotencyKey
) -> Response:
    """Run code in a session, and answer once its result is durable. With `background`, answer as soon as it has
    begun."""
    if body.background:
        begun = await context.runs.begin(session_id, run_request(body, request, context, key))
        answer = {"run_id": begun.run_id, "status": "running"}
        return Answer(answer, 202, headers=REPLAY if begun.replayed else None)
    done = await context.runs.run(session_id, run_request(body, request, context, key))
    return await run_response(done, run_answer, REPLAY if done.result.replayed else None)


@router.post(
    "/api/sessions/{session_id}/stream",
    responses={200: {"content": {"text/event-stream": {}}}, **errors(404, 409, 413, 429)},
    response_class=StreamingResponse,
)
async def stream(
    session_id: SessionId, body: RunBody, request: Request, context: UseContext, key: IdempotencyKey
) -> Response:
    """Run code in a session and stream its output: events `stdout`, `stderr`, then `done` or `error`."""
    if body.background:
        raise BadRequest("'background' is not a field of this call.", hint="POST …/run takes it.", code="invalid_field")
    events = context.runs.stream(session_id, run_request(body, request, context, key))
    # An error before the run has started becomes an ordinary answer.
    first = await anext(events)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    if isinstance(first, RunStarted):
        headers["X-Era-Run"] = first.run_id
    return StreamingResponse(_server_sent(first, events), media_type="text/event-stream", headers=headers)


@router.post("/api/execute", responses={200: {"model": ExecuteAnswer}, **errors(413, 429)})
async def execute(body: ExecuteBody, owner: Owner, request: Request, context: UseContext) -> Response:
    """Run code once, in a temporary sandbox that is gone when this answers."""
    check_timeout(body.timeout, context.settings)
    check_env(body.env)
    invocation = invocation_of(body, body.code)
    if body.code is None and not invocation.command:
        raise BadRequest("'code' is missing, and there is no 'command' in its place.", code="invalid_field")
    check_code(body.code or "")
    chosen = language(body.language, to_run=True)
    limits = {name: value for name, value in requested_limits(body.limits).items() if value is not None}
    context.rules.check(limits)
    request_ = ExecuteRequest(
        owner=owner,
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
    )
    return await run_response(await context.runs.execute(request_), partial(execute_answer, language=chosen))


async def _server_sent(first: RunEvent, rest: AsyncIterator[RunEvent]) -> AsyncIterator[bytes]:
    """The events of a run as server-sent events. UTF-8 sequences split between pieces of output are joined."""
    decoders = {stream: codecs.getincrementaldecoder("utf-8")("replace") for stream in ("stdout", "stderr")}

    def show(event: RunEvent) -> list[bytes]:
        if isinstance(event, RunStarted):
            return []
        if isinstance(event, Output):
            content = decoders[event.stream].decode(event.data)
            return [_event(event.stream, {"content": content})] if content else []
        tails = [(stream, decoder.decode(b"", final=True)) for stream, decoder in decoders.items()]
        shown = [_event(stream, {"content": tail}) for stream, tail in tails if tail]
        return [*shown, _event("done", result_answer(event))]

    try:
        for line in show(first):
            yield line
        async for event in rest:
            for line in show(event):
                yield line
    except EraError as error:
        yield _event("error", {"error": error.message, "code": error.code, "hint": error.hint})
    except Exception:
        log.exception("stream_failed")
        yield _event("error", {"error": EraError("The service failed.").message, "code": EraError.code})


def _event(kind: str, fields: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields}, ensure_ascii=False)}\n\n".encode()


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
