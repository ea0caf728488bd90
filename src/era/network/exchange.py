"""HTTP/1.1 between a program and a host that its run has secrets for: see interception.py."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import anyio
import h11
from anyio.abc import ByteStream

from era.core.allowlist import folded
from era.core.tasks import until_one_ends
from era.network.http1 import IDLE_SECONDS, MAX_HEAD, Refused, Traffic, explained
from era.network.swapping import MAX_BODY, ROUTING, Swap, writing

GONE = (OSError, TimeoutError, anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream)
"""How streams tell that the other end is, or might as well be."""

_HOST = re.compile(r"([^\s:/@\[\]]+)(?::[0-9]{1,5})?")


def named_host(headers: Mapping[bytes, bytes]) -> str:
    """Whom a request's `Host` names, "" where that is nobody."""
    found = _HOST.fullmatch(headers.get(b"host", b"").decode("latin-1"))
    return folded(found[1]) if found else ""


class Exchange:
    """Requests from `near` to `far` and answers back, on one connection each."""

    def __init__(
        self,
        near: ByteStream,
        far: ByteStream,
        host: str,
        swap: Swap,
        traffic: Traffic,
        bodies: asyncio.Semaphore,
    ) -> None:
        """`swap` is for requests to `host`; as many bodies are held at a time as `bodies` lets."""
        self._near, self._far, self._host, self._swap = near, far, host, swap
        self._traffic, self._bodies = traffic, bodies
        self._asks = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        """Towards the program."""

        self._answers = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
        """Towards the server."""

        self._busy = False
        """From a request until its answer has been passed on."""

        self._asked = asyncio.Event()
        """The whole request has been passed on."""

        self._turned = asyncio.Event()
        """The next request may come."""

        self._clock = asyncio.timeout(IDLE_SECONDS)

    async def run(self, refusal: Refused | None) -> bool:
        """Serve until one end closes; whether that was in order. With a `refusal` the first request is answered so."""
        tasks = [asyncio.create_task(self._out(refusal))]
        if refusal is None:
            tasks.append(asyncio.create_task(self._back()))
        try:
            async with self._clock:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                try:
                    for task in tasks:
                        if task.done():
                            task.result()
                except (Refused, h11.ProtocolError) as error:
                    return await self._refuse(error if isinstance(error, Refused) else self._misunderstood())
                return True
        except GONE:
            return False
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _moved(self) -> None:
        self._clock.reschedule(asyncio.get_running_loop().time() + IDLE_SECONDS)

    # -- there ------------------------------------------------------------------------------------------------------

    async def _out(self, refusal: Refused | None) -> None:
        while True:
            event = await self._heard()
            if isinstance(event, h11.Request):
                if refusal is not None:
                    raise refusal
                self._busy = True
                await self._request(event)
            elif isinstance(event, h11.Data | h11.EndOfMessage):
                await self._ask(event)
            elif event is h11.PAUSED:
                await self._turned.wait()
                self._turned.clear()
            else:
                if self._busy:
                    await asyncio.Event().wait()  # it has nothing more to say, and still hears the answer
                return

    async def _heard(self) -> Any:
        """The next event from the program."""
        while (event := self._asks.next_event()) is h11.NEED_DATA:
            try:
                data = await self._near.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                data = b""
            self._traffic.sent += len(data)
            self._moved()
            self._asks.receive_data(data)
        return event

    async def _request(self, request: h11.Request) -> None:
        headers = list(request.headers.raw_items())
        named = dict(request.headers)
        _check(request, named)
        if named_host(named) != self._host:
            await self._ask(_written(request, request.target, headers))
            return
        target, headers = self._swap.target(request.target), self._swap.headers(headers)
        if not _is_searched(named):
            await self._ask(_written(request, target, headers))
            return
        async with self._bodies:
            body = self._swap.body(named[b"content-type"], await self._whole())
            length = str(len(body)).encode()
            kept = [(name, value) for name, value in headers if name.lower() not in (b"content-length", b"expect")]
            await self._ask(_written(request, target, [*kept, (b"Content-Length", length)]))
            await self._ask(h11.Data(data=body))
            await self._ask(h11.EndOfMessage())

    async def _whole(self) -> bytes:
        """A body, which is small."""
        if self._asks.they_are_waiting_for_100_continue:
            await self._tell(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))
        body = b""
        while isinstance(event := await self._heard(), h11.Data):
            body += event.data
        return body

    async def _ask(self, event: Any) -> None:
        try:
            await self._far.send(self._answers.send(event) or b"")
        except GONE:
            await asyncio.Event().wait()  # it wants no more; what it has said is still to be passed on
        self._moved()
        self._traffic.secrets |= self._swap.used
        if isinstance(event, h11.EndOfMessage):
            self._asked.set()

    # -- and back ---------------------------------------------------------------------------------------------------

    async def _back(self) -> None:
        while True:
            event = self._answers.next_event()
            if event is h11.NEED_DATA:
                self._answers.receive_data(await self._answer())
            elif isinstance(event, h11.InformationalResponse) and event.status_code == 101:
                await self._switch(event)
                return
            elif isinstance(event, h11.Response):
                names = dict(event.headers)
                if b"transfer-encoding" in names and (b"content-length" in names or event.http_version < b"1.1"):
                    raise Refused(502, "bad_answer", "the server's answer has two lengths")
                await self._tell(_repeated(event))
            elif isinstance(event, h11.EndOfMessage):
                await self._tell(event)
                if not await self._turn():
                    return
            elif isinstance(event, h11.Data | h11.InformationalResponse):
                await self._tell(event)
            else:
                return

    async def _answer(self) -> bytes:
        """What the server says next, nothing at its end. Raises one of GONE where it breaks off."""
        try:
            data = await self._far.receive()
        except anyio.EndOfStream:
            if self._busy and self._answers.their_state is h11.SEND_RESPONSE:
                raise ConnectionAbortedError from None  # without an answer: the program is told just that
            data = b""
        self._moved()
        return data

    async def _turn(self) -> bool:
        """Go on to the next request, if there may be one."""
        if self._answers.their_state is not h11.DONE or self._asks.they_are_waiting_for_100_continue:
            return False
        await self._asked.wait()
        if {*self._asks.states.values(), *self._answers.states.values()} != {h11.DONE}:
            return False
        self._asks.start_next_cycle()
        self._answers.start_next_cycle()
        self._busy = False
        self._asked.clear()
        self._turned.set()
        return True

    async def _switch(self, answer: h11.InformationalResponse) -> None:
        """From here on bytes pass as they are."""
        await self._tell(_repeated(answer))
        early, late = self._asks.trailing_data[0], self._answers.trailing_data[0]
        await until_one_ends(
            self._pass_on(self._near, self._far, bytes(early), "sent"),
            self._pass_on(self._far, self._near, bytes(late), "received"),
        )

    async def _pass_on(self, source: ByteStream, sink: ByteStream, data: bytes, count: str) -> None:
        with suppress(*GONE):
            while True:
                if data:
                    await sink.send(data)
                data = await source.receive()
                setattr(self._traffic, count, getattr(self._traffic, count) + len(data))
                self._moved()

    async def _tell(self, event: Any) -> None:
        data = self._asks.send(event) or b""
        self._traffic.received += len(data)
        if data:
            await self._near.send(data)
        self._moved()

    def _misunderstood(self) -> Refused:
        """What to say where h11 won't read or write something. Its own words may have a value in them."""
        if self._asks.their_state is h11.ERROR:
            return Refused(400, "bad_request", "the request is no HTTP/1.1 that can be passed on")
        return Refused(502, "bad_answer", "the server's answer is no HTTP/1.1 that can be passed on")

    async def _refuse(self, refusal: Refused) -> bool:
        """Answer with a refusal; whether that could be done."""
        if self._asks.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return False
        phrase, body = explained(refusal)
        fields = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        answer = h11.Response(status_code=refusal.status, headers=fields, reason=phrase.encode())
        with suppress(h11.LocalProtocolError, *GONE):
            for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                await self._tell(event)
            return True
        return False


def _check(request: h11.Request, headers: Mapping[bytes, bytes]) -> None:
    """Raises Refused for what two readers could read differently."""
    if b"transfer-encoding" in headers and (b"content-length" in headers or request.http_version < b"1.1"):
        raise Refused(400, "bad_request", "the request has two lengths")
    if request.method == b"CONNECT" or not (request.target.startswith(b"/") or request.target == b"*"):
        raise Refused(400, "bad_target", "the request's target is no path")
    connection = [value for name, value in request.headers if name == b"connection"]
    dropped = {word.strip().lower() for value in connection for word in value.split(b",")}  # by whoever comes next
    if not dropped.isdisjoint(ROUTING):
        raise Refused(400, "bad_request", "the request's Connection header names what must stay")
    if b"host" not in headers:
        raise Refused(400, "bad_request", "the request has no Host header")


def _is_searched(headers: Mapping[bytes, bytes]) -> bool:
    """Whether this request has a body in which placeholders are looked for."""
    return (
        0 < int(headers.get(b"content-length", b"0")) <= MAX_BODY
        and b"content-encoding" not in headers
        and writing(headers.get(b"content-type", b"")) is not None
    )


def _written(request: h11.Request, target: bytes, headers: list[tuple[bytes, bytes]]) -> h11.Request:
    try:
        return h11.Request(method=request.method, target=target, headers=headers)
    except h11.LocalProtocolError:  # which could quote a value
        raise Refused(400, "bad_request", "the request can't be passed on as HTTP/1.1") from None


def _repeated[Answer: (h11.Response, h11.InformationalResponse)](answer: Answer) -> Answer:
    """An answer with its headers' names written as they came."""
    return type(answer)(status_code=answer.status_code, headers=list(answer.headers.raw_items()), reason=answer.reason)
