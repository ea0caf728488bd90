"""Addresses of a sandbox's loopback interface, which runs and processes share."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from ipaddress import ip_address

import pytest

from era.network.loopback import LoopbackAddresses

ADDRESSES = [ip_address(f"203.0.113.{number}") for number in range(1, 201)]
V6 = ip_address("2001:db8:77::1")


class Broker:
    """Hands out sockets of this thread's network, `most` of them, and others once there are `more`."""

    can_supervise, pid = True, 0

    def __init__(self, most: int = 1000) -> None:
        self.most, self.none_left, self.more = most, asyncio.Event(), asyncio.Event()

    async def new_socket(self, family: int, kind: int) -> socket.socket:
        if not self.most:
            self.none_left.set()
            await self.more.wait()
        self.most -= 1
        return socket.socket(family, kind)

    def give_back(self, sock: socket.socket) -> None:
        sock.close()

    def on_notify_fd(self, callback: Callable[[int], None]) -> None:
        raise NotImplementedError  # nothing here asks for it


@pytest.fixture(autouse=True)
def _network() -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("only root can make a network namespace")
    with open("/proc/thread-self/ns/net", "rb") as home:
        os.unshare(os.CLONE_NEWNET)
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            yield
        finally:
            os.setns(home.fileno(), os.CLONE_NEWNET)


def addresses() -> str:
    return subprocess.run(["ip", "addr", "show", "lo"], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("steps", [1, 3], ids=["is to be", "is"])
async def test_who_uses_an_address_again_while_it_is_removed_has_it(steps: int) -> None:
    shared, broker = LoopbackAddresses(), Broker()
    for address in ADDRESSES:
        await shared.use(address, broker)
    leaving = asyncio.create_task(shared.leave(ADDRESSES))
    for _ in range(steps):
        await asyncio.sleep(0)
    again = ADDRESSES[-1], ADDRESSES[0]
    for address in again:
        await shared.use(address, broker)
    await leaving
    for address in again:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((str(address), 0))
    await shared.leave(again)
    assert "203.0.113." not in addresses()


async def test_a_use_that_is_cancelled_leaves_no_address_behind() -> None:
    shared, broker = LoopbackAddresses(), Broker(1)
    using = asyncio.create_task(shared.use(V6, broker))
    await broker.none_left.wait()
    assert str(V6) in addresses()
    using.cancel()
    await asyncio.wait([using])
    assert str(V6) not in addresses()
    await shared.use(V6, Broker())
    await shared.leave([V6])
    assert str(V6) not in addresses()


async def test_who_leaves_while_another_gets_an_address_need_not_wait() -> None:
    shared, broker = LoopbackAddresses(), Broker(1)
    await shared.use(ADDRESSES[0], broker)
    using = asyncio.create_task(shared.use(V6, broker))
    await broker.none_left.wait()
    leaving = asyncio.create_task(shared.leave([ADDRESSES[0]]))
    await asyncio.sleep(0.01)
    assert leaving.done()
    broker.more.set()
    await using
    await shared.leave([V6])
    assert "203.0.113." not in addresses()


async def test_who_is_cancelled_while_he_leaves_has_left() -> None:
    shared, broker = LoopbackAddresses(), Broker()
    for address in ADDRESSES:
        await shared.use(address, broker)
    leaving = asyncio.create_task(shared.leave(ADDRESSES))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait([leaving])
    await shared.use(V6, broker)
    await shared.leave([V6])
    assert "203.0.113." not in addresses()
