"""What the gate needs of the kernel and Python doesn't have: questions about system calls, and addresses of loopback.

Nothing here waits. Each of these acts on a sandbox from outside, and needs to be root or the user who has made it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from era.core.allowlist import Address

_RECEIVE, _ANSWER, _IS_VALID = 0xC0502100, 0xC0182101, 0x40082102
_QUESTION, _REPLY = struct.Struct("QIIiIQ6Q"), struct.Struct("QqiI")
_GO_ON = 1
_PIDFD_GETFD = 438
_PIDFD_THREAD = os.O_EXCL
_CALLS = {
    "x86_64": {42: "connect", 44: "sendto", 46: "sendmsg", 307: "sendmmsg"},
    "aarch64": {203: "connect", 206: "sendto", 211: "sendmsg", 269: "sendmmsg"},
}
_NAMES = _CALLS.get(os.uname().machine, {})
_MSG_FASTOPEN = 0x20000000
_MOST_MESSAGES = 64

_SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFFLAGS, _SIOCDIFADDR = 0x8916, 0x891C, 0x8914, 0x8936
_LOOPBACK_INDEX = 1

_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_DROP = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0), 8)
_NOTHING = struct.pack("HxxxxxxQ", 1, ctypes.addressof(_DROP))

type Target = tuple[Address, int]
"""An address and a port."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.argtypes = (
    ctypes.c_int,
    *(ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong),
    ctypes.c_ulong,
)


@dataclass(frozen=True, slots=True)
class Question:
    """A system call that waits for us: `id` for answering, the thread that made it, its name and arguments."""

    id: int
    thread: int
    call: str
    arguments: tuple[int, ...]

    @property
    def descriptor(self) -> int:
        return self.arguments[0] & 0xFFFF_FFFF

    @property
    def connects(self) -> bool:
        return self.call == "connect" or bool(self.call == "sendto" and self.arguments[3] & _MSG_FASTOPEN)


def question(listener: int) -> Question | None:
    """The next one at this listener, None where there is none (any more). Raises OSError with ENOTCONN once nobody is
    left who could ask."""
    poller = select.poll()
    poller.register(listener, select.POLLIN)
    events = dict(poller.poll(0)).get(listener, 0)
    if not events & select.POLLIN:  # asking for one that isn't there may wait for ever
        if events:
            raise OSError(errno.ENOTCONN, "nobody is there")
        return None
    buffer = bytearray(_QUESTION.size)
    try:
        fcntl.ioctl(listener, _RECEIVE, buffer)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR):  # whoever asked is dead, or was interrupted
            return None
        raise
    number, thread, _, call, _, _, *arguments = _QUESTION.unpack(buffer)
    return Question(number, thread, _NAMES.get(call, ""), tuple(arguments))


def is_valid(listener: int, asked: Question) -> bool:
    """Whether the thread still waits, so that what was read by its number was its own."""
    try:
        fcntl.ioctl(listener, _IS_VALID, struct.pack("Q", asked.id))
    except OSError:
        return False
    return True


def go_on(listener: int, asked: Question) -> None:
    """Let the kernel do what it was asked for."""
    with suppress(OSError):  # nobody waits any more
        fcntl.ioctl(listener, _ANSWER, _REPLY.pack(asked.id, 0, 0, _GO_ON))


def answer(listener: int, asked: Question, error: int) -> None:
    """End the call with this error, or as done where that is 0."""
    with suppress(OSError):
        fcntl.ioctl(listener, _ANSWER, _REPLY.pack(asked.id, 0, -error, 0))


def targets(asked: Question) -> list[Target]:
    """Where the call wants to, in the internet's address families. Raises OSError where its memory can't be read."""
    if asked.call == "connect":
        places = [asked.arguments[1:3]]
    elif asked.call == "sendto":
        places = [asked.arguments[4:6]]
    else:
        size = 64 if asked.call == "sendmmsg" else 56
        count = min(asked.arguments[2], _MOST_MESSAGES) if asked.call == "sendmmsg" else 1
        heads = memory(asked.thread, asked.arguments[1], size * count)
        places = [struct.unpack_from("QI", heads, at) for at in range(0, len(heads) - 15, size)]
    found = []
    for place, length in dict.fromkeys(places):
        if place and length >= 8 and (one := _target(memory(asked.thread, place, min(length & 0xFFFF_FFFF, 28)))):
            found.append(one)
    return found


def _target(packed: bytes) -> Target | None:
    family = int.from_bytes(packed[:2], "little")
    port = int.from_bytes(packed[2:4])
    if family == socket.AF_INET and len(packed) >= 8:
        return IPv4Address(packed[4:8]), port
    if family == socket.AF_INET6 and len(packed) >= 24:
        address = IPv6Address(packed[8:24])
        return address.ipv4_mapped or address, port
    return None


def memory(thread: int, place: int, size: int) -> bytes:
    """Of another process. Fewer bytes where there are no more. Raises OSError."""
    buffer = ctypes.create_string_buffer(size)
    here = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), size)
    there = (ctypes.c_uint64 * 2)(place, size)
    count = _libc.process_vm_readv(thread, here, 1, there, 1, 0)
    if count < 0:
        raise OSError(ctypes.get_errno(), "process_vm_readv")
    return buffer.raw[:count]


def borrowed(thread: int, descriptor: int) -> socket.socket:
    """A program's own socket. Raises OSError, also where that descriptor is something else."""
    try:
        process = os.pidfd_open(thread, _PIDFD_THREAD)
    except OSError:  # before Linux 6.9 there are none of threads, but of whole processes
        process = os.pidfd_open(_process_of(thread))
    try:
        number = _libc.syscall(_PIDFD_GETFD, process, descriptor, 0)
    finally:
        os.close(process)
    if number < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    try:
        return socket.socket(fileno=number)
    except BaseException:
        with suppress(OSError):
            os.close(number)
        raise


def _process_of(thread: int) -> int:
    with open(f"/proc/{thread}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("Tgid:"))


def hold(sock: socket.socket, *, yes: bool = True) -> None:
    """Have a socket that listens hear nothing, so that who connects there is neither accepted nor refused, and tries
    again after a second, three, seven. Or let it hear again."""
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER if yes else _SO_DETACH_FILTER, _NOTHING)


def add_address(sock: socket.socket, address: Address, serial: int) -> None:
    """Make it one of loopback's in the network of this socket, which is of the same family. `serial` names it there.
    An IPv6 address may take a moment until it can be used. Raises OSError."""
    if isinstance(address, IPv6Address):
        fcntl.ioctl(sock, _SIOCSIFADDR, _ipv6(address))
    else:
        fcntl.ioctl(sock, _SIOCSIFADDR, _ipv4(serial, address))
        fcntl.ioctl(sock, _SIOCSIFNETMASK, _ipv4(serial, IPv4Address(0xFFFF_FFFF)))


def remove_address(sock: socket.socket, address: Address, serial: int) -> None:
    """Undo `add_address`. Raises OSError."""
    if isinstance(address, IPv6Address):
        fcntl.ioctl(sock, _SIOCDIFADDR, _ipv6(address))
    else:
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", f"lo:{serial}".encode(), 0))


def _ipv4(serial: int, address: IPv4Address) -> bytes:
    return struct.pack("16sHH4s16x", f"lo:{serial}".encode(), socket.AF_INET, 0, address.packed)


def _ipv6(address: IPv6Address) -> bytes:
    return struct.pack("16sIi", address.packed, 128, _LOOPBACK_INDEX)
