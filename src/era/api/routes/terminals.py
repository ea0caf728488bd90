"""WebSockets of processes: `attach` to any of them, `terminal` for a shell.

Input comes as binary messages, and controls as JSON in text messages. A terminal's output goes out as it is, as binary
messages; everything else is events, as JSON. A client that comes back counts the bytes that it has had: what it adds to
`after` of the first message is where it goes on. OpenAPI has no word for WebSockets, so these aren't in its
description.

A WebSocket begins as an HTTP request, and is one until it is accepted: guard, routes and dependencies treat it like any
other, and what is refused gets an ordinary answer. A route that accepts it answers with a WebSocketResponse, over a
tunnel (protocol.py). Whoever sends waits until the connection has room, so a slow client costs no memory but what the
kernel buffers. A client that doesn't read what it is sent, and one that answers no ping, is given up after a minute.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Annotated, Any, TypeGuard

from fastapi import APIRouter, Query, Request, Response
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from era.api.protocol.addresses import base_url
from era.api.protocol.protocol import Protocol
from era.api.routes.processes import Process
from era.api.routing.context import SessionId, StrictRoute, UseContext, until_barred
from era.api.routing.event_stream import MAX_NUMBER
from era.core.concurrency import frames
from era.core.concurrency.event_log import Gap
from era.core.concurrency.meter import turn
from era.core.concurrency.tasks import until_one_ends
from era.core.live.output_log import Exit, OutputLog
from era.core.live.processes import LiveProcess, ProcessRequest
from era.core.pool.pool import MOVED
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


MAX_MESSAGE_BYTES = 1 << 20
_MAX_TEXT_BYTES = 64 << 10
PING_SECONDS = 20.0
_DEAD_SECONDS = 60.0
"""A client that has answered no ping for so long is gone."""

_CLOSE_SECONDS = 5.0
_PIECE = 16 << 10
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class Closed(Exception):
    """The WebSocket is closed, or its client is gone."""


class WebSocket:
    """An accepted WebSocket. One task reads; any number may send."""

    def __init__(self, connection: Protocol, reader: asyncio.StreamReader) -> None:
        self._connection = connection
        self._reader = reader
        self._frames = frames.FrameReader(MAX_MESSAGE_BYTES, _MAX_TEXT_BYTES)
        self.is_closed = False
        """Whether we have said that it is closed."""

        self._heard = asyncio.Event()
        """Set when the client has said so, or is gone."""

        self._has_reader = False
        """Whether `messages` are being read, by one task."""

        self._unanswered = 0.0
        """When the first ping was sent that hasn't been answered, by the loop's clock; 0 for none."""

        self._reading = False

    async def send(self, data: bytes | str) -> None:
        """Send a message, and wait until there is room for more. Raises Closed."""
        if isinstance(data, str):
            await self._send(frames.made(frames.TEXT, data.encode()))
        else:
            await self._send(frames.made(frames.BINARY, data))

    async def messages(self) -> AsyncGenerator[bytes | str]:
        """What the client sends, messages in binary piece by piece, until it closes or is gone; also where nothing
        can be sent to it any more."""
        self._has_reader = True
        try:
            while data := await self._read():
                for frame in self._frames.feed(data):
                    await turn()
                    if frame.opcode == frames.CLOSE:
                        self._heard.set()
                        await self.close()
                        return
                    if frame.opcode == frames.PING:
                        with suppress(Closed):
                            await self._send(frames.made(frames.PONG, frame.data))
                    elif frame.opcode != frames.PONG:
                        yield frame.data.decode() if frame.opcode == frames.TEXT else frame.data
            self._heard.set()
        except frames.BadFrame as error:
            self._has_reader = False
            await self.close(error.code)
        finally:
            self._has_reader = False

    async def _read(self) -> bytes:
        self._reading = True
        data = await self._reader.read(_PIECE)
        self._reading = False
        self._unanswered = 0.0
        return data

    async def keep_alive(self) -> None:
        """Ping the client from time to time, until it is gone."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(PING_SECONDS)
            if self.is_closed:
                continue  # what came before that may still be on its way to where it goes
            if self._unanswered and self._reading and loop.time() > self._unanswered + _DEAD_SECONDS:
                return
            self._unanswered = self._unanswered or loop.time()
            try:
                await self._send(frames.made(frames.PING, b""))
            except Closed:
                if not self._reading:
                    await asyncio.sleep(_DEAD_SECONDS)  # likewise
                return

    async def close(self, code: int = frames.NORMAL) -> None:
        """Close it, and wait a moment for the client to say that it has understood: to hang up with bytes unread would
        take the code away from it."""
        with suppress(TimeoutError, Closed):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._send(frames.closing(code))
                self.is_closed = True
                if self._has_reader:
                    await self._heard.wait()
                elif not self._heard.is_set():
                    await self._read_to_close()

    async def _read_to_close(self) -> None:
        """Read until the client has closed it or is gone. What comes before that is dropped, however wrong it is."""
        follower = self._frames.follower()
        while not follower.has_closed and (data := await self._reader.read(_PIECE)):
            follower.follow(data)
            await turn()

    async def _send(self, frame: bytes) -> None:
        """Send a frame, and wait until there is room for more. Raises Closed."""
        if self.is_closed:
            raise Closed
        try:
            async with asyncio.timeout(_DEAD_SECONDS):
                await self._connection.send_raw(frame)
        except (ConnectionError, TimeoutError) as error:
            raise Closed from error


class WebSocketResponse(Response):
    """Accepts the WebSocket that a request asks for, and has it served until that ends."""

    def __init__(
        self,
        serve: Callable[[WebSocket], Awaitable[None]],
        barred: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        """`serve` returns or raises Closed. `barred` returns when its client may have it no longer, which closes it as
        a violation of policy (1008)."""
        super().__init__(status_code=101)
        self._serve = serve
        self._barred = barred

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection: Protocol = scope["extensions"]["era.connection"]
        key = dict(scope["headers"])[b"sec-websocket-key"]
        accept = base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest())
        headers = [
            (b"connection", b"Upgrade"),
            (b"upgrade", b"websocket"),
            (b"sec-websocket-accept", accept),
            (b"x-request-id", scope["state"]["request_id"].encode()),
        ]
        try:
            socket = WebSocket(connection, connection.open_tunnel(headers))
            await until_one_ends(self._served(socket), socket.keep_alive())
        except ConnectionError:
            pass  # the caller has gone before it was accepted
        finally:
            connection.transport.close()
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await connection.hang_up()
        except TimeoutError:
            await connection.cut()  # a client that doesn't read what is left for it

    async def _served(self, socket: WebSocket) -> None:
        with suppress(Closed):
            barred, serving = asyncio.ensure_future(self._barred()), asyncio.ensure_future(self._serve(socket))
            try:
                await asyncio.wait({barred, serving}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                barred.cancel()
                serving.cancel()
                await asyncio.gather(barred, serving, return_exceptions=True)
            if serving.cancelled():
                await socket.close(frames.POLICY)
                return
            serving.result()
            await socket.close()


def check_upgrade(request: Request) -> None:
    """Raises BadRequest for a request that is none for a WebSocket."""
    connection = request.scope.get("extensions", {}).get("era.connection")
    key = request.headers.get("sec-websocket-key", "")
    if connection is None or not connection.upgrading or not key:
        raise BadRequest("This call is a WebSocket.", hint="Open it with a WebSocket client.", code="not_a_websocket")
    if request.headers.get("sec-websocket-version") != "13":
        raise BadRequest("This server speaks version 13 of WebSocket.", code="not_a_websocket")
