"""Listeners of a service that has no descriptor left."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from ipaddress import ip_address
from typing import Any

import pytest

from era.core.allowlist import allowlist
from era.core.shares import Shares
from era.network.accept_loop import AcceptLoop
from era.network.descriptors import RunDescriptors
from era.network.destinations import Destinations
from era.network.loopback import LoopbackAddresses
from era.network.policy import Policy
from era.network.run_connections import RunConnections, _Connection, _DestinationListener
from tests.network.test_loopback import Broker


@contextmanager
def no_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(free := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def close(client: socket.socket) -> None:
    client.close()


@asynccontextmanager
async def guest_listener() -> AsyncIterator[tuple[str, int]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with AcceptLoop(listener, close):
            yield listener.getsockname()


async def at_once() -> None:
    """The turn of lookups that nobody else makes."""


@asynccontextmanager
async def made() -> AsyncIterator[tuple[RunConnections, _DestinationListener]]:
    """Those of a run, and a listener that stands for a destination of theirs."""
    more = (LoopbackAddresses(), Policy(), allowlist([]), Destinations(), lambda _: None)
    connections = RunConnections(Broker(), *more, RunDescriptors(Shares(100), "me"), at_once, lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address: tuple[str, int] = free.getsockname()
    yield connections, await connections._listener((ip_address(address[0]), address[1]))
    await connections.close(shared=False)


@asynccontextmanager
async def destination() -> AsyncIterator[tuple[str, int]]:
    """One that nobody connects to: who arrives is reset."""
    async with made() as (_, listener):
        yield listener.sock.getsockname()


@pytest.mark.parametrize(("listening", "of"), [(guest_listener, AcceptLoop), (destination, RunConnections)])
async def test_who_can_not_be_accepted_is_tried_again_in_a_moment(
    listening: Callable[[], Any], of: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries, real = 0, of._accept

    def counted(*args: Any) -> None:
        nonlocal tries
        tries += 1
        real(*args)

    monkeypatch.setattr(of, "_accept", counted)
    async with listening() as address, asyncio.timeout(30):
        with socket.socket() as client:
            client.setblocking(False)
            with no_descriptors():
                await asyncio.get_running_loop().sock_connect(client, address)
                began = time.monotonic()
                for _ in range(10):
                    await asyncio.sleep(0.03)
                assert 1 <= tries <= 2 + (time.monotonic() - began) / 0.1
            with suppress(ConnectionResetError):
                assert await asyncio.get_running_loop().sock_recv(client, 1) == b""


async def test_who_comes_with_a_late_try_of_the_kernel_s_is_let_in() -> None:
    """It asks again ever more rarely, on newer kernels 7, 11 and 19 seconds after it began: here the destination has
    answered just after such a try, as for an event loop that stood still."""
    async with made() as (connections, listener), asyncio.timeout(90):
        connection = _Connection()
        listener.waiting.append(connection)
        connection.dialed.add_done_callback(lambda _: connections._on_dialed(listener, connection))
        connections._update_filter(listener)
        with socket.socket() as client:
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            connecting = asyncio.create_task(loop.sock_connect(client, listener.sock.getsockname()))
            await asyncio.sleep(11.5)
            assert not connecting.done(), "it was dropped"
            connection.dialed.set_result(0)
            await connecting
            (await connection.client).close()
