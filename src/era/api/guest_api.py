"""The storage's routes for programs, on connections that come out of a sandbox, and nothing else of the API.

Who connects is known by where the connection comes from: a guest listener of the sandbox, on which the service listens
while a run lasts. So no key is asked for, and nothing that a program says can make it somebody else. A program may be
hostile: of its requests a few are worked on at a time, and fewer still of those that cost much; the others wait for
each other, not for anybody else's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from era.api.guard import Guard
from era.api.http import application
from era.api.protocol import Protocol
from era.api.storage import router
from era.core.api_keys import Caller
from era.core.storage import Storage

MAX_REQUESTS, MAX_HEAVY = 8, 2
"""Of one run that are worked on at a time, and of those that run SQL or send much."""

_HEAVY_BYTES = 1 << 20
_KEEP_ALIVE_SECONDS = 5


class GuestApi:
    """Makes the protocols of connections out of sandboxes."""

    def __init__(self, storage: Storage, idle_seconds: float) -> None:
        """Nothing of a request's body may come for `idle_seconds`."""
        app = application([router], described=False)
        app.state.storage = storage
        app.add_middleware(Guard, keys=None, names=[], idle_seconds=idle_seconds)
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

    def for_run(self, owner: str) -> Callable[[Callable[[], None]], asyncio.Protocol]:
        """What makes the protocols for one run of an owner's. Each calls what it is given when its connection has
        ended."""
        caller = Caller(owner)
        state, rooms = ServerState(), _Rooms(asyncio.Semaphore(MAX_REQUESTS), asyncio.Semaphore(MAX_HEAVY))
        return lambda ended: _Connection(self._config, state, self._app, rooms, caller, ended)


@dataclass(frozen=True, slots=True)
class _Rooms:
    """So many requests of one run at a time."""

    all: asyncio.Semaphore
    heavy: asyncio.Semaphore


class _Connection(Protocol):
    def __init__(
        self,
        config: uvicorn.Config,
        state: ServerState,
        app: ASGIApp,
        rooms: _Rooms,
        caller: Caller,
        ended: Callable[[], None],
    ) -> None:
        super().__init__(config, state, {"caller": caller})  # which is in the state of each of its requests
        self.app = self._in_turn
        self._inner = app
        self._rooms = rooms
        self._when_ended = ended
        self._hung_up = False
        self._working: set[asyncio.Task[None]] = set()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._hung_up = True
        for task in self._working:  # nobody waits for it, and it is in the way of others
            task.cancel()
        self._when_ended()

    async def _in_turn(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("A request is worked on outside of any task.")
        self._working.add(task)
        try:
            async with self._rooms.all:
                if not _is_heavy(scope):
                    await self._inner(scope, receive, send)
                    return
                async with self._rooms.heavy:
                    await self._inner(scope, receive, send)
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
