"""Serving the connections of programs: those at a guest listener while a run lasts, and one by an asyncio protocol."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress

from era.core.ports import GuestListener
from era.errors import SandboxFailed

MAX_CONNECTIONS = 64
"""At one guest listener at a time. More wait in its backlog."""

_BACKLOG = 128

_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PAUSE_SECONDS = 0.1


def accept(listener: socket.socket | GuestListener, watch: Callable[[], None]) -> socket.socket | None:
    """The connection that waits at a listener which the event loop watches, None if it can't be had. Where there is no
    room for one, the listener is left alone for a moment, until `watch`; where it listens no more, for good. Else the
    loop would do nothing but try."""
    try:
        client, _ = listener.accept()
    except OSError as error:  # or the client has gone
        if error.errno in (*_NO_ROOM, errno.EINVAL):
            loop = asyncio.get_running_loop()
            loop.remove_reader(listener)
            if error.errno != errno.EINVAL:
                loop.call_later(_PAUSE_SECONDS, watch)
        return None
    client.setblocking(False)
    return client


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
            if accepting:
                self._watch()
            else:
                asyncio.get_running_loop().remove_reader(self._listener)

    def _watch(self) -> None:
        if self._accepting and self._listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        client = accept(self._listener, self._watch)
        if client is None:
            return
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
