"""A connection that is cut is told from one whose other end takes its time."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from era.api.protocol.dead_peers import SECONDS, ask_when_idle, cut_off
from tests.hostile.network import Impairment, Network, Node, inside
from tests.soaking import soak_the_rest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make network namespaces")

LOST = Impairment(lost=True)


@pytest.fixture
def network() -> Iterator[Network]:
    made = Network()
    yield made
    made.close()


async def connected(here: Node, there: Node) -> tuple[asyncio.StreamWriter, asyncio.StreamReader, socket.socket]:
    """A connection from here, and its other end, which nobody reads from."""
    with inside(there):
        listening = socket.create_server((there.address, 0))
    with inside(here):
        mine = socket.create_connection(listening.getsockname(), 10)
    other, _ = listening.accept()
    listening.close()
    reader, writer = await asyncio.open_connection(sock=mine)
    ask_when_idle(writer)
    return writer, reader, other


async def closed(writer: asyncio.StreamWriter, other: socket.socket) -> None:
    other.close()
    writer.transport.abort()
    with suppress(OSError):
        await writer.wait_closed()


@pytest.mark.parametrize("one_way", [False, True])
async def test_a_cut_is_noticed(network: Network, one_way: bool) -> None:
    here, there = network.node(1), network.node(2)
    writer, _, other = await connected(here, there)
    writer.write(b"arrives")
    other.settimeout(60)
    assert await asyncio.to_thread(other.recv, 7) == b"arrives"
    network.impair(there, here, LOST, back=Impairment() if one_way else LOST)
    writer.write(b"is not acknowledged")
    began = time.monotonic()
    await asyncio.wait_for(cut_off(writer), 10 * SECONDS)
    assert time.monotonic() - began > SECONDS / 2
    await closed(writer, other)


@pytest.mark.parametrize("is_cut", soak_the_rest([False, True], 1))
async def test_whoever_does_not_read_is_there_all_the_same(network: Network, is_cut: bool) -> None:
    """Until he is cut off: he is asked less and less often whether he has room, so that it takes half a minute."""
    here, there = network.node(1), network.node(2)
    writer, _, other = await connected(here, there)
    writer.write(bytes(32 << 20))  # more than any buffer takes
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(cut_off(writer), 2 * SECONDS)
    if is_cut:
        network.impair(here, there, LOST)
        await asyncio.wait_for(cut_off(writer), 10 * SECONDS)
    await closed(writer, other)


async def test_a_cut_is_noticed_where_nothing_is_under_way(network: Network) -> None:
    here, there = network.node(1), network.node(2)
    writer, reader, other = await connected(here, there)
    network.impair(here, there, LOST)
    with pytest.raises(TimeoutError, match="timed out"):
        await asyncio.wait_for(reader.read(1), 60)
    await closed(writer, other)
