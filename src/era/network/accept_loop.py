"""A guest listener with somebody behind it: takes a sandbox's connections, as long as its run lasts."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress

from era.core.ports import GuestListener
from era.errors import SandboxFailed

MAX_CONNECTIONS = 64
"""At one guest listener at a time. More wait there."""

_BACKLOG = 128


class AcceptLoop:
    """Has `serve` deal with each connection, which is over when that returns; it closes what it was given. The end of
    the block cancels those that are left."""

    def __init__(self, guest_listener: GuestListener, serve: Callable[[socket.socket], Awaitable[None]]) -> None:
        self._guest_listener = guest_listener.dup()  # the sandbox may be closed under us
        self._guest_listener.setblocking(False)
        self._serve = serve
        self._listening = False
        self._connections: set[asyncio.Future[None]] = set()

    async def __aenter__(self) -> None:
        """Raises SandboxFailed."""
        try:
            self._guest_listener.listen(_BACKLOG)
        except OSError as error:
            self._guest_listener.close()
            raise SandboxFailed("The sandbox's guest_listener can't be used.") from error
        self._listen(True)

    async def __aexit__(self, *_: object) -> None:
        self._listen(False)
        with suppress(OSError):  # not connected, it says of a socket that listened
            self._guest_listener.shutdown(socket.SHUT_RDWR)
        self._guest_listener.close()
        for connection in self._connections:
            connection.cancel()
        if self._connections:
            await asyncio.wait(self._connections)

    def _listen(self, wanted: bool) -> None:
        """Take connections, or let them wait."""
        if wanted != self._listening:
            self._listening = wanted
            loop = asyncio.get_running_loop()
            if wanted:
                loop.add_reader(self._guest_listener, self._accept)
            else:
                loop.remove_reader(self._guest_listener)

    def _accept(self) -> None:
        try:
            client, _ = self._guest_listener.accept()
        except OSError:
            return  # whoever wanted in has gone, or there is no descriptor left for him
        client.setblocking(False)
        connection = asyncio.ensure_future(self._serve(client))
        self._connections.add(connection)
        connection.add_done_callback(self._ended)
        self._listen(len(self._connections) < MAX_CONNECTIONS)

    def _ended(self, connection: asyncio.Future[None]) -> None:
        self._connections.discard(connection)
        if self._guest_listener.fileno() >= 0:
            self._listen(True)
