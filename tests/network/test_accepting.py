"""Listeners of a service that has no descriptor left."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from ipaddress import ip_address
from typing import Any

import pytest

from era.core.allowlist import allowlist
from era.core.concurrency.shares import Shares
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


SOCKETS_OF_A_NEW_NETWORK = """
import fcntl, os, socket, struct, sys
os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET)
made = [socket.socket() for _ in range(2)]
fcntl.ioctl(made[0], 0x8914, struct.pack("16sH22x", b"lo", 1))  # SIOCSIFFLAGS: loopback is up
socket.send_fds(socket.socket(fileno=int(sys.argv[1])), [b"x"], [each.fileno() for each in made])
sys.stdin.read()
"""


@contextmanager
def sockets_of_a_new_network() -> Iterator[list[socket.socket]]:
    """Yield two TCP sockets of a new network namespace, as the service gets its sockets from a sandbox.

    An ordinary user may attach filters only to sockets of a network namespace that belongs to that user.
    """
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-c", SOCKETS_OF_A_NEW_NETWORK, str(theirs.fileno())]
    with ours, theirs, subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[theirs.fileno()]):
        ours.settimeout(60)
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 2)
        sockets = [socket.socket(fileno=each) for each in descriptors]
        try:
            yield sockets
        finally:
            for sock in sockets:
                sock.close()


class OneSocketBroker(Broker):
    """Hands out one given socket."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(1)
        self._sock = sock

    async def new_socket(self, family: int, kind: int) -> socket.socket:
        return self._sock


@asynccontextmanager
async def made(broker: Broker | None = None) -> AsyncIterator[tuple[RunConnections, _DestinationListener]]:
    """Yield the connections of a run and the listener for one of its destinations."""
    more = (LoopbackAddresses(), Policy(), allowlist([]), Destinations(), lambda _: None)
    descriptors = RunDescriptors(Shares(100), "me")
    connections = RunConnections(broker or Broker(), *more, descriptors, at_once, lambda *_: None)
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


async def test_connection_is_accepted_at_a_late_retry_of_its_syn() -> None:
    """The program's kernel repeats the SYN ever more rarely: on newer kernels 7, 11 and 19 seconds after the first.
    The destination answers just after a retry here, so the connection has to wait for the next one."""
    with sockets_of_a_new_network() as (listening, client):
        async with made(OneSocketBroker(listening)) as (connections, listener), asyncio.timeout(90):
            connection = _Connection()
            listener.waiting.append(connection)
            connection.dialed.add_done_callback(lambda _: connections._on_dialed(listener, connection))
            connections._update_filter(listener)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            connecting = asyncio.create_task(loop.sock_connect(client, listener.sock.getsockname()))
            await asyncio.sleep(11.5)
            assert not connecting.done(), "the filter drops it"
            connection.dialed.set_result(0)
            await connecting
            (await connection.client).close()
