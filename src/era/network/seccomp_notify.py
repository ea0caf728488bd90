"""seccomp user notification, from the side that decides: the ioctls of the notification descriptor, and what is read of
a thread whose system call waits.

Nothing here waits. All of it needs to be root or the user who has made the sandbox. Source: seccomp_unotify(2),
pidfd_getfd(2), process_vm_readv(2).
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

from era.network.loopback import Target

_RECV, _SEND, _ID_VALID = 0xC0502100, 0xC0182101, 0x40082102
_NOTIF, _RESP = struct.Struct("QIIiIQ6Q"), struct.Struct("QqiI")
_FLAG_CONTINUE = 1
_PIDFD_GETFD = 438
_PIDFD_THREAD = os.O_EXCL
_SYSCALLS = {
    "x86_64": {42: "connect", 44: "sendto", 46: "sendmsg", 307: "sendmmsg"},
    "aarch64": {203: "connect", 206: "sendto", 211: "sendmsg", 269: "sendmmsg"},
}
_NAMES = _SYSCALLS.get(os.uname().machine, {})
_MSG_FASTOPEN = 0x20000000
_MAX_MESSAGES = 64

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.argtypes = (
    ctypes.c_int,
    *(ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong),
    ctypes.c_ulong,
)


@dataclass(frozen=True, slots=True)
class Notification:
    """A system call that waits for a decision: the notification's `id`, the `thread` that made the call (as seen from
    here), the `syscall`'s name and its six arguments."""

    id: int
    thread: int
    syscall: str
    arguments: tuple[int, ...]

    @property
    def descriptor(self) -> int:
        """The socket's, in the thread's own process."""
        return self.arguments[0] & 0xFFFF_FFFF

    @property
    def connects(self) -> bool:
        """Whether the call connects a socket: `connect`, or `sendto` with TCP fast open."""
        return self.syscall == "connect" or bool(self.syscall == "sendto" and self.arguments[3] & _MSG_FASTOPEN)


def receive(notify_fd: int) -> Notification | None:
    """The next notification, None where there is none (any more). Raises OSError, with ENOTCONN once no process is
    left under the filter."""
    poller = select.poll()
    poller.register(notify_fd, select.POLLIN)
    events = dict(poller.poll(0)).get(notify_fd, 0)
    if not events & select.POLLIN:  # the ioctl would block, maybe for ever
        if events:
            raise OSError(errno.ENOTCONN, "nobody is there")
        return None
    buffer = bytearray(_NOTIF.size)
    try:
        fcntl.ioctl(notify_fd, _RECV, buffer)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR):  # the thread is dead, or was interrupted
            return None
        raise
    number, thread, _, syscall, _, _, *arguments = _NOTIF.unpack(buffer)
    return Notification(number, thread, _NAMES.get(syscall, ""), tuple(arguments))


def is_valid(notify_fd: int, notification: Notification) -> bool:
    """Whether the thread still waits. If so, what was read by its number before was its own: the number can't have been
    given to another thread meanwhile."""
    try:
        fcntl.ioctl(notify_fd, _ID_VALID, struct.pack("Q", notification.id))
    except OSError:
        return False
    return True


def continue_syscall(notify_fd: int, notification: Notification) -> None:
    """Let the kernel carry out the call."""
    with suppress(OSError):  # the thread no longer waits
        fcntl.ioctl(notify_fd, _SEND, _RESP.pack(notification.id, 0, 0, _FLAG_CONTINUE))


def inject_result(notify_fd: int, notification: Notification, error: int) -> None:
    """Return from the call without carrying it out: with this errno, or with 0 as if it had succeeded."""
    with suppress(OSError):  # the thread no longer waits
        fcntl.ioctl(notify_fd, _SEND, _RESP.pack(notification.id, 0, -error, 0))


def targets(notification: Notification) -> list[Target]:
    """The IPv4 and IPv6 destinations of the call, read from the thread's memory; IPv4-mapped ones as IPv4. Raises
    OSError where that can't be read."""
    if notification.syscall == "connect":
        pointers = [notification.arguments[1:3]]
    elif notification.syscall == "sendto":
        pointers = [notification.arguments[4:6]]
    else:
        many = notification.syscall == "sendmmsg"
        size = 64 if many else 56  # of struct mmsghdr, of struct msghdr
        count = min(notification.arguments[2], _MAX_MESSAGES) if many else 1
        headers = read_memory(notification.thread, notification.arguments[1], size * count)
        pointers = [struct.unpack_from("QI", headers, at) for at in range(0, len(headers) - 15, size)]
    found = []
    for pointer, length in dict.fromkeys(pointers):
        if pointer and length >= 8:
            target = _parse_sockaddr(read_memory(notification.thread, pointer, min(length & 0xFFFF_FFFF, 28)))
            if target is not None:
                found.append(target)
    return found


def _parse_sockaddr(packed: bytes) -> Target | None:
    """Parse a `struct sockaddr_in` or `sockaddr_in6`; None for any other or incomplete one."""
    family = int.from_bytes(packed[:2], "little")
    port = int.from_bytes(packed[2:4])
    if family == socket.AF_INET and len(packed) >= 8:
        return IPv4Address(packed[4:8]), port
    if family == socket.AF_INET6 and len(packed) >= 24:
        address = IPv6Address(packed[8:24])
        return address.ipv4_mapped or address, port
    return None


def read_memory(thread: int, pointer: int, size: int) -> bytes:
    """`size` bytes of another process, or fewer where its memory ends before. Raises OSError."""
    buffer = ctypes.create_string_buffer(size)
    here = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), size)
    there = (ctypes.c_uint64 * 2)(pointer, size)
    count = _libc.process_vm_readv(thread, here, 1, there, 1, 0)
    if count < 0:
        raise OSError(ctypes.get_errno(), "process_vm_readv")
    return buffer.raw[:count]


def duplicate_socket(thread: int, descriptor: int) -> socket.socket:
    """A duplicate of another process's socket. Raises OSError, with ENOTSOCK where the descriptor is something else."""
    try:
        process = os.pidfd_open(thread, _PIDFD_THREAD)
    except OSError:  # before Linux 6.9 a pidfd is of a whole process
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
