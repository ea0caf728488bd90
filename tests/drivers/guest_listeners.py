"""A service of the host's behind a sandbox's guest listener, for tests of guest listeners."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.drivers.sandboxes import AnySandbox


@asynccontextmanager
async def listened_on(sandbox: AnySandbox) -> AsyncIterator[list[str]]:
    """Serve the guest listener meanwhile. The first byte of a connection says what is wanted:

    `e`  to hear everything again, until the end; then the end
    `s`  that nothing is read any more as long as the run lasts
    `r`  that it is reset
    `w`  a megabyte, and the end

    The answer is what became of each connection, by that byte: `e ended`, or `s broke off`.
    """
    guest_listener, loop = sandbox.guest_listeners["storage"].dup(), asyncio.get_running_loop()
    guest_listener.setblocking(False)
    ends: list[str] = []
    over = asyncio.Event()
    tasks: set[asyncio.Task[None]] = set()

    def take() -> None:
        try:
            client, _ = guest_listener.accept()
        except BlockingIOError:
            return
        tasks.add(loop.create_task(_serve(client, ends, over)))

    guest_listener.listen(128)
    loop.add_reader(guest_listener, take)
    try:
        yield ends
        over.set()
        # What a run's end closes is closed soon, of itself.
        if tasks:
            await asyncio.wait(tasks, timeout=60)
    finally:
        loop.remove_reader(guest_listener)
        with suppress(OSError):
            guest_listener.shutdown(socket.SHUT_RDWR)
        guest_listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def talk(sandbox: Any, port: int) -> list[str]:
    """Connect to a port inside, say something and the end, and hear until the end."""
    sock = await sandbox.connect(port)
    if sock is None:
        return ["refused"]
    reader, writer = await asyncio.open_connection(sock=sock)
    writer.write(b"from outside")
    writer.write_eof()
    heard = await reader.read()
    writer.close()
    return [heard.decode()]


async def _serve(client: socket.socket, ends: list[str], over: asyncio.Event) -> None:
    reader, writer = await asyncio.open_connection(sock=client, limit=1 << 14)
    wanted = ""
    try:
        wanted = (await reader.read(1)).decode()
        if wanted == "e":
            while data := await reader.read(1 << 14):
                writer.write(data)
                await writer.drain()
            writer.write_eof()
        elif wanted == "w":
            writer.write(b"w" * (1 << 20))
            await writer.drain()
        elif wanted == "s":
            writer.write(b"s")
            await over.wait()
        ends.append(f"{wanted} ended")
    except ConnectionError:
        ends.append(f"{wanted} broke off")
    finally:
        if wanted == "r":
            writer.transport.abort()
        writer.close()
