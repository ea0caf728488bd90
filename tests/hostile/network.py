"""A network of this test's own, whose packets pass through the test: it drops, delays and doubles them, each way apart.

Theory of operation. Each node is a network namespace with a TUN device, and what a node sends comes out of that as a
packet, which a thread here hands to the node it is for. So it is as if a cable were cut: nobody is told, TCP sends
again, with growing pauses, and goes on once the cable is mended. A relay would acknowledge what it swallows.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import selectors
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 1, 0x1000
_MTU = 16_000
_NETWORK = "10.77.0."


@dataclass(frozen=True)
class Node:
    """A network namespace and its device, by file descriptors."""

    address: str
    namespace: int
    device: int

    def command(self, *words: str) -> list[str]:
        """A command of this process's that runs there."""
        return ["nsenter", f"--net=/proc/{os.getpid()}/fd/{self.namespace}", *words]


@dataclass(frozen=True)
class Impairment:
    """What becomes of packets from one node to another."""

    lost: bool = False
    seconds: float = 0.0
    """By up to so many they are late, at random, so that some overtake others."""

    doubled: float = 0.0
    """Part of them that comes twice."""


_NONE = Impairment()


class Network:
    """Nodes that reach each other. `close` when done."""

    def __init__(self, seed: int = 0) -> None:
        self._chance = random.Random(seed)
        self._nodes: dict[bytes, Node] = {}
        """By their addresses' bytes."""

        self._impairments: dict[tuple[bytes, bytes], Impairment] = {}
        self._late: list[tuple[float, int, int, bytes]] = []
        """When, a number, the device, the packet."""

        self._count = 0
        self._selector = selectors.DefaultSelector()
        self._closing = False
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def node(self, number: int) -> Node:
        """Make a node, which has the address with this number."""
        made: list[Node] = []
        thread = threading.Thread(target=lambda: made.append(_make(f"{_NETWORK}{number}")))
        thread.start()
        thread.join()
        (node,) = made
        self._nodes[_raw(node)] = node
        self._selector.register(node.device, selectors.EVENT_READ)
        return node

    def impair(self, one: Node, other: Node, impairment: Impairment = _NONE, *, back: Impairment | None = None) -> None:
        """Decide what becomes of packets from one node to the other, and of those `back`; the same, if left out."""
        self._impairments[_raw(one), _raw(other)] = impairment
        self._impairments[_raw(other), _raw(one)] = impairment if back is None else back

    def heal(self) -> None:
        """All packets arrive from now on."""
        self._impairments = {}

    @contextmanager
    def healed(self) -> Iterator[None]:
        """All packets arrive after the block, whatever was decided within it."""
        try:
            yield
        finally:
            self.heal()

    def close(self) -> None:
        self._closing = True
        self._thread.join()
        for node in self._nodes.values():
            os.close(node.device)
            os.close(node.namespace)

    def _carry(self) -> None:
        while not self._closing:
            wait = 0.1
            if self._late:
                wait = min(max(self._late[0][0] - time.monotonic(), 0.0), wait)
            for key, _ in self._selector.select(wait):
                for _ in range(64):
                    try:
                        self._send(os.read(key.fd, 1 << 16))
                    except BlockingIOError:
                        break
            now = time.monotonic()
            while self._late and self._late[0][0] <= now:
                _, _, device, packet = heapq.heappop(self._late)
                _write(device, packet)

    def _send(self, packet: bytes) -> None:
        if packet[0] >> 4 != 4 or (node := self._nodes.get(packet[16:20])) is None:
            return
        impairment = self._impairments.get((packet[12:16], packet[16:20]), _NONE)
        if impairment.lost:
            return
        for _ in range(2 if self._chance.random() < impairment.doubled else 1):
            if impairment.seconds:
                self._count += 1
                at = time.monotonic() + self._chance.uniform(0, impairment.seconds)
                heapq.heappush(self._late, (at, self._count, node.device, packet))
            else:
                _write(node.device, packet)


@contextmanager
def inside(node: Node) -> Iterator[None]:
    """This thread, and those that it starts, are in that node for as long as the block lasts."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.setns(node.namespace, os.CLONE_NEWNET)
        yield
    finally:
        os.setns(before, os.CLONE_NEWNET)
        os.close(before)


def _make(address: str) -> Node:
    """Make a node, on a thread that has it from then on."""
    os.unshare(os.CLONE_NEWNET)
    namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"tun", _IFF_TUN | _IFF_NO_PI))
    for words in (
        "link set lo up",
        f"addr add {address}/24 dev tun",
        f"link set tun mtu {_MTU} up",
    ):
        subprocess.run(["ip", *words.split()], check=True, capture_output=True)
    return Node(address, namespace, device)


def _raw(node: Node) -> bytes:
    return bytes(map(int, node.address.split(".")))


def _write(device: int, packet: bytes) -> None:
    with suppress(BlockingIOError):  # its queue is full, and TCP sends again
        os.write(device, packet)
