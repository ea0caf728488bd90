"""Sockets that fail, or never come to an end, under either event loop: uvloop watches one that has failed no longer,
and asyncio's tells of it again and again."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address
from typing import Any

import pytest
import uvloop

from era.core.concurrency.shares import Shares
from era.network import accept_loop, datagrams, splice
from era.network.descriptors import RunDescriptors
from era.network.destinations import Traffic

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
LOCAL = "127.0.0.1"
NOT_OFTEN = 20
"""A loop that spins calls back some thousand times in the time that this is about."""


@pytest.fixture(params=LOOPS)
def runner(request: pytest.FixtureRequest) -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
        yield runner


class Joined:
    """A program and a server, whose connections are joined for the block."""

    def __init__(self) -> None:
        self.traffic = Traffic()

    async def __aenter__(self) -> Joined:
        self.program, self._client = _connected()
        self.server, self._outside = _connected()
        descriptors = RunDescriptors(Shares(100), "me")
        self.joining = asyncio.create_task(splice.join(self._client, self._outside, self.traffic, descriptors))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.joining.cancel()
        await asyncio.gather(self.joining, return_exceptions=True)
        for each in (self.program, self._client, self.server, self._outside):
            each.close()

    async def received(self, size: int) -> bytes:
        """What the program gets."""
        data = b""
        while len(data) < size and (piece := await asyncio.get_running_loop().sock_recv(self.program, 1 << 20)):
            data += piece
        return data


def _connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server((LOCAL, 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    ours.setblocking(False)
    theirs.setblocking(False)
    return ours, theirs


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize("size", [1, 3 << 20], ids=["copied", "in a pipe"])
def test_a_reset_right_behind_data_ends_the_connection(runner: asyncio.Runner, size: int) -> None:
    """As that of a server which answers before it has read all."""

    async def answered() -> None:
        async with Joined() as joined, asyncio.timeout(60):
            sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(joined.server, bytes(size)))
            assert await joined.received(size) == bytes(size)
            await sending
            joined.server.send(b"the last")
            reset(joined.server)  # before the event loop has looked
            await joined.joining
            assert joined.traffic.received == size + len(b"the last")

    runner.run(answered())


READ, ACCEPT = splice._Direction._read, accept_loop.accept


def splice_alone(direction: splice._Direction) -> int:
    """The weakness: what splice says is believed."""
    if direction._pipe is None:
        return READ(direction)
    direction._in_pipe = os.splice(direction._source.fileno(), direction._pipe[1], 1 << 20)
    return direction._in_pipe


@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
def test_an_urgent_byte_stops_nothing(runner: asyncio.Runner, weakened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop would be told over and over that there is something to read, which splice doesn't get."""
    calls, readable = 0, splice._Direction._readable

    def counted(direction: splice._Direction) -> None:
        nonlocal calls
        calls += 1
        readable(direction)

    monkeypatch.setattr(splice._Direction, "_readable", counted)
    if weakened:
        monkeypatch.setattr(splice._Direction, "_read", splice_alone)

    async def urgent() -> None:
        nonlocal calls
        async with Joined() as joined, asyncio.timeout(60):
            sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(joined.server, bytes(3 << 20)))
            await joined.received(3 << 20)
            await sending
            calls = 0
            joined.server.send(b"!", socket.MSG_OOB)
            joined.server.send(b"more")
            if weakened:
                await asyncio.sleep(0.5)
                assert calls > NOT_OFTEN
                return
            assert await joined.received(4) == b"more"
            joined.server.send(b"?", socket.MSG_OOB)
            joined.server.send(b"the last")
            joined.server.shutdown(socket.SHUT_WR)
            assert await joined.received(9) == b"the last", "nor is it taken for the end"
            await asyncio.sleep(0.2)
            assert calls <= NOT_OFTEN

    runner.run(urgent())


@pytest.mark.parametrize("unheard", [1, datagrams._BURST], ids=["told when it receives", "told when it sends"])
def test_answers_come_though_nobody_listened_there_before(runner: asyncio.Runner, unheard: int) -> None:
    """As when a server is started again, and a program tries until it answers."""

    async def asks() -> None:
        loop = asyncio.get_running_loop()
        with ExitStack() as stack:
            inside, program, other, server = (
                stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK))
                for _ in range(4)
            )
            inside.bind((LOCAL, 0))
            for each in (program, other):
                each.connect(inside.getsockname())
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
                free.bind((LOCAL, 0))
                address = free.getsockname()
            relay = datagrams.DatagramRelay(
                inside, (IPv4Address(LOCAL), address[1]), Traffic(), RunDescriptors(Shares(100), "me"), lambda: None
            )
            stack.callback(relay.close)
            # Every second one is told of the one before. With the other's, the last of many comes in a turn of its own,
            # as does what the event loop has seen of the last but one.
            other.send(b"nobody hears this")
            for _ in range(unheard):
                program.send(b"nor this")
            await asyncio.sleep(0.1)
            server.settimeout(60)
            server.bind(address)
            async with asyncio.timeout(60):
                for n in range(3):
                    question, answer = b"question %d" % n, b"answer %d" % n
                    program.send(question)
                    asked = b""
                    while asked != question:
                        asked, sender = await asyncio.to_thread(server.recvfrom, 100)
                    server.sendto(answer, sender)
                    assert await loop.sock_recv(program, 100) == answer

    runner.run(asks())


def test_a_listener_that_listens_no_more_is_left_alone(runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else who has it may end that. It would be told of for ever."""
    calls = 0

    def counted(*given: Any) -> socket.socket | None:
        nonlocal calls
        calls += 1
        return ACCEPT(*given)

    async def close(client: socket.socket) -> None:
        client.close()

    async def listen() -> None:
        with socket.create_server((LOCAL, 0)) as listener:
            async with accept_loop.AcceptLoop(listener, close):
                listener.shutdown(socket.SHUT_RDWR)
                await asyncio.sleep(0.2)

    monkeypatch.setattr(accept_loop, "accept", counted)
    runner.run(listen())
    assert 0 < calls <= NOT_OFTEN
