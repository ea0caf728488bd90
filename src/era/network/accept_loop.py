"""Serving the connections of programs: those at a guest listener while a run lasts, and one by an asyncio protocol."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress

from era.core.ports import GuestListener
from era.errors import SandboxFailed

MAX_CONNECTIONS = 64
"""At one guest listener at a time. More wait in its backlog."""

_BACKLOG = 128


class AcceptLoop:
    """Listens on a guest listener as long as the block lasts, and has each connection served by a task of its own. The
    end of the block cancels those that are left, and resets what waits in the backlog."""

    def __init__(self, listener: GuestListener, serve: Callable[[socket.socket], Awaitable[None]]) -> None:
        """`serve` closes the socket that it gets. When it returns, the connection no longer counts."""
        self._listener = listener.dup()  # the sandbox may close its own meanwhile
        self._listener.setblocking(False)
        self._serve = serve
        self._accepting = False
        self._connections: set[asyncio.Future[None]] = set()

    async def __aenter__(self) -> None:
        """Raises SandboxFailed."""
        try:
            self._listener.listen(_BACKLOG)
        except OSError as error:
            self._listener.close()
            raise SandboxFailed("The sandbox's guest listener can't be used.") from error
        self._set_accepting(True)

    async def __aexit__(self, *_: object) -> None:
        self._set_accepting(False)
        with suppress(OSError):  # ENOTCONN, though it has stopped listening
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            connection.cancel()
        if self._connections:
            await asyncio.wait(self._connections)

    def _set_accepting(self, accepting: bool) -> None:
        """Accept connections or leave them in the backlog, by whether the event loop watches the listener."""
        if accepting != self._accepting:
            self._accepting = accepting
            loop = asyncio.get_running_loop()
            if accepting:
                loop.add_reader(self._listener, self._accept)
            else:
                loop.remove_reader(self._listener)

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return  # the client has gone, or there is no descriptor left for it
        client.setblocking(False)
        connection = asyncio.ensure_future(self._serve(client))
        self._connections.add(connection)
        connection.add_done_callback(self._ended)
        self._set_accepting(len(self._connections) < MAX_CONNECTIONS)

    def _ended(self, connection: asyncio.Future[None]) -> None:
        self._connections.discard(connection)
        if self._listener.fileno() >= 0:
            self._set_accepting(True)


async def serve_protocol(
    client: socket.socket, make_protocol: Callable[[Callable[[], None]], asyncio.Protocol]
) -> None:
    """Serve an accepted connection by an asyncio protocol until it has ended; cancelling aborts it. Closes `client`.

    `make_protocol` is given what the protocol must call once its connection is lost."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    accepted = loop.create_task(loop.connect_accepted_socket(lambda: make_protocol(ended.set), client))
    try:
        await asyncio.shield(accepted)  # cut short, it would leave a transport behind that nobody has
        await ended.wait()
    except OSError:
        client.close()
    finally:
        with suppress(OSError):
            transport, _ = await accepted
            transport.abort()
