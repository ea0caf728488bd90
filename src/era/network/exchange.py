"""HTTP/1.1 between a program and a host that its run has secrets for. interception.py has the theory of operation."""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Protocol

import anyio
import h11
from anyio.abc import ByteStream

from era.core.allowlist import folded
from era.core.concurrency.meter import turn
from era.core.concurrency.tasks import until_one_ends
from era.network.destinations import Traffic
from era.network.http1 import MAX_HEAD, Fields, Refused, refusal_events
from era.network.redaction import Inflate, RedactedStream, Redaction, Steps, Tripwire, merged
from era.network.splice import IDLE_SECONDS
from era.network.swapping import MAX_BODY, ROUTING, Swap, escape_for

GONE = (OSError, TimeoutError, anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream)
"""What streams raise when the other end has gone, or might as well have."""

_MAX_HELD = 64 << 10
"""Bytes of a response's body that are held until it's complete, so that its length can be told before it."""

_PIECE = 64 << 10
"""Bytes of a body that are searched before the event loop goes on."""

_MAX_INFORMATIONAL = 16
"""Informational responses (1xx) that may come before a response."""

_READ_BYTES = 32 << 10
"""Bytes that h11 is given at a time. It limits incomplete events only, so a head may be longer by this much."""

_UNREADABLE = (b"accept-encoding", b"sec-websocket-extensions", b"http2-settings")
"""Headers by which programs ask for compressed responses and messages."""

_FRAMING = ROUTING | {b"connection", b"upgrade"}
"""Headers of responses that say how they are to be read."""

_ECHOING = (b"TRACE", b"TRACK")

_HOST = re.compile(r"([^\s:/@\[\]]+)(?::[0-9]{1,5})?")


def named_host(headers: Mapping[bytes, bytes]) -> str:
    """The host that a request's `Host` header names, "" where there is none. `headers` have lower-case names."""
    match = _HOST.fullmatch(headers.get(b"host", b"").decode("latin-1"))
    return folded(match[1]) if match else ""


class HostSecrets(Protocol):
    """The secrets that may be sent to one host. They come and go while a connection lives: a pool of connections
    outlives the cell of a context that opened it."""

    @property
    def version(self) -> int:
        """Another one after each change."""
        ...

    def swap(self) -> Swap:
        """Swaps in those of now."""
        ...

    async def redaction(self) -> Redaction:
        """Replaces the values of those of now."""
        ...


class _Body:
    """The body of a response that is being passed on. `held` is its response with what has come of it so far, where it
    is held until it's complete."""

    def __init__(self, stream: RedactedStream, inflate: Inflate | None, held: tuple[h11.Response, bytearray] | None):
        self.stream, self.inflate, self.held = stream, inflate, held

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """The content that has come with these bytes. Raises Refused."""
        if self.inflate is None:
            yield from (data[at : at + _PIECE] for at in range(0, len(data), _PIECE))
            return
        try:
            yield from self.inflate.feed(data)
        except zlib.error:
            raise Refused(502, "bad_answer", "the server's answer is not compressed as it says") from None


class Exchange:
    """Passes requests on from the program's connection (`near`) to the server's (`far`), and responses back."""

    def __init__(
        self,
        near: ByteStream,
        far: ByteStream,
        host: str,
        secrets: HostSecrets,
        traffic: Traffic,
        bodies: asyncio.Semaphore,
    ) -> None:
        """`secrets` are those of `host`; `bodies` bounds how many bodies of requests are held in memory at a time."""
        self._near, self._far, self._host, self._secrets = near, far, host, secrets
        self._traffic, self._bodies = traffic, bodies
        self._version = -1
        """Of the secrets that `_current` is of."""

        self._current = Redaction([])
        """Replaces the values of the secrets of now, as last seen."""

        self._of_request = self._current
        """The same of those that the request under way was given."""

        self._redaction = self._current
        """Both: what is looked for in the response."""

        self._used: set[str] = set()
        """Names of the secrets that were swapped into the request."""

        self._method = b""
        """Of the request whose response is awaited."""

        self._body: _Body | None = None
        """Of the response that is being passed on, where it is searched."""

        self._tripwire: Tripwire | None = None
        """For what comes from the server once the protocol was switched."""

        self._as_server = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        """Towards the program."""

        self._as_client = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
        """Towards the server."""

        self._busy = False
        """From a request until its response has been passed on."""

        self._request_sent = asyncio.Event()
        """The whole request has been passed on."""

        self._next_cycle = asyncio.Event()
        """The next request may come."""

        self._informational = 0
        """How many have come before the response that is awaited."""

        self._clock = asyncio.timeout(IDLE_SECONDS)

    async def run(self, refusal: Refused | None) -> bool:
        """Serve until one end closes. Returns whether that was in order. With a `refusal` the first request is answered
        by that, and the server's connection isn't used."""
        tasks = [asyncio.create_task(self._pass_requests(refusal))]
        if refusal is None:
            tasks.append(asyncio.create_task(self._pass_all_responses()))
        try:
            async with self._clock:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                try:
                    for task in tasks:
                        if task.done():
                            task.result()
                except Refused as refused:
                    return await self._refuse(refused)
                except h11.ProtocolError:
                    return await self._refuse(self._protocol_error())
                return True
        except GONE:
            return False
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _in_turns[T](self, steps: Steps[T]) -> T:
        """What comes of these steps, between which others have their turn."""
        while True:
            try:
                next(steps)
            except StopIteration as done:
                value: T = done.value
                return value
            await turn()

    async def _refresh(self) -> bool:
        """Know what is looked for of the secrets of now. Returns whether that is something else than before."""
        if self._version == self._secrets.version:
            return False
        while self._version != (version := self._secrets.version):
            self._current = await self._secrets.redaction()
            self._version = version
        return True

    async def _look_for_new(self) -> None:
        """Look for values that came into force while a response is passed on, too."""
        if await self._refresh():
            self._redaction = await asyncio.to_thread(merged, [self._current, self._of_request])
            if self._body is not None:
                self._body.stream.look_for(self._redaction)
            if self._tripwire is not None:
                self._tripwire.look_for(self._redaction)

    def _moved(self) -> None:
        self._clock.reschedule(asyncio.get_running_loop().time() + IDLE_SECONDS)

    # -- requests ---------------------------------------------------------------------------------------------------

    async def _pass_requests(self, refusal: Refused | None) -> None:
        while True:
            event = await self._program_event()
            if isinstance(event, h11.Request):
                if refusal is not None:
                    raise refusal
                self._busy = True
                await self._pass_request(event)
            elif isinstance(event, h11.Data | h11.EndOfMessage):
                await self._send_to_server(event)
            elif event is h11.PAUSED:
                await self._next_cycle.wait()
                self._next_cycle.clear()
            else:
                if self._busy:
                    await asyncio.Event().wait()  # it sends nothing more, and still gets the response
                return

    async def _program_event(self) -> Any:
        while True:
            await turn()  # also here, since what TLS has decrypted already comes without waiting
            event = self._as_server.next_event()
            if event is not h11.NEED_DATA:
                return event
            try:
                data = await self._near.receive(_READ_BYTES)
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                data = b""
            self._traffic.sent += len(data)
            self._moved()
            self._as_server.receive_data(data)

    async def _pass_request(self, request: h11.Request) -> None:
        by_name = dict(request.headers)
        _check(request, by_name)
        headers = _readable(request.headers.raw_items())
        self._method = request.method
        if named_host(by_name) != self._host:
            await self._begin_request()
            await self._send_to_server(_rewritten(request, headers))
        elif not _is_searched(by_name):
            swap = await self._begin_request()
            await self._send_to_server(_rewritten(request, swap.headers(headers)))
        else:
            async with self._bodies:
                body = await self._whole_body()
                swap = await self._begin_request()  # not before, as the body may take its time
                headers = swap.headers(headers)
                await turn()
                body = swap.body(by_name[b"content-type"], body)
                length = str(len(body)).encode()
                kept = [(name, value) for name, value in headers if name.lower() not in (b"content-length", b"expect")]
                await self._send_to_server(_rewritten(request, [*kept, (b"Content-Length", length)]))
                await self._send_to_server(h11.Data(data=body))
                await self._send_to_server(h11.EndOfMessage())

    async def _begin_request(self) -> Swap:
        """What swaps the secrets of now into a request, which is passed on next."""
        await self._refresh()
        self._of_request = self._redaction = self._current
        swap = self._secrets.swap()
        self._used = swap.used
        return swap

    async def _whole_body(self) -> bytes:
        """The body of the request, which is small."""
        if self._as_server.they_are_waiting_for_100_continue:
            await self._send_to_program(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))
        body = bytearray()
        while isinstance(event := await self._program_event(), h11.Data):
            body += event.data
        return bytes(body)

    async def _send_to_server(self, event: Any) -> None:
        await turn()  # a head takes as long to write as to read
        self._traffic.secrets |= self._used  # before: what breaks off may have been heard
        try:
            await self._far.send(self._as_client.send(event) or b"")
        except GONE:
            await asyncio.Event().wait()  # it takes no more; what it has sent is still to be passed on
        self._moved()
        if isinstance(event, h11.EndOfMessage):
            self._request_sent.set()

    # -- responses -------------------------------------------------------------------------------------------------

    async def _pass_all_responses(self) -> None:
        try:
            await self._pass_responses()
        except (h11.RemoteProtocolError, *GONE):
            await self._pass_held()  # many servers don't end their last answer as they should
            raise

    async def _pass_responses(self) -> None:
        while True:
            await turn()
            event = self._as_client.next_event()
            await self._look_for_new()
            if event is h11.NEED_DATA:
                self._as_client.receive_data(await self._receive_from_server())
            elif isinstance(event, h11.InformationalResponse) and event.status_code == 101:
                await self._switch_protocol(event)
                return
            elif isinstance(event, h11.Response):
                names = dict(event.headers)
                if b"transfer-encoding" in names and (b"content-length" in names or event.http_version < b"1.1"):
                    raise Refused(502, "bad_answer", "the server's answer has two lengths")
                await self._begin_response(event)
            elif isinstance(event, h11.Data):
                await self._pass_content(event)
            elif isinstance(event, h11.EndOfMessage):
                await self._end_response(event)
                if not await self._start_next_cycle():
                    return
            elif isinstance(event, h11.InformationalResponse):
                self._informational += 1
                if self._informational > _MAX_INFORMATIONAL:
                    raise Refused(502, "bad_answer", "the server announces an answer again and again, and gives none")
                await self._send_to_program(await self._redacted(event))
            else:
                return

    async def _begin_response(self, response: h11.Response) -> None:
        """Pass on the head, or hold it until the body is complete. Raises Refused."""
        self._informational = 0
        response = await self._redacted(response)
        names = dict(response.headers)
        self._body = None
        # Of several, each compresses what the one before has made.
        encoding = b",".join(value.strip().lower() for name, value in response.headers if name == b"content-encoding")
        is_plain = encoding in (b"", b"identity")
        has_no_body = self._method == b"HEAD" or response.status_code in (204, 304)
        # Where there is nothing to look for now, there may be before the body has ended.
        if has_no_body or (not self._redaction and not is_plain):
            await self._send_to_program(response)
            return
        inflate, length = None, names.get(b"content-length")
        if not is_plain:
            if encoding not in Inflate.ENCODINGS or response.status_code == 206:
                raise Refused(502, "bad_answer", "the server's answer is compressed, though it was asked not to be")
            inflate = Inflate()
            response = _without(response, b"content-encoding", b"content-length")
        held = None
        if length is not None and inflate is None:
            held = (response, bytearray()) if int(length) <= _MAX_HELD else None
            response = _without(response, b"content-length")
        self._body = _Body(self._redaction.stream(), inflate, held)
        if held is None:
            await self._send_to_program(response)

    async def _pass_content(self, event: h11.Data) -> None:
        """Pass on a part of a body. Raises Refused."""
        if self._body is None:
            await self._send_to_program(event)
            return
        for number, piece in enumerate(self._body.pieces(bytes(event.data))):
            if number:
                await asyncio.sleep(0)
            if self._body.held is not None:
                self._body.held[1].extend(piece)
            elif passed := await self._in_turns(self._body.stream.steps(piece)):
                await self._send_to_program(h11.Data(data=passed))

    async def _end_response(self, end: h11.EndOfMessage) -> None:
        """Pass on what was held back, and the end. Raises Refused for a body that isn't complete."""
        body, self._body = self._body, None
        if body is None:
            await self._send_to_program(end)
            return
        if body.inflate is not None and not body.inflate.complete:
            raise Refused(502, "bad_answer", "the server's answer ends early")
        if body.held is not None:
            response, content = body.held
            rest = await self._in_turns(self._redaction.of_whole(bytes(content)))
            length = str(len(rest)).encode()
            headers = [
                (name, length if name.lower() == b"content-length" else value)
                for name, value in response.headers.raw_items()
            ]
            await self._send_to_program(_with_headers(response, headers))
        else:
            rest = await self._in_turns(body.stream.steps(b"", last=True))
        if rest:
            await self._send_to_program(h11.Data(data=rest))
        trailers = await self._in_turns(self._redaction.of_fields(list(end.headers.raw_items())))
        await self._send_to_program(h11.EndOfMessage(headers=trailers))

    async def _pass_held(self) -> None:
        """Pass on what was held back of a body that has broken off."""
        body, self._body = self._body, None
        if body is not None and body.held is None:
            rest = await self._in_turns(body.stream.steps(b"", last=True))
            await self._send_to_program(h11.Data(data=rest))

    async def _redacted[Response: (h11.Response, h11.InformationalResponse)](self, response: Response) -> Response:
        """The same without values, and with its headers' names written as they came."""
        fields = list(response.headers.raw_items())
        headers = await self._in_turns(self._redaction.of_fields(fields, left_alone=_FRAMING))
        reason = await self._in_turns(self._redaction.of_whole(bytes(response.reason)))
        return type(response)(status_code=response.status_code, headers=headers, reason=reason)

    async def _receive_from_server(self) -> bytes:
        """The server's next bytes, none at its end. Raises one of GONE where the connection breaks off."""
        try:
            data = await self._far.receive(_READ_BYTES)
        except anyio.EndOfStream:
            if self._busy and self._as_client.their_state is h11.SEND_RESPONSE:
                raise ConnectionAbortedError from None  # no response at all: the program sees the same
            data = b""
        self._moved()
        return data

    async def _start_next_cycle(self) -> bool:
        """Go on to the next request. Returns False where the connection can't be used for one."""
        if self._as_client.their_state is not h11.DONE or self._as_server.they_are_waiting_for_100_continue:
            return False
        await self._request_sent.wait()
        if {*self._as_server.states.values(), *self._as_client.states.values()} != {h11.DONE}:
            return False
        self._as_server.start_next_cycle()
        self._as_client.start_next_cycle()
        self._busy = False
        self._request_sent.clear()
        self._next_cycle.set()
        return True

    async def _switch_protocol(self, response: h11.InformationalResponse) -> None:
        """Pass on the 101, and from then on bytes as they are."""
        await self._send_to_program(await self._redacted(response))
        from_program, from_server = self._as_server.trailing_data[0], self._as_client.trailing_data[0]
        self._tripwire = self._redaction.tripwire()
        await until_one_ends(
            self._pass_bytes(self._near, self._far, bytes(from_program), "sent"),
            self._pass_bytes(self._far, self._near, bytes(from_server), "received", self._tripwire),
        )

    async def _pass_bytes(
        self, source: ByteStream, sink: ByteStream, data: bytes, count: str, tripwire: Tripwire | None = None
    ) -> None:
        """Pass on bytes until one end closes, or the `tripwire` notices a value."""
        with suppress(*GONE):
            while True:
                passed: bytes | None = data
                await turn()
                if tripwire is not None:
                    await self._look_for_new()
                    passed = await self._in_turns(tripwire.steps(data))
                if passed is None:
                    return
                if passed:
                    await sink.send(passed)
                try:
                    data = await source.receive()
                except anyio.EndOfStream:
                    if tripwire is not None:
                        rest: bytes | None = await self._in_turns(tripwire.steps(b"", last=True))
                        await sink.send(rest or b"")
                    return
                setattr(self._traffic, count, getattr(self._traffic, count) + len(data))
                self._moved()

    async def _send_to_program(self, event: Any) -> None:
        await turn()
        data = self._as_server.send(event) or b""
        self._traffic.received += len(data)
        if data:
            await self._near.send(data)
        self._moved()

    def _protocol_error(self) -> Refused:
        """The refusal where h11 won't read or write something. Its own message may quote a secret's value."""
        if self._as_server.their_state is h11.ERROR:
            return Refused(400, "bad_request", "the request is no HTTP/1.1 that can be passed on")
        return Refused(502, "bad_answer", "the server's answer is no HTTP/1.1 that can be passed on")

    async def _refuse(self, refusal: Refused) -> bool:
        """Respond with a refusal. Returns whether that could be done."""
        if self._as_server.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return False
        with suppress(h11.LocalProtocolError, *GONE):
            for event in refusal_events(refusal):
                await self._send_to_program(event)
            return True
        return False


def _check(request: h11.Request, headers: Mapping[bytes, bytes]) -> None:
    """Raises Refused for requests that two readers could read differently."""
    if b"transfer-encoding" in headers and (b"content-length" in headers or request.http_version < b"1.1"):
        raise Refused(400, "bad_request", "the request has two lengths")
    if request.method == b"CONNECT" or not (request.target.startswith(b"/") or request.target == b"*"):
        raise Refused(400, "bad_target", "the request's target is no path")
    if request.method.upper() in _ECHOING:
        raise Refused(405, "bad_method", "the answer to this method would be the request itself, with its secrets")
    connection = [value for name, value in request.headers if name == b"connection"]
    dropped = {word.strip().lower() for value in connection for word in value.split(b",")}  # by the next proxy
    if not dropped.isdisjoint(ROUTING):
        raise Refused(400, "bad_request", "the request's Connection header names what must stay")
    if b"host" not in headers:
        raise Refused(400, "bad_request", "the request has no Host header")


def _readable(headers: Iterable[tuple[bytes, bytes]]) -> Fields:
    """The headers of a request whose response we must be able to read."""
    kept = [
        (name, value)
        for name, value in headers
        if name.lower() not in _UNREADABLE and (name.lower() != b"upgrade" or value.lower() == b"websocket")
    ]
    return [*kept, (b"Accept-Encoding", b"identity")]


def _is_searched(headers: Mapping[bytes, bytes]) -> bool:
    """Whether this request has a body in which placeholders are swapped."""
    return (
        0 < int(headers.get(b"content-length", b"0")) <= MAX_BODY
        and b"content-encoding" not in headers
        and escape_for(headers.get(b"content-type", b"")) is not None
    )


def _rewritten(request: h11.Request, headers: list[tuple[bytes, bytes]]) -> h11.Request:
    try:
        return h11.Request(method=request.method, target=request.target, headers=headers)
    except h11.LocalProtocolError:  # whose message could quote a value
        raise Refused(400, "bad_request", "the request can't be passed on as HTTP/1.1") from None


def _with_headers[Response: (h11.Response, h11.InformationalResponse)](response: Response, headers: Fields) -> Response:
    return type(response)(status_code=response.status_code, headers=headers, reason=response.reason)


def _without(response: h11.Response, *names: bytes) -> h11.Response:
    """The same without these headers."""
    return _with_headers(response, [pair for pair in response.headers.raw_items() if pair[0].lower() not in names])
