"""Access from a sandbox to the storage: a guest listener that the service listens on while a run lasts.

What is accepted was connected from inside this sandbox during this run, and nobody else can connect: not another
sandbox, nothing on the machine. So a program needs no credential, and gets there also where it has no internet. At the
end of a run the guest listener is shut, which resets what waits there, and every connection is dropped. It can be
listened on again, by the next run.

Processes beside runs have the same access for as long as their session is live. Then it is one with that of its runs.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from functools import partial

from era.core.ports import GuestListener, Sandbox, StorageAccess
from era.network.accept_loop import AcceptLoop, serve_protocol

type MakeProtocol = Callable[[Callable[[], None]], asyncio.Protocol]
"""Makes the protocol of a connection. Its argument is to be called once the connection has ended."""


class StorageListeners:
    """See ports.StorageAccesses."""

    def __init__(self, for_run: Callable[[str, str], MakeProtocol]) -> None:
        """`for_run(owner, sandbox_id)` returns the factory of protocols for the connections of one run."""
        self._for_run = for_run
        self._in_use: dict[GuestListener, _Shared] = {}

    def access(self, sandbox: Sandbox, owner: str | None) -> StorageAccess:
        listener = sandbox.guest_listeners.get("storage")
        if listener is None or owner is None:
            return NoAccess()
        return ListenerAccess(self._in_use, listener, partial(self._for_run, owner, sandbox.id))


class NoAccess:
    """No storage: the sandbox has no guest listeners, or the session no storage."""

    url: str | None = None

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *_: object) -> None:
        pass


class ListenerAccess:
    """Has a guest listener served, by one loop for all who have that at a time."""

    def __init__(
        self, in_use: dict[GuestListener, _Shared], listener: GuestListener, for_run: Callable[[], MakeProtocol]
    ) -> None:
        """`in_use` has the loops that there are."""
        self._in_use, self._listener, self._for_run = in_use, listener, for_run
        self.url: str | None = f"http://127.0.0.1:{listener.getsockname()[1]}"

    async def __aenter__(self) -> None:
        shared = self._in_use.get(self._listener)
        if shared is None:
            shared = _Shared(self._listener, self._for_run)
            await shared.accept_loop.__aenter__()
            self._in_use[self._listener] = shared
        shared.users += 1

    async def __aexit__(self, *_: object) -> None:
        shared = self._in_use[self._listener]
        shared.users -= 1
        if not shared.users:
            del self._in_use[self._listener]
            await shared.accept_loop.__aexit__()


class _Shared:
    """Serves a guest listener."""

    def __init__(self, listener: GuestListener, for_run: Callable[[], MakeProtocol]) -> None:
        self.users = 0
        self._for_run = for_run
        self._make_protocol: MakeProtocol | None = None
        self.accept_loop = AcceptLoop(listener, self._serve)

    async def _serve(self, client: socket.socket) -> None:
        if self._make_protocol is None:  # most runs never connect
            self._make_protocol = self._for_run()
        await serve_protocol(client, self._make_protocol)
