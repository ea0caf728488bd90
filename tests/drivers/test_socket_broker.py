"""The two ends of a broker without a sandbox, and the host's against a guest that says what it likes."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import uvloop

from era.drivers.bubblewrap import BubblewrapSandbox
from era.drivers.socket_broker import SocketBroker
from era.guest import socket_broker as guest
from tests.conftest import opened
from tests.drivers.sandboxes import Sandboxes
from tests.unit.core import until

KINDS = [
    (family, kind) for family in (socket.AF_INET, socket.AF_INET6) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)
]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    host, inner = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with host, inner:
        yield host, inner


def test_sockets_of_each_kind_come_in_batches(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    host, inner = ends
    asked: list[bytes] = []

    def answer() -> None:
        there = guest.SocketBroker(inner.fileno())
        while kind := there.answer():
            asked.append(kind)

    async def ask() -> None:
        broker = SocketBroker(host, can_supervise=True)
        for family, kind in KINDS:
            for sock in await asyncio.gather(*(broker.new_socket(family, kind) for _ in range(20))):
                assert (sock.family, sock.type, sock.getsockname()[1]) == (family, kind, 0)
                sock.close()
        await until(lambda: len(asked) == 4 * 3)
        stock = [sock for kind in broker._stock.values() for sock in kind]
        broker.tidy()
        assert sum(sock.fileno() < 0 for sock in stock) == 4 * (3 * 8 - 20)
        assert broker.pid == os.getpid()
        broker.close()

    answering = threading.Thread(target=answer)
    answering.start()
    asyncio.run(ask())
    answering.join()


def test_a_notify_fd_waits_until_somebody_wants_it(ends: tuple[socket.socket, socket.socket]) -> None:
    host, inner = ends
    there, taken = guest.SocketBroker(inner.fileno()), list[int]()

    async def take() -> None:
        broker = SocketBroker(host, can_supervise=True)
        pipes = [os.pipe() for _ in range(3)]
        inodes = [os.fstat(read).st_ino for read, _ in pipes]
        for read, _ in pipes[:2]:
            there.send(b"L", [read])
        await asyncio.sleep(0.05)
        broker.on_notify_fd(taken.append)
        assert there.answer() == b"L"
        there.send(b"L", [pipes[2][0]])
        await until(lambda: len(taken) == 2)
        assert [os.fstat(one).st_ino for one in taken] == inodes[1:]
        for one in (*taken, *(end for pipe in pipes for end in pipe)):
            os.close(one)
        inner.shutdown(socket.SHUT_RDWR)
        await until(lambda: len(taken) == 3)
        assert taken[2:] == [-1]
        assert [opened(f"pipe:[{inode}]") for inode in inodes] == [0, 0, 0]
        assert host.fileno() < 0, "the host's end is closed, too"
        broker.close()

    asyncio.run(take())


@pytest.mark.parametrize("said", [b"t", b"L", b"x", b"T" * 16])
def test_what_makes_no_sense_ends_it(ends: tuple[socket.socket, socket.socket], said: bytes) -> None:
    host, inner = ends
    taken: list[int] = []

    async def hear() -> None:
        broker = SocketBroker(host, can_supervise=True)
        broker.on_notify_fd(taken.append)
        wanted = asyncio.ensure_future(broker.new_socket(socket.AF_INET, socket.SOCK_DGRAM))
        await asyncio.sleep(0)
        inner.send(said)
        with pytest.raises(OSError, match="gives no sockets"):
            await wanted
        with pytest.raises(OSError, match="gives no sockets"):
            await broker.new_socket(socket.AF_INET, socket.SOCK_DGRAM)
        assert await broker.connect(1) is None
        broker.close()

    asyncio.run(hear())
    assert taken == [-1]


def test_none_of_a_kind(ends: tuple[socket.socket, socket.socket]) -> None:
    host, inner = ends

    async def ask() -> None:
        broker = SocketBroker(host, can_supervise=True)
        for _ in range(2):
            wanted = asyncio.ensure_future(broker.new_socket(socket.AF_INET6, socket.SOCK_STREAM))
            await asyncio.sleep(0)
            inner.send(inner.recv(2)[:1])
            with pytest.raises(OSError, match="no such sockets"):
                await wanted
        broker.close()

    asyncio.run(ask())


def receive_without_room(broker: SocketBroker) -> None:
    """Have it take a message while this process has no descriptor left."""
    bound, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(first_free := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, most))
    try:
        broker._receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (bound, most))


def test_want_of_descriptors_is_no_end(ends: tuple[socket.socket, socket.socket]) -> None:
    host, inner = ends
    there = guest.SocketBroker(inner.fileno())

    async def ask() -> None:
        broker = SocketBroker(host, can_supervise=True)
        wanted = asyncio.ensure_future(broker.new_socket(socket.AF_INET, socket.SOCK_STREAM))
        await asyncio.sleep(0)
        there.answer()
        receive_without_room(broker)
        with pytest.raises(OSError, match="Too many open files") as raised:
            await wanted
        assert raised.value.errno == errno.EMFILE
        wanted = asyncio.ensure_future(broker.new_socket(socket.AF_INET, socket.SOCK_STREAM))
        await asyncio.sleep(0)
        there.answer()
        (await wanted).close()
        assert broker.alive
        broker.close()

    asyncio.run(ask())


def test_a_notify_fd_that_there_is_no_room_for_ends_it(ends: tuple[socket.socket, socket.socket]) -> None:
    """So that the sandbox is replaced."""
    host, inner = ends
    there, taken = guest.SocketBroker(inner.fileno()), list[int]()

    async def take() -> None:
        broker = SocketBroker(host, can_supervise=True)
        broker.on_notify_fd(taken.append)
        there.send(b"L", [0])
        receive_without_room(broker)
        assert (broker.alive, taken) == (False, [-1])

    asyncio.run(take())


async def loses_its_broker(sandbox: BubblewrapSandbox) -> bool:
    assert sandbox.broker is not None
    sandbox.broker.close()
    return sandbox.alive


def test_a_sandbox_without_its_broker_is_not_used_again(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make()
    assert sandbox.alive
    assert not sandboxes.do(sandbox, loses_its_broker)
    sandboxes.close(sandbox)


@pytest.mark.parametrize("loops", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_an_event_loop_that_stands_still_does_not_have_nothing_listen(
    ends: tuple[socket.socket, socket.socket], loops: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """It hears of its timeout before it hears of the answer, which has come meanwhile."""
    host, inner = ends
    there = guest.SocketBroker(inner.fileno())

    async def connect(port: int) -> socket.socket | None:
        broker = SocketBroker(host, can_supervise=True)
        connecting = asyncio.create_task(broker.connect(port))
        await until(lambda: bool(broker._requests))
        there.answer()
        time.sleep(2.5)
        connection = await connecting
        broker.close()
        return connection

    with socket.create_server(("127.0.0.1", 0)) as server:
        connection = asyncio.run(connect(server.getsockname()[1]), loop_factory=loops)
        assert connection is not None
        assert connection.getpeername() == server.getsockname()
        connection.close()
