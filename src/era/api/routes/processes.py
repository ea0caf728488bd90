"""Routes of processes beside runs, whose WebSockets are in terminals.py, and of contexts, whose runs are in runs.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from era.api.protocol.addresses import base_url
from era.api.protocol.answers import Answer
from era.api.routes.runs import command_words, directory
from era.api.routing.context import (
    REPLAY,
    IdempotencyKey,
    SessionId,
    StrictRoute,
    UseContext,
    caller_of,
    check_env,
    check_timeout,
    claim_of,
    errors,
    secrets_of,
    session_view,
    until_barred,
)
from era.api.routing.event_stream import After, Event, described, event_stream
from era.core.concurrency.event_log import Gap
from era.core.live.output_log import Exit
from era.core.live.processes import ID, STOPPED, ProcessRequest
from era.core.models import now, timestamp
from era.core.owners.api_keys import TICKET_SECONDS
from era.core.sessions.sessions import keeping_files
from era.errors import BadRequest, Conflict
from era.wire.contexts import (
    ContextAnswer,
    ContextDeletedAnswer,
    ContextsAnswer,
    InterruptedAnswer,
    context_answer,
)
from era.wire.processes import (
    CheckpointAnswer,
    InputAnswer,
    ProcessAnswer,
    ProcessesAnswer,
    ProcessEvent,
    ResizeBody,
    SignalBody,
    StartProcess,
    SteeredAnswer,
    TicketAnswer,
    exit_fields,
    piece_fields,
    process_answer,
    signal_number,
)
from era.wire.sessions import SessionAnswer

router = APIRouter(prefix="/api/sessions/{session_id}", tags=["processes"], route_class=StrictRoute)

_INPUT_SECONDS = 30.0
"""For which a process may leave input unread before the call says so."""

Process = Annotated[str, Path(max_length=128, description="A process's id or tag.")]


@router.post("/processes", status_code=201, responses={201: {"model": ProcessAnswer}, **errors(404, 409, 413, 429)})
async def start_process(
    session_id: SessionId, body: StartProcess, request: Request, context: UseContext, key: IdempotencyKey
) -> Response:
    """Start a process beside runs. The session is live from now on, until it has been idle for a while."""
    check_timeout(body.timeout, context.settings)
    check_env(body.env)
    command_words(body.command)
    if body.tag is not None and (ID.fullmatch(body.tag) or body.tag in (".", "..")):
        raise BadRequest("'tag' can't be what an id of a process looks like, '.' or '..'.", code="invalid_field")
    secrets = secrets_of(body.secrets, body.env)
    await context.audit.secrets(caller_of(request), session_id.id, secrets)
    started = await context.processes.start(
        session_id,
        ProcessRequest(
            base_url(request, context.settings),
            body.command,
            directory(body.cwd),
            body.env,
            secrets,
            body.stdin,
            None if body.pty is None else body.pty.size(),
            body.tag,
            body.timeout,
            await claim_of(context, "process", key, body),
        ),
    )
    return Answer(process_answer(started.value), 201, headers=REPLAY if started.replayed else None)


@router.get("/processes", responses={200: {"model": ProcessesAnswer}, **errors(404)})
async def list_processes(session_id: SessionId, context: UseContext) -> Response:
    """List the processes that run and those that ended last, newest first."""
    processes = [process_answer(record) for record in await context.processes.list(session_id)]
    return Answer({"processes": processes, "count": len(processes)})


@router.get("/processes/{process}", responses={200: {"model": ProcessAnswer}, **errors(404)})
async def get_process(session_id: SessionId, process: Process, context: UseContext) -> Response:
    """Show a process."""
    return Answer(process_answer(await context.processes.get(session_id, process)))


@router.delete("/processes/{process}", responses={200: {"model": ProcessAnswer}, **errors(404)})
async def end_process(session_id: SessionId, process: Process, context: UseContext) -> Response:
    """End a process: SIGTERM, two seconds later SIGKILL. It is dead when this answers."""
    await context.processes.end(session_id, process, STOPPED)
    return Answer(process_answer(await context.processes.get(session_id, process)))


@router.patch("/processes/{process}", responses={200: {"model": ProcessAnswer}, **errors(404, 409)})
async def resize_process(session_id: SessionId, process: Process, body: ResizeBody, context: UseContext) -> Response:
    """Give a process's terminal another size."""
    async with context.processes.running(session_id, process) as running:
        await running.resize(body.pty.size())
        return Answer(process_answer(await running.shown()))


@router.post("/processes/{process}/signal", responses={200: {"model": SteeredAnswer}, **errors(404, 409)})
async def signal_process(session_id: SessionId, process: Process, body: SignalBody, context: UseContext) -> Response:
    """Send a signal to a process and its process group."""
    number = signal_number(body.signal)
    if number is None:
        raise BadRequest(
            f"'signal' names no signal: {str(body.signal)[:40]!r}.",
            hint="Send a name such as TERM, INT or KILL, or a number from 1 to 64.",
            code="invalid_field",
        )
    async with context.processes.running(session_id, process) as running:
        await running.signal(number)
        return Answer({"success": True, "process_id": running.record.id})


@router.post(
    "/processes/{process}/stdin",
    responses={200: {"model": InputAnswer}, **errors(404, 408, 409, 413)},
    openapi_extra={
        "requestBody": {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
    },
)
async def write_stdin(session_id: SessionId, process: Process, request: Request, context: UseContext) -> Response:
    """Write bytes to a process's standard input or terminal. Answers once the process can read all of them."""
    written = 0
    async with context.processes.running(session_id, process) as running:
        running.check_input()
        async for piece in request.stream():
            try:
                async with asyncio.timeout(_INPUT_SECONDS):
                    await running.write(piece)
            except TimeoutError:
                raise Conflict(
                    f"Process '{running.record.id}' has read nothing for {_INPUT_SECONDS:g} seconds.",
                    hint=f"{written} bytes were taken before, and some of the next ones may be, too.",
                    code="input_not_read",
                    details={"bytes": written},
                ) from None
            written += len(piece)
        return Answer({"success": True, "process_id": running.record.id, "bytes": written})


@router.delete("/processes/{process}/stdin", responses={200: {"model": SteeredAnswer}, **errors(404, 409)})
async def close_stdin(session_id: SessionId, process: Process, context: UseContext) -> Response:
    """End a process's standard input. At a terminal this is what Ctrl-D does."""
    async with context.processes.running(session_id, process) as running:
        await running.close_stdin()
        return Answer({"success": True, "process_id": running.record.id})


@router.get(
    "/processes/{process}/events",
    **described(
        "Events `stdout`, `stderr` and `pty`, numbered by their last byte; last `exit`. `gap` for what is gone.",
        "ProcessEvent",
        ProcessEvent,
        404,
    ),
)
async def follow_process(
    session_id: SessionId, process: Process, after: After, request: Request, context: UseContext
) -> Response:
    """Follow what a process writes, from any byte that is still kept, to its end."""
    output, kept_open = await context.processes.followed(session_id, process)

    async def events() -> AsyncGenerator[Event | Gap]:
        with kept_open:
            async for event in output.follow(after):
                if isinstance(event, Gap):
                    yield event
                elif isinstance(event, Exit):
                    yield Event(event.number, "exit", exit_fields(event))
                else:
                    yield Event(event.number, event.stream, piece_fields(event))

    return event_stream(events(), barred=until_barred(context, request, "read"))


@router.post("/stop", responses={200: {"model": SessionAnswer}, **errors(404, 429)})
async def stop_session(session_id: SessionId, context: UseContext) -> Response:
    """End all processes of a session and commit what they left. Its next run begins where they ended."""
    return Answer(session_view(await context.live_sessions.put_away(session_id), context))


@router.post("/checkpoint", responses={200: {"model": CheckpointAnswer}, **errors(404, 409, 413, 429)})
async def checkpoint(session_id: SessionId, context: UseContext) -> Response:
    """Make what the files of a session are at this moment its next version. Waits for the run under way."""
    session = keeping_files(await context.sessions.get(session_id))
    with context.live_sessions.in_use(session.key) as live:
        if live is None:  # its version is all there is of it
            return Answer({"version": session.version, "consistent": True})
        made = await context.checkpoints.request(live)
    return Answer({"version": made.version, "consistent": made.consistent})


@router.post("/tickets", status_code=201, responses={201: {"model": TicketAnswer}, **errors(404, 429)})
async def give_ticket(session_id: SessionId, request: Request, context: UseContext) -> Response:
    """A ticket, with which a browser's page can open one WebSocket of this session, within half a minute."""
    await context.sessions.get(session_id)
    ticket = context.tickets.give(caller_of(request), session_id.id)
    expires = now() + TICKET_SECONDS * 1_000_000
    return Answer({"ticket": ticket, "expires_at": timestamp(expires)}, 201)


contexts = APIRouter(prefix="/api/sessions/{session_id}/contexts", tags=["contexts"], route_class=StrictRoute)

ContextName = Annotated[str, Path(max_length=64, description="The context's name.")]


@contexts.get("", responses={200: {"model": ContextsAnswer}, **errors(404)})
async def list_contexts(session_id: SessionId, context: UseContext) -> Response:
    """List the contexts that have an interpreter, in the order in which they were made."""
    found = [context_answer(one) for one in await context.contexts.list(session_id)]
    return Answer({"contexts": found, "count": len(found)})


@contexts.delete("/{name}", responses={200: {"model": ContextDeletedAnswer}, **errors(404)})
async def delete_context(session_id: SessionId, name: ContextName, context: UseContext) -> Response:
    """End a context and forget it. A run in it ends, too."""
    await context.contexts.delete(session_id, name)
    return Answer({"success": True, "name": name})


@contexts.post("/{name}/interrupt", responses={200: {"model": InterruptedAnswer}, **errors(404)})
async def interrupt_context(session_id: SessionId, name: ContextName, context: UseContext) -> Response:
    """Interrupt the cell that is under way in a context, as Ctrl-C does. Variables stay."""
    interrupted = await context.contexts.interrupt(session_id, name)
    return Answer({"success": True, "name": name, "interrupted": interrupted})


@contexts.post("/{name}/restart", responses={200: {"model": ContextAnswer}, **errors(404, 409)})
async def restart_context(session_id: SessionId, name: ContextName, request: Request, context: UseContext) -> Response:
    """Give a context a new interpreter, also where its own has ended. A run in it ends, and variables are gone."""
    restarted = await context.contexts.restart(session_id, name, base_url(request, context.settings))
    return Answer(context_answer(restarted))
