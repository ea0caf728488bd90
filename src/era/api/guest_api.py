"""What of the API the programs in sandboxes may call: the storage's routes, and public URLs of this server.

Both are served on connections that come out of a sandbox, in this process: no program is ever connected to the port of
the service. A program may be hostile, so what it can reach is decided here, before any route sees a request.

*The storage* is served on a guest listener, for one run. Who connects is known by that, so no key is asked for, and
nothing that a program says can make it somebody else. Of one run a few requests are worked on at a time, and fewer
still of those that cost much; the others wait for each other, not for anybody else's.

*Public URLs* are served to programs that connect to this server's own address (ERA_BASE_URL, ERA_PROXY_URL). The
machine and its loopback are closed to programs, and without a key the API is open to the whole machine; so of the whole
application they get `/proxy/` and `/health`, as anybody outside does. One request is answered on each connection.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import unquote_to_bytes

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.server import ServerState

from era.api.guard import Guard
from era.api.http import application
from era.api.protocol.protocol import Protocol
from era.api.routes.storage import router
from era.core.concurrency.meter import account, turn
from era.core.owners.api_keys import Caller
from era.core.storage.storage import Storage

MAX_REQUESTS, MAX_HEAVY = 8, 1
"""Requests to the storage of one run that are worked on at a time, and of those that run SQL or send much: fewer than
an owner has SQL workers, so that the owner's other runs and clients get at theirs."""

_HEAVY_BYTES = 1 << 20
_KEEP_ALIVE_SECONDS = 5

_PUBLIC = re.compile(rb"/(proxy/.*|health)", re.DOTALL)
_LOOPBACK = ("127.0.0.1", 0)

type Headers = Iterable[tuple[bytes, bytes]]


def _config(app: ASGIApp) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        http=Protocol,
        ws="none",
        lifespan="off",
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
    )
    config.load()
    return config


# -- the storage ----------------------------------------------------------------------------------------------------


class GuestStorage:
    """Makes the protocols of connections from sandboxes to the storage."""

    def __init__(self, storage: Storage) -> None:
        app = application([router], described=False)
        app.state.storage = storage
        app.add_middleware(Guard, keys=None, names=[])
        self._config = _config(app)

    def for_run(self, owner: str, sandbox_id: str) -> Callable[[Callable[[], None]], asyncio.Protocol]:
        """A factory of protocols for the connections of one run, which share its slots and its owner's rights.
        The factory's argument is called when the connection has ended."""
        caller = Caller(owner, sandbox=sandbox_id)
        state, slots = ServerState(), (asyncio.Semaphore(MAX_REQUESTS), asyncio.Semaphore(MAX_HEAVY))
        return lambda ended: _StorageConnection(self._config, state, slots, caller, ended)


class _StorageConnection(Protocol):
    def __init__(
        self,
        config: uvicorn.Config,
        state: ServerState,
        slots: tuple[asyncio.Semaphore, asyncio.Semaphore],
        caller: Caller,
        ended: Callable[[], None],
    ) -> None:
        """`slots` are those of all requests of the run, and of its heavy ones."""
        super().__init__(config, state, {"caller": caller})  # which is in the state of each of its requests
        self._caller = caller
        self._storage = config.loaded_app
        self.app = self._in_turn
        self._slots, self._heavy_slots = slots
        self._on_end = ended
        self._hung_up = False
        self._working: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in Protocol
        super().connection_made(transport)
        self.account = account(self._caller.owner, self._caller.sandbox)  # one a run, however many connections it has

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._hung_up = True
        for task in self._working:  # nobody waits for it, and it is in the way of others
            task.cancel()
        self._on_end()

    async def _in_turn(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have the storage answer a request once a slot is free. A request whose program has hung up is cancelled, and
        that ends here."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("A request is worked on outside of any task.")
        self._working.add(task)
        try:
            await turn(begins=True)
            async with self._slots:
                if not _is_heavy(scope):
                    await self._storage(scope, receive, send)
                    return
                async with self._heavy_slots:
                    await self._storage(scope, receive, send)
        except asyncio.CancelledError:
            if not self._hung_up:
                raise
        finally:
            self._working.discard(task)


def _is_heavy(scope: Scope) -> bool:
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"")
    many = b"transfer-encoding" in headers or (length.isdigit() and int(length) > _HEAVY_BYTES)
    return many or scope["path"].startswith("/api/storage/d1/")


# -- public URLs ----------------------------------------------------------------------------------------------------


class GuestPublicUrls:
    """Makes the protocols of connections from sandboxes to this server's public URLs."""

    def __init__(self, app: ASGIApp) -> None:
        """`app` is the whole application."""
        self._config, self._state = _config(app), ServerState()

    def protocol(self, count: Callable[[int, int], None], ended: Callable[[], None]) -> asyncio.Protocol:
        """The protocol of one connection. `count` is called with the numbers of bytes received and sent, `ended` when
        the connection has ended."""
        return _PublicConnection(self._config, self._state, count, ended)


class _PublicConnection(Protocol):
    def __init__(
        self,
        config: uvicorn.Config,
        state: ServerState,
        count: Callable[[int, int], None],
        ended: Callable[[], None],
    ) -> None:
        super().__init__(config, state, {})
        self._public = config.loaded_app
        self._count = count
        self._on_end = ended

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in Protocol
        super().connection_made(_CountingTransport(transport, self._count))  # type: ignore[arg-type]  # like one
        self.client = _LOOPBACK  # a program chooses the address that it connects from

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._on_end()

    def data_received(self, data: bytes) -> None:
        self._count(len(data), 0)
        super().data_received(data)

    def on_headers_complete(self) -> None:
        refusal = _refusal(self.url, self.headers)
        if refusal is not None:
            self.url = b"/"  # whatever it is: uvicorn parses it, and nothing reads it
        self.app = self._public if refusal is None else refusal
        self.headers[:] = [(name, value) for name, value in self.headers if not _speaks_for_another(name)]
        super().on_headers_complete()
        self.cycle.keep_alive = False

    def send_400_response(self, msg: str) -> None:
        if not self.transport.is_closing():
            body = _refusal_body("bad_request", "this is no HTTP request")
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[400] + head + body)
            self.transport.close()


class _CountingTransport:
    """A transport that counts what is written to it."""

    def __init__(self, transport: asyncio.Transport, count: Callable[[int, int], None]) -> None:
        self._transport, self._count = transport, count

    def write(self, data: bytes) -> None:
        self._count(0, len(data))
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def _speaks_for_another(name: bytes) -> bool:
    """Whether a header says for whom a proxy sends a request. A program is no proxy."""
    return name == b"forwarded" or name.startswith(b"x-forwarded-")


def _refusal(target: bytes, headers: Headers) -> ASGIApp | None:
    """What answers a request that isn't for what is open to everybody; None for one that is. Header names are in lower
    case."""
    path = unquote_to_bytes(target.partition(b"?")[0])
    if not _PUBLIC.fullmatch(path) or b".." in path.split(b"/"):
        return _answering(403, "not_public", "programs may call /proxy/… and /health here, and nothing else")
    if any(name == b"transfer-encoding" for name, _ in headers):
        return _answering(411, "no_length", "a body must come with its Content-Length here")
    return None


def _answering(status: int, rule: str, why: str) -> ASGIApp:
    """An ASGI application that gives this one answer."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        body = _refusal_body(rule, why)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return answer


def _refusal_body(rule: str, why: str) -> bytes:
    """The body of an error, in the shape that programs know from a refused connection."""
    return json.dumps({"error": f"ERA's proxy: {why}.", "rule": rule}).encode() + b"\n"
