"""What a run and the processes beside it share of a sandbox's network.

What both connect to are addresses of one interface, loopback. So they are counted: who comes first makes one, who goes
last removes it. And only one can have a port of an address: who comes first relays the other's datagrams, too.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress

from era.core.allowlist import Address
from era.core.ports import SocketBroker
from era.network.dialing import family
from era.network.dns import Names
from era.network.sandbox_sockets import Target, add_address, remove_address

_FEW = 8
"""That are removed at once; the kernel takes its time for more."""

_IPV6_TRIES = 100

_MAX_KEPT = 1024


class LoopbackAddresses:
    """Those of one sandbox."""

    def __init__(self) -> None:
        self._made: dict[Address, int] = {}
        """With the serial numbers of their aliases."""

        self._users: dict[Address, int] = {}
        self._kept: set[Address] = set()
        self._last_serial = 0
        self._probes: dict[int, socket.socket] = {}
        """By IP version: a socket of the sandbox's network, through which that gets addresses."""

        self._adding = asyncio.Lock()
        self._removing: set[asyncio.Task[None]] = set()
        self.relayed: dict[Target, Callable[[], bool]] = {}
        """Where datagrams arrive for one of those who share it: the function that ends this if its run is ending
        anyway, and returns whether it is."""

        self.names: list[Names] = []
        """The nameservers of those who share it."""

    async def use(self, address: Address, broker: SocketBroker) -> None:
        """Make an address one of the sandbox's own, or use it too, until `leave`. Raises OSError."""
        async with self._adding:
            if address not in self._made:
                if address.version not in self._probes:
                    self._probes[address.version] = await broker.new_socket(family(address), socket.SOCK_DGRAM)
                probe = self._probes[address.version]
                add_address(probe, address, self._last_serial + 1)
                self._last_serial += 1
                if address.version == 6:
                    try:
                        await _wait_until_usable(address, broker)
                    except BaseException:
                        _remove([(probe, address, self._last_serial)])
                        raise
                self._made[address] = self._last_serial
            self._users[address] = self._users.get(address, 0) + 1

    def keep(self, addresses: Iterable[Address]) -> set[Address]:
        """Don't remove these before `release`, though who used them leaves: a program that is still connecting to one
        hears that nobody listens there, but of an address that is gone it hears nothing. Returns those of which the use
        has been taken over."""
        taken = set(addresses) - self._kept
        if len(self._kept) + len(taken) > _MAX_KEPT:
            return set()
        self._kept |= taken
        return taken

    async def release(self) -> None:
        """Remove what was kept."""
        kept, self._kept = self._kept, set()
        await self.leave(kept)

    async def leave(self, addresses: Iterable[Address]) -> None:
        """Remove those that nobody else uses; after this where somebody is adding one, since that may take long."""
        for address in addresses:
            self._users[address] -= 1
            if not self._users[address]:
                del self._users[address]
        if self._probes:
            is_soon = not self._adding.locked()
            removing = asyncio.create_task(self._remove_unused())
            self._removing.add(removing)
            removing.add_done_callback(self._removing.discard)
            if is_soon:
                await asyncio.shield(removing)

    async def _remove_unused(self) -> None:
        async with self._adding:  # until they are removed: who used one again meanwhile would lose it
            unused = self._made.keys() - self._users.keys()
            gone = [(self._probes[address.version], address, self._made.pop(address)) for address in unused]
            if len(gone) > _FEW:
                await asyncio.to_thread(_remove, gone)
            else:
                _remove(gone)
            if not self._made:
                while self._probes:
                    self._probes.popitem()[1].close()
                self._last_serial = 0


def _remove(gone: Iterable[tuple[socket.socket, Address, int]]) -> None:
    for probe, address, serial in gone:
        with suppress(OSError):  # gone with the sandbox
            remove_address(probe, address, serial)


async def _wait_until_usable(address: Address, broker: SocketBroker) -> None:
    """Wait until a new IPv6 address can be bound to. The kernel gives no sign of that."""
    probe = await broker.new_socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with probe:
        for _ in range(_IPV6_TRIES):
            try:
                probe.bind((str(address), 0))
            except OSError:
                await asyncio.sleep(0.001)
            else:
                return
