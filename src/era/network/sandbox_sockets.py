"""What sockets of a sandbox's network are made to do that Python's `socket` can't: loopback addresses, dropping all.

Nothing here waits. Addresses and ports below 1024 are up to whoever owns the sandbox's namespaces, or root.
Source: netdevice(7), and Linux's `struct in6_ifreq`; SO_ATTACH_FILTER is in socket(7).
"""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct
from ipaddress import IPv4Address, IPv6Address

from era.core.allowlist import Address

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
