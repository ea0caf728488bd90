"""WebSockets of processes: `attach` to any of them, `terminal` for a shell.

Input comes as binary messages, and controls as JSON in text messages. A terminal's output goes out as it is, as binary
messages; everything else is events, as JSON. A client that comes back counts the bytes that it has had: what it adds to
`after` of the first message is where it goes on. OpenAPI has no word for WebSockets, so these aren't in its
description.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing, suppress
from typing import Annotated, TypeGuard

from fastapi import APIRouter, Query, Request, Response
from pydantic import ValidationError

from era.api.addresses import base_url
from era.api.context import SessionId, StrictRoute, UseContext, until_barred
from era.api.event_stream import MAX_NUMBER
from era.api.processes import Process
from era.api.websocket import Closed, WebSocket, WebSocketResponse, check_upgrade
from era.core import frames
from era.core.event_log import Gap
from era.core.live.output_log import Exit, OutputLog
from era.core.live.processes import LiveProcess, ProcessRequest
from era.core.meter import turn
from era.core.pool import MOVED
from era.core.process import TerminalSize
from era.errors import BadRequest, EraError
from era.wire.processes import PtyBody, exit_fields, message, piece_fields, signal_number

router = APIRouter(prefix="/api/sessions/{session_id}", tags=["processes"], route_class=StrictRoute)

_SHELL = "exec $(command -v bash || command -v sh) -l"
_MAX_CONTROL = 1000
"""Characters of a control message. A longer one isn't parsed: it may be hundreds of thousands of values."""

_LEFT_SECONDS = 60.0
"""For which what a client has sent before it closed waits for the process to read it."""

After = Annotated[int, Query(ge=0, le=MAX_NUMBER, description="Go on behind this byte of its output.")]
Ticket = Annotated[
    str | None, Query(max_length=128, description="Of POST …/tickets, in place of a key: good for one WebSocket.")
]
Dimension = Annotated[int | None, Query(ge=1, le=1000)]


@router.get("/processes/{process}/attach", include_in_schema=False)
async def attach(
    session_id: SessionId,
    process: Process,
    request: Request,
    context: UseContext,
    after: After = 0,
    ticket: Ticket = None,
) -> Response:
    """A WebSocket to a process: its output from any byte that is still kept, and its input, if it takes any."""
    live = await context.processes.find(session_id, process)
    output = live.log if live is not None else await context.processes.log(session_id, process)
    session = await context.sessions.get(session_id)
    record = live.record if live is not None else await context.processes.get(session_id, process)
    check_upgrade(request)

    async def serve(socket: WebSocket) -> None:
        with context.live_sessions.in_use(session.key):
            await _serve(socket, record.id, output, live, after)

    return WebSocketResponse(serve, until_barred(context, request, "run"))


@router.get("/terminal", include_in_schema=False)
async def terminal(
    session_id: SessionId,
    request: Request,
    context: UseContext,
    cols: Dimension = None,
    rows: Dimension = None,
    process: Annotated[
        str | None, Query(max_length=128, description="A process with a terminal; left out: a new login shell.")
    ] = None,
    after: After = 0,
    ticket: Ticket = None,
) -> Response:
    """A WebSocket to a shell in a terminal, a new one or one that runs. It goes on when the WebSocket is closed."""
    session = await context.sessions.get(session_id)
    check_upgrade(request)
    if process is None:
        size = TerminalSize(cols or 80, rows or 24)
        started = await context.processes.start(
            session_id, ProcessRequest(base_url(request, context.settings), _SHELL, pty=size)
        )
        process = started.value.id
    live = await context.processes.find(session_id, process)
    record = live.record if live is not None else await context.processes.get(session_id, process)
    if not record.pty:
        raise BadRequest(f"Process '{record.id}' has no terminal.", hint="…/attach connects to any process.")
    output = live.log if live is not None else await context.processes.log(session_id, process)
    if live is not None and cols and rows and live.record.status == "running":
        await live.resize(TerminalSize(cols, rows))

    async def serve(socket: WebSocket) -> None:
        with context.live_sessions.in_use(session.key):
            await _serve(socket, record.id, output, live, after)

    return WebSocketResponse(serve, until_barred(context, request, "run"))


async def _serve(socket: WebSocket, process_id: str, output: OutputLog, live: LiveProcess | None, after: int) -> None:
    """Pass on output and input until the process has ended, or the client is gone."""
    await socket.send(message("attached", process_id=process_id, after=after))
    inputs: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=1)
    """What is still to be written; None is the end of it."""

    sending = asyncio.create_task(_send_output(socket, output, after, was_live=live is not None))
    receiving = asyncio.create_task(_receive(socket, live, inputs))
    writing = asyncio.create_task(_write_input(socket, live, inputs))
    try:
        await asyncio.wait({sending, receiving}, return_when=asyncio.FIRST_COMPLETED)
        if sending.done() and isinstance(sending.exception(), Closed):
            with suppress(TimeoutError):  # the client is gone, but what it sent before may still have to be written
                async with asyncio.timeout(_LEFT_SECONDS):
                    await receiving
    finally:
        for task in (sending, receiving, writing):
            task.cancel()
        await asyncio.gather(sending, receiving, writing, return_exceptions=True)


async def _send_output(socket: WebSocket, output: OutputLog, after: int, *, was_live: bool) -> None:
    async for event in output.follow(after):
        await turn()  # thousands may follow it, and all are woken at once
        if isinstance(event, Gap):
            await socket.send(message("gap", **{"from": event.first, "to": event.last}))
        elif isinstance(event, Exit):
            await socket.send(message("exit", id=event.number, **exit_fields(event)))
            if was_live and event.reason == MOVED:
                await socket.close(frames.RESTART)  # who connects anew is at another host then
        elif event.stream == "pty":
            await socket.send(event.data)
        else:
            await socket.send(message(event.stream, id=event.number, **piece_fields(event)))


async def _receive(socket: WebSocket, live: LiveProcess | None, inputs: asyncio.Queue[bytes | None]) -> None:
    async with aclosing(socket.messages()) as messages:  # or the socket couldn't be read while it is closed
        async for received in messages:
            try:
                if live is None:
                    raise BadRequest("This process has ended.", code="process_ended")
                if isinstance(received, bytes):
                    await inputs.put(received)  # at most one waits, while another is written
                else:
                    await _control(live, received, inputs)
            except EraError as error:
                await _tell(socket, error)
    with suppress(TimeoutError):
        async with asyncio.timeout(_LEFT_SECONDS):
            await inputs.join()


async def _write_input(socket: WebSocket, live: LiveProcess | None, inputs: asyncio.Queue[bytes | None]) -> None:
    while live is not None:
        data = await inputs.get()
        try:
            await live.close_stdin() if data is None else await live.write(data)
        except EraError as error:
            await _tell(socket, error)
        finally:
            inputs.task_done()


async def _control(live: LiveProcess, received: str, inputs: asyncio.Queue[bytes | None]) -> None:
    """Do what a text message says. Raises EraError."""
    try:
        asked = json.loads(received if len(received) <= _MAX_CONTROL else "")
        name, value = next(iter(asked.items())) if len(asked) == 1 else ("", None)
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise BadRequest("This is no control message.", hint=_CONTROLS, code="bad_message") from None
    if name == "resize":
        try:
            await live.resize(PtyBody.model_validate(value).size())
        except ValidationError:
            raise BadRequest("'resize' needs cols and rows from 1 to 1000.", code="bad_message") from None
    elif name == "signal" and _is_signal(value) and (number := signal_number(value)) is not None:
        await live.signal(number)
    elif name == "eof" and value is True:
        await inputs.put(None)  # behind all that was sent before
    else:
        raise BadRequest("This is no control message.", hint=_CONTROLS, code="bad_message")


def _is_signal(value: object) -> TypeGuard[str | int]:
    """Whether this can name a signal. In JSON `true` is no number."""
    return isinstance(value, str | int) and not isinstance(value, bool)


_CONTROLS = 'Send {"resize": {"cols": 80, "rows": 24}}, {"signal": "INT"} or {"eof": true}; input as binary messages.'


async def _tell(socket: WebSocket, error: EraError) -> None:
    with suppress(Closed):
        await socket.send(message("error", error=error.message, code=error.code, hint=error.hint))
