"""One HTTP exchange that is passed on: a request written to another server, and its answer back, both streamed.

Theory of operation. Nothing is copied: the request that uvicorn has parsed is written anew by h11, and the answer is
parsed by h11, which is strict, and written anew by uvicorn. An answer that breaks off must not pass for a complete one:
the caller's connection is then reset, too. A WebSocket is a connection that both ends have agreed to use for something
other than HTTP. Once the other server has agreed (101), bytes pass unchanged in both directions (tunnel.py), and the
caller's connection carries no HTTP any more.

Memory is flat: each direction waits for its receiver. Pieces of an answer that are there already are sent as one, and
between them others have their turn (core/concurrency/meter.py).

Who passes on what to whom is in the subclasses: proxy.py to programs in sessions, home_forwarding.py to other hosts.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import h11
from starlette.types import Message, Receive, Scope, Send

from era.api.protocol.protocol import Protocol
from era.api.protocol.tunnel import PIECE, Tunnel
from era.core.concurrency.meter import turn
from era.core.concurrency.streams import write
from era.errors import EraError

_MAX_HEAD_BYTES = 64 << 10
_MAX_INFORMATIONAL = 16
"""Informational responses (1xx) that may come before an answer."""

_WITHOUT_CONTENT = 204, 304
"""Statuses without content. A server may say its length all the same, which uvicorn would then wait for."""

_SENT_BYTES = 16 << 10
"""Bytes that are gathered before they are sent on, while more content is there already. A send costs more than parsing
many chunks of one byte."""


class Exchange(ABC):
    """One request and its answer: two tasks, one for each direction, under a common clock."""

    head_seconds: float | None = None
    """For an answer to begin; None for as long as it takes."""

    idle_seconds: float | None = None
    """While nothing moves in either direction; None for as long as it takes."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        http: h11.Connection | None = None,
    ) -> None:
        """`http` is the state of a connection that may carry several requests."""
        self._scope = scope
        self._receive = receive
        self._send = send
        self._reader = reader
        self._writer = writer
        self._caller: Protocol = scope["extensions"]["era.connection"]
        self._h11 = http or h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)
        self._gathered = bytearray()
        """Content of the answer that is still to be sent."""

        self._informational = 0
        self._began = False
        self._tunnel: Tunnel | None = None
        self._clock = asyncio.timeout(self.head_seconds)
        self._moved: Callable[[], None] = lambda: None
        """Called for each byte or more that passes: it winds the clock up."""

    async def run(self) -> None:
        """Forward until the answer is complete, the caller is gone, or the time is up. Raises what
        `failure` makes, or whatever `receive` raises, as long as nothing has been sent to the caller."""
        await turn()
        loop = asyncio.get_running_loop()

        def moved() -> None:
            seconds = self.idle_seconds if self._began else self.head_seconds
            with suppress(RuntimeError):  # the clock has stopped: a WebSocket goes on until both ends have closed it
                self._clock.reschedule(None if seconds is None else loop.time() + seconds)

        self._moved = moved
        tasks: list[asyncio.Task[None]] = []
        try:
            self._write(self.request())
            async with self._clock:
                upload = asyncio.create_task(self._upload())
                download = asyncio.create_task(self._download())
                tasks = [upload, download, *self.watches()]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in (download, upload, *tasks[2:]):
                    if task.done():
                        task.result()  # else than by its end: the caller has gone, or its body was refused
                        break
        except TimeoutError:
            await self._failed(self.failure(None))
        except h11.RemoteProtocolError as error:
            await self._failed(self.failure(f"answered what is no HTTP: {reason(error)}"))
        except OSError:
            await self._failed(self.failure("hung up before it had answered"))
        except EraError as error:
            await self._failed(error)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def began(self) -> bool:
        """Whether the caller has been sent anything of the answer."""
        return self._began

    @abstractmethod
    def request(self) -> h11.Request:
        """The request to write. Raises BadRequest for one that can't be."""

    @abstractmethod
    def answer_headers(self, response: h11.Response | h11.InformationalResponse) -> list[tuple[bytes, bytes]]:
        """The headers to send, but for the length. Raises EraError for an answer that can't be sent."""

    @abstractmethod
    def failure(self, what: str | None) -> EraError:
        """The error for a server that did this, or, for None, that took too long."""

    def watches(self) -> list[asyncio.Task[None]]:
        """Tasks at whose end the exchange ends, too, with their exception."""
        return []

    async def _failed(self, error: EraError) -> None:
        """Raise `error`, or reset the caller's connection if the answer has begun: no error can be sent then. The
        caller of a WebSocket can be told."""
        if not self._began:
            raise error
        if self._tunnel is None:
            await self._caller.cut()
        else:
            self._caller.leave.set()
            await self._tunnel.ended.wait()

    # -- the request ------------------------------------------------------------------------------------------------

    def framing(self) -> list[tuple[str, str]]:
        """The header that delimits the body, of the same kind as the caller's."""
        received = {name: value.decode("latin-1") for name, value in self._scope["headers"]}
        if b"transfer-encoding" in received:
            return [("transfer-encoding", "chunked")]
        return [("content-length", received[b"content-length"])] if b"content-length" in received else []

    async def _upload(self) -> None:
        """Forward the body, then wait until the caller is gone, and what it sent in a WebSocket has gone on."""
        more = True
        while (message := await self._receive())["type"] == "http.request":
            if not more:
                continue
            more = message.get("more_body", False)
            try:
                if message.get("body"):
                    self._write(h11.Data(data=message["body"]))
                if not more:
                    self._write(h11.EndOfMessage())
                await self._writer.drain()
            except (OSError, h11.LocalProtocolError):
                more = False  # the server has answered and takes no more of the body
            self._moved()
        if self._tunnel is not None:
            await self._tunnel.ended.wait()

    def _write(self, event: Any) -> None:
        """Raises ConnectionError where the server has hung up."""
        write(self._writer, self._h11.send(event) or b"")

    # -- the answer -------------------------------------------------------------------------------------------------

    async def _download(self) -> None:
        """Send the server's answer to the caller. Raises EraError, and h11.RemoteProtocolError for bad HTTP."""
        while True:
            await turn()
            event = self._h11.next_event()
            if event is h11.NEED_DATA:
                await self._send_gathered()
                piece = await self._reader.read(PIECE)
                if self._began:
                    self._moved()
                self._h11.receive_data(piece)
                continue
            if isinstance(event, h11.InformationalResponse):
                if event.status_code == 101:
                    await self._switch(event)
                    return
                self._informational += 1
                if self._informational > _MAX_INFORMATIONAL:
                    raise self.failure("announced an answer again and again, and gave none")
            elif isinstance(event, h11.Response):
                await self._begin(event)
            elif isinstance(event, h11.Data):
                self._gathered += event.data
                if len(self._gathered) >= _SENT_BYTES:
                    await self._send_gathered()
            elif isinstance(event, h11.EndOfMessage):
                await self._send({"type": "http.response.body", "body": bytes(self._gathered), "more_body": False})
                return
            else:
                raise self.failure("hung up before it had answered")

    async def _send_gathered(self) -> None:
        """Send what of the answer's content has been read."""
        if self._gathered:
            await self._send({"type": "http.response.body", "body": bytes(self._gathered), "more_body": True})
            self._gathered.clear()
            self._moved()

    async def _begin(self, response: h11.Response) -> None:
        """Send status and headers. Raises EraError for an answer that two readers could understand differently."""
        status = response.status_code
        if status > 599:
            raise self.failure(f"answered the status {status}, which is none")
        names = [name for name, _ in response.headers]
        if b"transfer-encoding" in names and b"content-length" in names:
            raise self.failure("answered two lengths of one body")
        answer: Message = {"type": "http.response.start", "status": status, "headers": self.answer_headers(response)}
        if status not in _WITHOUT_CONTENT and b"content-length" in names:
            answer["headers"] += [pair for pair in response.headers if pair[0] == b"content-length"]
        self._began = True
        self._moved()
        await self._send(answer)

    async def _switch(self, response: h11.InformationalResponse) -> None:
        """Accept the WebSocket, then pass bytes in both directions until one side ends."""
        accepted = [
            (b"connection", b"Upgrade"),
            (b"upgrade", b"websocket"),
            *self.answer_headers(response),
            (b"x-request-id", self._scope["state"]["request_id"].encode()),
        ]
        self._began = True
        self._moved()
        from_caller = self._caller.open_tunnel(accepted)
        self._tunnel = Tunnel(self._caller, self._reader, self._writer, self._moved)
        await self._tunnel.run(from_caller, self._h11.trailing_data[0])


def reason(error: Exception) -> str:
    return str(error)[:200].rstrip(".")
