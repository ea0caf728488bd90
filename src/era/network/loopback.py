"""What a run and the processes beside it share of a sandbox's network.

What both connect to are addresses of one interface, loopback. So they are counted: who comes first makes one, who goes
last removes it. And only one can have a port of an address: who comes first relays the other's datagrams, too.

Python's `socket` can neither add a loopback address nor drop all that a socket receives, so the system calls for both
are here. They don't block. Addresses and ports below 1024 are up to whoever owns the sandbox's namespaces, or root.
Source: netdevice(7), and Linux's `struct in6_ifreq`; SO_ATTACH_FILTER is in socket(7).
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import socket
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address

from era.core.allowlist import Address
from era.core.ports import SocketBroker
from era.network.dialing import family
from era.network.dns import Names

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


type Target = tuple[Address, int]
"""An address and a port."""

_SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFFLAGS, _SIOCDIFADDR = 0x8916, 0x891C, 0x8914, 0x8936
_LOOPBACK_INDEX = 1

_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_RETURN_ZERO_BYTES = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0), 8)
_DROP_ALL = struct.pack("HxxxxxxQ", 1, ctypes.addressof(_RETURN_ZERO_BYTES))


def bind(sock: socket.socket, target: Target) -> None:
    """Bind to this address and port, for IPv6 to that family only. Raises OSError."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind((str(target[0]), target[1]))


def set_drop_all(sock: socket.socket, *, enabled: bool) -> None:
    """Attach a drop-all filter to a listening socket, or detach it. While it is attached, a client is neither accepted
    nor refused: its SYN is lost, and its kernel sends the next one after 1, 3 and 7 seconds."""
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER if enabled else _SO_DETACH_FILTER, _DROP_ALL)


def add_address(sock: socket.socket, address: Address, serial: int) -> None:
    """Give the loopback interface of `sock`'s network an address of the same family as `sock`.

    `serial` names an IPv4 address as the alias `lo:SERIAL`. An IPv6 address may take a moment until it can be used.
    Raises OSError."""
    if isinstance(address, IPv6Address):
        fcntl.ioctl(sock, _SIOCSIFADDR, _in6_ifreq(address))
    else:
        fcntl.ioctl(sock, _SIOCSIFADDR, _ifreq(serial, address))
        fcntl.ioctl(sock, _SIOCSIFNETMASK, _ifreq(serial, IPv4Address(0xFFFF_FFFF)))


def remove_address(sock: socket.socket, address: Address, serial: int) -> None:
    """Undo `add_address`. Raises OSError."""
    if isinstance(address, IPv6Address):
        fcntl.ioctl(sock, _SIOCDIFADDR, _in6_ifreq(address))
    else:
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", f"lo:{serial}".encode(), 0))


def _ifreq(serial: int, address: IPv4Address) -> bytes:
    return struct.pack("16sHH4s16x", f"lo:{serial}".encode(), socket.AF_INET, 0, address.packed)


def _in6_ifreq(address: IPv6Address) -> bytes:
    return struct.pack("16sIi", address.packed, 128, _LOOPBACK_INDEX)
