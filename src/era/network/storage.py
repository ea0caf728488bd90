"""The way from inside a sandbox to the storage: a door on which the service listens while a run lasts.

As with the proxy's (passages.py), what is accepted was connected from inside this sandbox during this run, and nobody
else can connect. So a program needs no credential, and gets there also where it has no internet. At the end of a run
the door is shut and every connection is dropped.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress

from era.core.ports import Door, Sandbox, StorageAccess
from era.errors import SandboxFailed

MAX_CONNECTIONS = 64
"""Of one run at a time. More wait at the door."""

_BACKLOG = 128

type MakeProtocol = Callable[[Callable[[], None]], asyncio.Protocol]


class StorageDoors:
    """See ports.StorageAccesses. `for_run` gives what makes the protocols for the connections of one run."""

    def __init__(self, for_run: Callable[[], MakeProtocol]) -> None:
        self._for_run = for_run

    def access(self, sandbox: Sandbox) -> StorageAccess:
        door = sandbox.doors.get("storage")
        return NoAccess() if door is None else DoorAccess(door, self._for_run)


class NoAccess:
    """None, since the sandbox has no doors."""

    url: str | None = None

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *_: object) -> None:
        pass


class DoorAccess:
    """Listens on a door, for one run."""

    def __init__(self, door: Door, for_run: Callable[[], MakeProtocol]) -> None:
        self._door = door.dup()  # the sandbox may be closed under us
        self._door.setblocking(False)
        self._for_run = for_run
        self._make: MakeProtocol | None = None
        self._listening = False
        self._connections = 0
        self._transports: set[asyncio.Transport] = set()
        self._accepting: set[asyncio.Task[None]] = set()
        self.url: str | None = f"http://127.0.0.1:{door.getsockname()[1]}"

    async def __aenter__(self) -> None:
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
        if self._accepting:
            await asyncio.wait(self._accepting)
        for transport in self._transports:
            transport.abort()

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
        self._connections += 1
        accepting = asyncio.get_running_loop().create_task(self._serve(client))
        self._accepting.add(accepting)
        accepting.add_done_callback(self._accepting.discard)
        self._listen(self._connections < MAX_CONNECTIONS)

    async def _serve(self, client: socket.socket) -> None:
        if self._make is None:
            self._make = self._for_run()
        make = self._make
        transports: list[asyncio.Transport] = []

        def ended() -> None:
            self._connections -= 1
            self._transports.difference_update(transports)
            if self._door.fileno() >= 0:
                self._listen(True)

        try:
            transport, _ = await asyncio.get_running_loop().connect_accepted_socket(lambda: make(ended), client)
        except OSError:
            client.close()
            ended()
            return
        transports.append(transport)
        if not transport.is_closing():
            self._transports.add(transport)
