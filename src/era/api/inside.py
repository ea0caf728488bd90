"""The storage's routes for programs, on connections that come out of a sandbox, and nothing else of the API.

Who connects is known by where the connection comes from: a door of the sandbox, on which the service listens while a
run lasts. So no key is asked for. A program may be hostile: of its requests a few are worked on at a time, and fewer
still of those that cost much; the others wait for each other, not for anybody else's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from era.api.guard import Guard
from era.api.http import application
from era.api.protocol import Protocol
from era.api.storage import router
from era.core.storage import Storage

MAX_REQUESTS, MAX_HEAVY = 8, 2
"""Of one run that are worked on at a time, and of those that run SQL or send much."""

_HEAVY_BYTES = 1 << 20
_KEEP_ALIVE_SECONDS = 5


class Inside:
    """Makes the protocols of connections out of sandboxes."""

    def __init__(self, storage: Storage, idle_seconds: float) -> None:
        """Nothing of a request's body may come for `idle_seconds`."""
        app = application([router])
        app.state.storage = storage
        app.add_middleware(Guard, api_key=None, names=[], idle_seconds=idle_seconds)
        self._config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            http=Protocol,
            ws="none",
            lifespan="off",
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        )
        self._config.load()
        self._app = self._config.loaded_app

    def for_run(self) -> Callable[[Callable[[], None]], asyncio.Protocol]:
        """What makes the protocols for one run. Each calls what it is given when its connection has ended."""
        state = ServerState()
        app = _Bounded(self._app)
        return lambda ended: _Connection(self._config, state, app, ended)


class _Connection(Protocol):
    def __init__(self, config: uvicorn.Config, state: ServerState, app: ASGIApp, ended: Callable[[], None]) -> None:
        super().__init__(config, state, {})
        self.app = app
        self._when_ended = ended

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._when_ended()


class _Bounded:
    """ASGI middleware: so many requests of one run at a time."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._all = asyncio.Semaphore(MAX_REQUESTS)
        self._heavy = asyncio.Semaphore(MAX_HEAVY)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._all:
            if not _is_heavy(scope):
                await self._app(scope, receive, send)
                return
            async with self._heavy:
                await self._app(scope, receive, send)


def _is_heavy(scope: Scope) -> bool:
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"")
    many = b"transfer-encoding" in headers or (length.isdigit() and int(length) > _HEAVY_BYTES)
    return many or scope["path"].startswith("/api/storage/d1/")
