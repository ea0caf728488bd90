"""A door with somebody behind it: takes a sandbox's connections, as long as its run lasts."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress

from era.core.ports import Door
from era.errors import SandboxFailed

MAX_CONNECTIONS = 64
"""At one door at a time. More wait there."""

_BACKLOG = 128


class Listener:
    """Has `serve` deal with each connection, which is over when that returns; it closes what it was given. The end of
    the block cancels those that are left."""

    def __init__(self, door: Door, serve: Callable[[socket.socket], Awaitable[None]]) -> None:
        self._door = door.dup()  # the sandbox may be closed under us
        self._door.setblocking(False)
        self._serve = serve
        self._listening = False
        self._connections: set[asyncio.Future[None]] = set()

    async def __aenter__(self) -> None:
        """Raises SandboxFailed."""
        try:
            self._door.listen(_BACKLOG)
        except OSError as error:
            self._door.close()
            raise SandboxFailed("The sandbox's door can't be used.") from error
        self._listen(True)

    async def __aexit__(self, *_: object) -> None:
        self._listen(False)
        with suppress(OSError):  # not connected, it says of a socket that listened
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()
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
                loop.add_reader(self._door, self._accept)
            else:
                loop.remove_reader(self._door)

    def _accept(self) -> None:
        try:
            client, _ = self._door.accept()
        except OSError:
            return  # whoever wanted in has gone, or there is no descriptor left for him
        client.setblocking(False)
        connection = asyncio.ensure_future(self._serve(client))
        self._connections.add(connection)
        connection.add_done_callback(self._ended)
        self._listen(len(self._connections) < MAX_CONNECTIONS)

    def _ended(self, connection: asyncio.Future[None]) -> None:
        self._connections.discard(connection)
        if self._door.fileno() >= 0:
            self._listen(True)
