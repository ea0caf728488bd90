"""The host's end of a relay against a guest that says what it likes, and the two ends together without a sandbox."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest

from era.drivers import relay
from era.drivers.relay import Relay, RelayClosed
from era.guest import relay as guest

PORT = 7


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  nothing tells of it
            await asyncio.sleep(0.002)


class Guest:
    """A guest's end of the channel, and the host's relay."""

    def __init__(self) -> None:
        ours, self.channel = socket.socketpair()
        self.relay = Relay(ours)
        self.relay.run_begins()
        self.channel.setblocking(False)

    async def hear(self) -> tuple[bytes, list[int]]:
        """The next message."""
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self.channel, readable.set)
        async with asyncio.timeout(10):
            await readable.wait()
        loop.remove_reader(self.channel)
        message, descriptors, _, _ = socket.recv_fds(self.channel, 4, 4)
        return message, descriptors

    async def ended(self) -> bool:
        """Whether the host ends it."""
        try:
            async with asyncio.timeout(10):
                while (await self.hear())[0]:
                    pass
        except ConnectionResetError:
            pass
        return True


@pytest.fixture
async def made() -> AsyncIterator[Guest]:
    one = Guest()
    yield one
    one.relay.close()
    one.channel.close()


@pytest.mark.parametrize(
    "said",
    [
        b"X\0\0\7",
        b"A\1\0\0",  # no such door
        b"A\1\0\7" * (relay.MAX_WAITING + 1),
        b"K\0\0\0",  # not asked for
        b"F\7\0\0",
        bytes(4),
        os.urandom(1) * 4096,
    ],
)
async def test_what_makes_no_sense_ends_it(made: Guest, said: bytes) -> None:
    door = made.relay.door(PORT)
    door.listen(1)
    assert await made.hear() == (b"L\1\0\7", [])
    made.channel.sendall(said)
    assert await made.ended()
    assert await made.relay.connect(80) is None
    with pytest.raises(RelayClosed):
        made.relay.door(PORT).listen(1)
    door.close()


async def test_messages_may_come_in_pieces_and_late(made: Guest) -> None:
    door = made.relay.door(PORT)
    door.listen(1)
    assert (await made.hear())[0] == b"L\1\0\7"
    for piece in (b"A", b"\1\0", b"\7A\1\0\7"):
        made.channel.sendall(piece)
        await asyncio.sleep(0)
    await until(lambda: door.waiting == 2)
    door.shutdown(socket.SHUT_RDWR)
    assert (await made.hear())[0] == b"S\1\0\7"
    door.listen(1)
    assert (await made.hear())[0] == b"L\2\0\7"
    made.channel.sendall(b"A\1\0\7A\2\0\7")  # the first was under way when the door was shut
    await until(lambda: door.waiting > 0)
    assert door.waiting == 1
    sock, _ = door.accept()
    message, (descriptor,) = await made.hear()
    assert message == b"D\2\0\7"
    with sock, socket.socket(fileno=descriptor) as other:
        other.sendall(b"through")
        assert sock.recv(10) == b"through"
    with pytest.raises(BlockingIOError):
        door.accept()
    door.close()
    door.close()
    assert door.fileno() == -1


async def test_what_is_not_taken_waits_and_not_in_the_kernel(made: Guest) -> None:
    """Descriptors on their way in count for our user, so they are few, and who takes none is given up."""
    before = len(os.listdir("/proc/self/fd"))
    door = made.relay.door(PORT)
    door.listen(1)
    taken: list[socket.socket] = []

    def hand_in() -> None:
        for _ in range(relay._MAX_UNSENT + 100):
            taken.append(made.relay.hand_in(b"D", 1, PORT))  # noqa: PERF401  those before it fails

    with pytest.raises(RelayClosed):
        hand_in()
    count = 0
    with suppress(ConnectionResetError):
        while (told := socket.recv_fds(made.channel, 4, 4))[0]:
            count += 1
            for descriptor in told[1]:
                os.close(descriptor)
    assert 5 < count < 60
    for sock in taken:
        sock.close()
    door.close()
    assert len(os.listdir("/proc/self/fd")) < before


async def test_a_guest_that_does_not_answer(made: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_CONNECT_SECONDS", 0.05)
    assert await made.relay.connect(80) is None
    message, (descriptor,) = await made.hear()
    assert message == b"C\0\0\x50"
    os.close(descriptor)
    made.channel.sendall(b"K\0\0\0")  # too late
    waiting = asyncio.create_task(made.relay.connect(81))
    assert (await made.hear())[0] == b"C\1\0\x51"
    made.channel.close()
    assert await waiting is None


async def test_descriptors_from_a_guest_are_dropped(made: Guest) -> None:
    door = made.relay.door(PORT)
    door.listen(1)
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(made.channel, [b"A\1\0\7"], [0, 1, 2])
    await until(lambda: door.waiting > 0)
    assert len(os.listdir("/proc/self/fd")) == before
    door.close()


@pytest.fixture
async def both() -> AsyncIterator[tuple[Relay, guest.Relay, int]]:
    """The two ends, the guest's in a thread, with one door at a free port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ours, theirs = socket.socketpair()
    stop, stopped = os.pipe()
    one = guest.Relay(theirs.detach(), [port])

    def serve() -> None:
        poller = select.poll()
        poller.register(stop, select.POLLIN)
        poller.register(one.fd, select.POLLIN)
        while stop not in {fd for fd, _ in poller.poll()}:
            one.work()

    thread = threading.Thread(target=serve)
    thread.start()
    host = Relay(ours)
    host.run_begins()
    yield host, one, port
    os.write(stopped, b"x")
    thread.join()
    host.close()
    one.end_run()
    for fd in [one.channel.fileno(), *one.listeners]:
        os.close(fd)
    one.forget()
    os.close(stop)
    os.close(stopped)


async def test_a_guest_takes_no_more_than_it_may(both: tuple[Relay, guest.Relay, int]) -> None:
    """Beyond that connections wait until others are over."""
    host, one, port = both
    door = host.door(port)
    door.listen(1)

    async def until_there_wait(waiting: int) -> None:
        async with asyncio.timeout(10):
            await until(lambda: door.waiting >= waiting)

    await until(lambda: one.doors[port].is_open)
    clients = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(guest.MAX_CONNECTIONS + 10)]
    await until_there_wait(guest.MAX_CONNECTIONS)
    assert one.count() == guest.MAX_CONNECTIONS
    taken = [door.accept()[0] for _ in range(guest.MAX_CONNECTIONS)]
    for sock in taken[:10]:
        sock.close()
    await until_there_wait(10)
    assert one.count() == guest.MAX_CONNECTIONS
    for sock in (*taken, *clients):
        sock.close()
    door.close()


async def test_a_connection_inwards(both: tuple[Relay, guest.Relay, int]) -> None:
    host, _, _ = both
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        sock = await host.connect(port)
        assert sock is not None
        with sock, server.accept()[0] as other:
            other.sendall(b"welcome")
            reader, writer = await asyncio.open_connection(sock=sock)
            assert await reader.readexactly(7) == b"welcome"
            writer.close()
    assert await host.connect(port) is None
    assert await host.connect(0) is None
