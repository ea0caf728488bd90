"""Server-sent events that are numbered and can be resumed: the one form of all event streams of the API.

How to use it. A route takes the parameter `after: After`, which is the number behind which the caller wants to go on:
from `?after=`, or from the header Last-Event-ID, which browsers send by themselves. It yields Events with consecutive
numbers, and a Gap (core/concurrency/event_log.py) for what isn't kept any more, and answers with `event_stream`:

    @router.get("/x/{id}/events", **described("Events `line`, last `end`.", "XEvent", LineEvent | EndEvent, 404))
    async def x_events(session_id: SessionId, after: After, context: UseContext) -> Response:
        log = context.things.log(session_id)  # an error raised here is an ordinary answer

        async def events() -> AsyncGenerator[Event | Gap]:
            async for item in log.follow(after):
                yield item if isinstance(item, Gap) else Event(item[0], "line", {"text": item[1].text})
            yield Event(log.last + 1, "end", {})

        return event_stream(events())

On the wire an event is `event: KIND`, `data: {"type": KIND, …}`, `id: NUMBER`. A Gap is the event `gap` with `from` and
`to`, whose id is its last number. An EraError that is raised later is the event `error`, which has no id: who comes
back goes on behind the last event that had one. While there is nothing to send, a comment goes out every
HEARTBEAT_SECONDS, so that nothing in between takes the connection for dead, and a dead one is noticed.

A reader's pace is its own: the next event is made when the connection has room for it, and one event at most waits.
Thousands may follow the same thing, and what happens there wakes all of them: so they take turns
(core/concurrency/meter.py).
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import structlog
from fastapi import Depends, Header, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import TypeAdapter
from starlette.types import Receive, Scope, Send

from era.api.routing.context import errors
from era.api.routing.streaming import PlainStreaming
from era.core.concurrency.event_log import Gap
from era.core.concurrency.meter import turn
from era.core.concurrency.streams import limit_buffer
from era.errors import BadRequest, EraError, Unauthorized

log = structlog.get_logger()

STREAM_TYPE = "text/event-stream"
HEARTBEAT_SECONDS = 15.0
MAX_NUMBER = (1 << 63) - 1
_BUFFERED_BYTES = 16 << 10
"""Of a reader who is slow, before the next event is made."""

_HEARTBEAT = b": heartbeat\n\n"
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


@dataclass(frozen=True, slots=True)
class Event:
    """One event to send."""

    number: int | None
    """Its place in the sequence. None for what is no part of it, such as an error that may be gone at the next try."""

    kind: str
    fields: Mapping[str, object]
    """What it says besides its `type`; JSON values."""


async def resumed_after(
    request: Request,
    after: Annotated[
        int, Query(ge=0, le=MAX_NUMBER, description="Go on behind the event with this number (its `id`).")
    ] = 0,
    _documented: Annotated[
        str | None,
        Header(
            alias="Last-Event-ID",
            description="The same as `after`, as browsers send it when they connect again; it wins over `after`.",
        ),
    ] = None,
) -> int:
    """The number behind which a caller goes on, 0 for all. Raises BadRequest for what is no number."""
    values = request.headers.getlist("last-event-id")
    if not values:
        return after
    if len(values) > 1 or not re.fullmatch(r"[0-9]{1,19}", values[0]) or int(values[0]) > MAX_NUMBER:
        raise BadRequest(
            "The header Last-Event-ID is not the id of an event.",
            hint="Send the id of the last event that came, or leave it out.",
            code="invalid_field",
        )
    return int(values[0])


After = Annotated[int, Depends(resumed_after)]


EVENTS: dict[str, TypeAdapter[Any]] = {}
"""The types of the events of all streams, by name, for the API's description."""


def described(what: str, name: str, events: Any, *statuses: int, headers: Any = None) -> dict[str, Any]:
    """The arguments of a route that answers with an event stream. `what` says what it sends; `events` is the type of
    the `data` of its events, a union of models, and `name` what that is called; `statuses` are as for `errors`."""
    answer = {"description": what, "headers": headers or {}, "content": stream_content(name, events)}
    return {"response_class": StreamingResponse, "responses": {200: answer, **errors(*statuses)}}


def stream_content(name: str, events: Any) -> dict[str, Any]:
    """What an event stream is in the description of an answer; arguments as for `described`."""
    EVENTS[name] = TypeAdapter(events)
    schema = {  # without a type: some readers take it for that of the whole stream, others for that of one event
        "description": "Server-sent events; `contentSchema` is that of the `data` of each.",
        "contentMediaType": "application/json",
        "contentSchema": {"$ref": f"#/components/schemas/{name}"},
    }
    return {STREAM_TYPE: {"schema": schema}}


async def before_hang_up[T](request: Request, first: Awaitable[T]) -> T | None:
    """Wait for an answer, or for what it begins with. If the caller hangs up before, it is cancelled, and this is None.
    The body of the request must have been read."""
    coming = asyncio.ensure_future(first)
    gone = asyncio.ensure_future(_hang_up(request.receive))
    try:
        await asyncio.wait({coming, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            coming.cancel()
            await asyncio.wait({coming})
            return None
        return coming.result()
    finally:
        coming.cancel()
        gone.cancel()


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event_stream(
    events: AsyncGenerator[Event | Gap | bytes],
    headers: Mapping[str, str] | None = None,
    barred: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> StreamingResponse:
    """The answer that sends these events as they come; bytes are encoded events. They are closed when it ends, also
    when `barred` returns, as then the caller may have them no longer."""
    return _EventStream(events, {**_HEADERS, **(headers or {})}, barred)


class _EventStream(PlainStreaming):
    """Closes its pieces when it ends: a reader that has gone leaves nothing behind."""

    def __init__(
        self,
        events: AsyncGenerator[Event | Gap | bytes],
        headers: Mapping[str, str],
        barred: Callable[[], Coroutine[Any, Any, None]] | None,
    ) -> None:
        super().__init__((), headers=headers, media_type=STREAM_TYPE)
        self._events, self._barred = events, barred

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = scope.get("extensions", {}).get("era.connection")
        if connection is not None:
            limit_buffer(connection.transport, _BUFFERED_BYTES)
        barred = None if self._barred is None else asyncio.ensure_future(self._barred())
        self.body_iterator = pieces = _beating(_encoded(self._events), barred)
        try:
            await super().__call__(scope, receive, send)
        finally:
            await pieces.aclose()
            if barred is not None:
                barred.cancel()


def encoded(event: Event | Gap) -> bytes:
    """An event as it is sent. The id comes last, so that whoever reads lines in pairs needn't know of it."""
    if isinstance(event, Gap):
        event = Event(event.last, "gap", {"from": event.first, "to": event.last})
    data = json.dumps({"type": event.kind, **event.fields}, ensure_ascii=False)
    number = "" if event.number is None else f"id: {event.number}\n"
    return f"event: {event.kind}\ndata: {data}\n{number}\n".encode()


async def _encoded(events: AsyncGenerator[Event | Gap | bytes]) -> AsyncGenerator[bytes]:
    try:
        async for event in events:
            await turn()
            yield event if isinstance(event, bytes) else encoded(event)
    except EraError as error:
        yield _error_event(error)
    except Exception:
        log.exception("stream_failed")
        yield encoded(Event(None, "error", {"error": EraError("The service failed.").message, "code": EraError.code}))
    finally:
        await events.aclose()


def _error_event(error: EraError) -> bytes:
    return encoded(Event(None, "error", {"error": error.message, "code": error.code, "hint": error.hint}))


async def _beating(events: AsyncGenerator[bytes], barred: asyncio.Future[None] | None) -> AsyncGenerator[bytes]:
    """The same until `barred` is done, with a heartbeat whenever nothing has come for a while. A large event is several
    pieces, and nothing comes in between them."""
    coming: asyncio.Task[bytes] | None = None
    try:
        while True:
            if coming is None:
                coming = asyncio.ensure_future(anext(events))
            awaited: set[asyncio.Future[Any]] = {coming} if barred is None else {coming, barred}
            done, _ = await asyncio.wait(awaited, timeout=HEARTBEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if barred in done:
                yield _error_event(Unauthorized("The key that this was asked for with is good for it no longer."))
                return
            if not done:
                yield _HEARTBEAT
                continue
            try:
                event = coming.result()
            except StopAsyncIteration:
                return
            coming = None
            content = memoryview(event)
            for at in range(0, len(content), _BUFFERED_BYTES):
                yield bytes(content[at : at + _BUFFERED_BYTES])
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.wait({coming})
        await events.aclose()


_WEIGHT = re.compile(r"q\s*=\s*(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)\s*", re.IGNORECASE)


def prefers(accept: str, wanted: str, usual: str) -> bool:
    """Whether a caller with this header wants the media type `wanted` more than `usual`. Who takes both alike, or says
    nothing of either, gets the usual one."""
    weights = _weights(accept)
    return _weight(weights, wanted) > _weight(weights, usual)


def takes(accept: str, wanted: str) -> bool:
    """Whether a caller with this header names the media type `wanted`, or all of its kind, as one that he takes. `*/*`
    doesn't name any."""
    weights = _weights(accept)
    weights.pop("*/*", None)
    return _weight(weights, wanted) > 0


def _weight(weights: dict[str, float], kind: str) -> float:
    """From 0 to 1, as the narrowest range says that the media type is in."""
    ranges = (kind, f"{kind.partition('/')[0]}/*", "*/*")
    return next((weights[each] for each in ranges if each in weights), 0.0)


def _weights(accept: str) -> dict[str, float]:
    """The weight of each range of media types that the header names; parameters apart."""
    found: dict[str, float] = {}
    for item in accept.split(","):
        kind, *parameters = item.split(";")
        given = [match for each in parameters if (match := _WEIGHT.fullmatch(each.strip()))]
        weight = float(given[0][1]) if given else 1.0
        kind = kind.strip().lower()
        found[kind] = max(weight, found.get(kind, 0.0))
    return found
