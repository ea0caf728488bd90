"""The gate: it shows the host where a program wants to connect to, before the kernel tries.

A program that may have the internet gets one more filter of system calls, which lets nothing through that the others
don't. It has the kernel ask somebody before it goes on with `connect`, and with what sends a datagram to an address.
Whoever holds the filter's *listener* is asked: the host, to which it's handed through the broker (socket_broker.py).
The program never has it. What the host does then is told in network/connect_supervisor.py.

gVisor makes its programs' calls in their stead, so there the filter is on gVisor itself, for as long as that lives
(gvisor.py). Of messages it asks only about those that don't wait: gVisor sends its programs' like that, and its own,
which are many, not.
"""

from __future__ import annotations

import ctypes
import os

_MACHINES = {
    # Its number of seccomp(2) and its name for itself; then connect, sendto, sendmsg, sendmmsg.
    "x86_64": (317, 0xC000003E, 42, 44, 46, 307),
    "aarch64": (277, 0xC00000B7, 203, 206, 211, 269),
}
_SET_MODE_FILTER, _GET_ACTION_AVAIL = 1, 2
_NEW_LISTENER, _WAIT_KILLABLE = 1 << 3, 1 << 5  # the second: no signal but a deadly one comes between asking and answer
_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000
_LOAD, _EQUAL, _HAS, _RETURN = 0x20, 0x15, 0x45, 0x06
_MSG_DONTWAIT, _MSG_NOSIGNAL = 0x40, 0x4000

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.c_char_p))


def _argument(number: int) -> int:
    """Where its low half is, for the filter to load."""
    return 16 + 8 * number


def _filter(*, gvisor: bool = False) -> bytes:
    """Ask about `connect`, `sendto` with an address, and messages, whose address stands in memory. But not about
    messages with MSG_NOSIGNAL: these are written where there's a connection (by gRPC, say), and many at that. For
    `gvisor`, only about those with MSG_DONTWAIT."""
    _, machine, connect, sendto, sendmsg, sendmmsg = _MACHINES[os.uname().machine]
    allow, notify = 15, 16
    asked = (_HAS, notify, allow, _MSG_DONTWAIT) if gvisor else (_HAS, allow, notify, _MSG_NOSIGNAL)
    lines = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 2, allow, machine),
        (_LOAD, 0, 0, 0),
        (_EQUAL, notify, 4, connect),
        (_EQUAL, 5, 9, sendto),
        (_LOAD, 0, 0, _argument(4)),
        (_EQUAL, 7, notify, 0),
        (_LOAD, 0, 0, _argument(4) + 4),
        (_EQUAL, allow, notify, 0),
        (_EQUAL, 10, 12, sendmsg),
        (_LOAD, 0, 0, _argument(2)),
        asked,
        (_EQUAL, 13, allow, sendmmsg),
        (_LOAD, 0, 0, _argument(3)),
        asked,
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _NOTIFY),
    ]
    compiled = b""
    for at, (code, yes, no, value) in enumerate(lines):
        jumps = (yes - at - 1, no - at - 1) if code in (_EQUAL, _HAS) else (0, 0)
        compiled += code.to_bytes(2, "little") + bytes(jumps) + value.to_bytes(4, "little")
    return compiled


def enter(*, gvisor: bool = False) -> int:
    """Put the filter on this process. The answer is its listener, a descriptor. Raises OSError."""
    instructions = _filter(gvisor=gvisor)
    program = ctypes.byref(_Program(len(instructions) // 8, instructions))
    number = _MACHINES[os.uname().machine][0]
    listener: int = _libc.syscall(number, _SET_MODE_FILTER, _NEW_LISTENER | _WAIT_KILLABLE, program)
    if listener < 0:  # before Linux 5.19
        listener = _libc.syscall(number, _SET_MODE_FILTER, _NEW_LISTENER, program)
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return listener


def is_known() -> bool:
    """Whether this kernel asks about system calls, and about this machine's."""
    machine = _MACHINES.get(os.uname().machine)
    if machine is None:
        return False
    action = ctypes.c_uint32(_NOTIFY)
    return bool(_libc.syscall(machine[0], _GET_ACTION_AVAIL, 0, ctypes.byref(action)) == 0)
