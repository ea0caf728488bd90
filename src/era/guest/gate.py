"""The gate: it shows the host where a program wants to connect to, before the kernel tries.

A program that may have the internet gets one more filter of system calls, which lets nothing through that the others
don't. It has the kernel ask somebody before it goes on with `connect`, and with what sends a datagram to an address.
Whoever holds the filter's *listener* is asked: the host, to which it's handed here, at a socket of its own. The program
never has it. What the host does then is told in network/gates.py.

The host can make no socket in here, so it asks for some at the same socket: a letter, see KINDS, says of which kind.

  guest to host:  L  with a descriptor: the listener of the process that waits for the next run
                  t, u, T, U  with up to BATCH descriptors of this kind; fewer where there can't be more
  host to guest:  t, u, T, U
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
_MSG_NOSIGNAL = 0x4000

BATCH = 16
_INET, _INET6, _STREAM, _DATAGRAM = 2, 10, 1, 2
KINDS = {b"t": (_INET, _STREAM), b"u": (_INET, _DATAGRAM), b"T": (_INET6, _STREAM), b"U": (_INET6, _DATAGRAM)}

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.c_char_p))


def _argument(number: int) -> int:
    """Where its low half is, for the filter to load."""
    return 16 + 8 * number


def _filter() -> bytes:
    """Ask about `connect`, `sendto` with an address, and messages, whose address stands in memory. But not about
    messages with MSG_NOSIGNAL: these are written where there's a connection (by gRPC, say), and many at that."""
    _, machine, connect, sendto, sendmsg, sendmmsg = _MACHINES[os.uname().machine]
    allow, notify = 15, 16
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
        (_HAS, allow, notify, _MSG_NOSIGNAL),
        (_EQUAL, 13, allow, sendmmsg),
        (_LOAD, 0, 0, _argument(3)),
        (_HAS, allow, notify, _MSG_NOSIGNAL),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _NOTIFY),
    ]
    compiled = b""
    for at, (code, yes, no, value) in enumerate(lines):
        jumps = (yes - at - 1, no - at - 1) if code in (_EQUAL, _HAS) else (0, 0)
        compiled += code.to_bytes(2, "little") + bytes(jumps) + value.to_bytes(4, "little")
    return compiled


class Gate:
    """Our end of the socket to the host, by its descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._filter = _filter()
        self._program = _Program(len(self._filter) // 8, self._filter)
        self._call = _MACHINES[os.uname().machine][0]

    def enter(self) -> None:
        """Put the filter on this process, and hand its listener to the host. Raises OSError."""
        listener = self._seccomp(_SET_MODE_FILTER, _NEW_LISTENER | _WAIT_KILLABLE, ctypes.byref(self._program))
        if listener < 0:  # before Linux 5.19
            listener = self._seccomp(_SET_MODE_FILTER, _NEW_LISTENER, ctypes.byref(self._program))
        if listener < 0:
            raise OSError(ctypes.get_errno(), "seccomp")
        self._send(b"L", [listener])
        os.close(listener)

    def hand_out(self) -> bool:
        """Give the host the sockets that it asks for. False where it's gone."""
        import _socket

        kind = os.read(self.fd, 16)
        made: list[_socket.socket] = []
        try:
            while kind and len(made) < BATCH:
                made.append(_socket.socket(*KINDS[kind]))
        except OSError:
            pass  # this kernel hasn't got that family, or there is no room for more
        if kind:
            self._send(kind, [one.fileno() for one in made])
        for one in made:
            one.close()
        return bool(kind)

    def _seccomp(self, operation: int, flags: int, argument: object) -> int:
        answer: int = _libc.syscall(self._call, operation, flags, argument)
        return answer

    def _send(self, kind: bytes, descriptors: list[int]) -> None:
        import _socket

        host = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, self.fd)
        try:
            packed = b"".join(one.to_bytes(4, "little") for one in descriptors)
            rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed)] if descriptors else []
            host.sendmsg([kind], rights, _MSG_NOSIGNAL)  # with which we ourselves aren't asked about it
        finally:
            host.detach()  # or it would be closed with this object


def is_known() -> bool:
    """Whether this kernel asks about system calls, and about this machine's."""
    machine = _MACHINES.get(os.uname().machine)
    if machine is None:
        return False
    action = ctypes.c_uint32(_NOTIFY)
    return bool(_libc.syscall(machine[0], _GET_ACTION_AVAIL, 0, ctypes.byref(action)) == 0)
