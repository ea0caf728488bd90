"""The way from inside a sandbox to the storage: a guest listener on which the service listens while a run lasts.

As with the proxy's (egress.py), what is accepted was connected from inside this sandbox during this run, and nobody
else can connect. So a program needs no credential, and gets there also where it has no internet. At the end of a run
the guest listener is shut and every connection is dropped.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from era.core.ports import GuestListener, Sandbox, StorageAccess
from era.network.accept_loop import AcceptLoop

type MakeProtocol = Callable[[Callable[[], None]], asyncio.Protocol]


class StorageListeners:
    """See ports.StorageAccesses. `for_run` gives what makes the protocols for the connections of one run of an
    owner's."""

    def __init__(self, for_run: Callable[[str], MakeProtocol]) -> None:
        self._for_run = for_run

    def access(self, sandbox: Sandbox, owner: str | None) -> StorageAccess:
        guest_listener = sandbox.guest_listeners.get("storage")
        return (
            NoAccess()
            if guest_listener is None or owner is None
            else ListenerAccess(guest_listener, partial(self._for_run, owner))
        )


class NoAccess:
    """None, since the sandbox has no guest listeners or the session no storage."""

    url: str | None = None

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *_: object) -> None:
        pass


class ListenerAccess:
    """Listens on a guest listener, for one run."""

    def __init__(self, guest_listener: GuestListener, for_run: Callable[[], MakeProtocol]) -> None:
        self._for_run = for_run
        self._make: MakeProtocol | None = None
        self._listener = AcceptLoop(guest_listener, self._serve)
        self.url: str | None = f"http://127.0.0.1:{guest_listener.getsockname()[1]}"

    async def __aenter__(self) -> None:
        await self._listener.__aenter__()

    async def __aexit__(self, *_: object) -> None:
        await self._listener.__aexit__()

    async def _serve(self, client: socket.socket) -> None:
        if self._make is None:
            self._make = self._for_run()
        make, ended = self._make, asyncio.Event()
        loop = asyncio.get_running_loop()
        accepted = loop.create_task(loop.connect_accepted_socket(lambda: make(ended.set), client))
        try:
            await asyncio.shield(accepted)  # cut short, it would leave a transport behind that nobody has
            await ended.wait()
        except OSError:
            client.close()
        finally:
            with suppress(OSError):
                transport, _ = await accepted
                transport.abort()
