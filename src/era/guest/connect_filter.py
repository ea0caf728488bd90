"""The connect filter: by it the kernel notifies the host before a program connects to anything.

A program that may have the internet gets one more seccomp filter, which lets nothing through that the others don't. For
`connect`, and for what sends a datagram to an address, it answers SECCOMP_RET_USER_NOTIF (seccomp_unotify(2)): the call
waits until whoever holds the filter's *notification descriptor* has decided. That is the host, which gets it through
the socket broker (socket_broker.py); the program never has it. network/connect_supervisor.py has what the host does
then.

gVisor makes its programs' calls in their stead, so there the filter is on gVisor itself, for as long as that lives
(gvisor.py). Of messages it notifies only of those that don't wait: gVisor sends its programs' like that, and its own,
which are many, not.
"""

from __future__ import annotations

import ctypes
import errno
import os

_MACHINES = {
    # The number of seccomp(2) and the audit architecture; then connect, sendto, sendmsg, sendmmsg.
    "x86_64": (317, 0xC000003E, 42, 44, 46, 307),
    "aarch64": (277, 0xC00000B7, 203, 206, 211, 269),
}
_SET_MODE_FILTER, _GET_ACTION_AVAIL = 1, 2
_NEW_LISTENER = 1 << 3
_WAIT_KILLABLE = 1 << 5  # only a deadly signal interrupts a call that the host has been notified of
_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000
_LOAD, _EQUAL, _HAS_BITS, _RETURN = 0x20, 0x15, 0x45, 0x06  # BPF: ld abs, jeq, jset, ret
_MSG_DONTWAIT, _MSG_NOSIGNAL = 0x40, 0x4000
_NUMBER_OFFSET, _ARCHITECTURE_OFFSET = 0, 4  # in struct seccomp_data

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.c_char_p))


def _argument_offset(number: int) -> int:
    """The offset of this argument's low 32 bits in struct seccomp_data."""
    return 16 + 8 * number


def _filter(machine: tuple[int, ...], *, gvisor: bool) -> bytes:
    """The compiled filter. Notifies of `connect`, of `sendto` with an address, and of messages, whose address stands in
    memory. But not of messages with MSG_NOSIGNAL: these are sent where there's a connection (by gRPC, say), and many at
    that. For `gvisor`, only of messages with MSG_DONTWAIT."""
    _, architecture, connect, sendto, sendmsg, sendmmsg = machine
    allow, notify = 15, 16
    check_flags = (_HAS_BITS, notify, allow, _MSG_DONTWAIT) if gvisor else (_HAS_BITS, allow, notify, _MSG_NOSIGNAL)
    lines = [  # operation, line to go to if true, line to go to if not, operand
        (_LOAD, 0, 0, _ARCHITECTURE_OFFSET),
        (_EQUAL, 2, allow, architecture),
        (_LOAD, 0, 0, _NUMBER_OFFSET),
        (_EQUAL, notify, 4, connect),
        (_EQUAL, 5, 9, sendto),
        (_LOAD, 0, 0, _argument_offset(4)),
        (_EQUAL, 7, notify, 0),
        (_LOAD, 0, 0, _argument_offset(4) + 4),
        (_EQUAL, allow, notify, 0),
        (_EQUAL, 10, 12, sendmsg),
        (_LOAD, 0, 0, _argument_offset(2)),
        check_flags,
        (_EQUAL, 13, allow, sendmmsg),
        (_LOAD, 0, 0, _argument_offset(3)),
        check_flags,
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _NOTIFY),
    ]
    compiled = b""
    for at, (code, if_true, if_false, operand) in enumerate(lines):
        jumps = (if_true - at - 1, if_false - at - 1) if code in (_EQUAL, _HAS_BITS) else (0, 0)
        compiled += code.to_bytes(2, "little") + bytes(jumps) + operand.to_bytes(4, "little")
    return compiled


def _program(instructions: bytes) -> _Program:
    return _Program(len(instructions) // 8, instructions)


_machine = _MACHINES.get(os.uname().machine)
"""This one's numbers, None where they aren't known here."""

_programs = {gvisor: _program(_filter(_machine, gvisor=gvisor)) for gvisor in (False, True)} if _machine else {}
"""Compiled once: every process that is under the filter is a fork of this one."""


def install(*, gvisor: bool = False) -> int:
    """Put the filter on this process and those that it starts. Returns the notification descriptor. Raises OSError."""
    if _machine is None:
        raise OSError(errno.ENOSYS, "seccomp")
    program = ctypes.byref(_programs[gvisor])
    notify_fd: int = _libc.syscall(_machine[0], _SET_MODE_FILTER, _NEW_LISTENER | _WAIT_KILLABLE, program)
    if notify_fd < 0:  # before Linux 5.19
        notify_fd = _libc.syscall(_machine[0], _SET_MODE_FILTER, _NEW_LISTENER, program)
    if notify_fd < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return notify_fd


def is_available() -> bool:
    """Whether this kernel has seccomp user notification, and this machine's calls are known here."""
    if _machine is None:
        return False
    action = ctypes.c_uint32(_NOTIFY)
    return bool(_libc.syscall(_machine[0], _GET_ACTION_AVAIL, 0, ctypes.byref(action)) == 0)
