"""PID 1 of the sandbox around gVisor: it hands out that one's sockets, and starts and watches `runsc`.

Theory of operation
===================

A socket of a program in gVisor is one of the host's kernel, made by gVisor in the network of the sandbox around it. So
guest listeners, socket broker and supervised connections are here what they are without gVisor, but the sockets can't
be handed out from within. That's done here, out of programs' reach.

*The connect filter* can be put on `runsc` only before it starts, and stays for as long as the sandbox lives. So the
kernel notifies of connects before the first run, and whether a run has the internet or not. Until the host wants the
notification descriptor, which is when the first run with internet begins, each notification is answered here, and
always the same: continue. There is nothing but loopback to connect to.

Arguments: the control socket's descriptor, the guest listeners' ports with commas between them, and the command.
"""

from __future__ import annotations

import fcntl
import os
import select
import sys

import connect_filter
import socket_broker

NOTIF_RECV, NOTIF_SEND, NOTIF_BYTES = 0xC0502100, 0xC0182101, 80
CONTINUE = bytes(12) + (1).to_bytes(4, sys.byteorder)  # of struct seccomp_notif_resp, what follows the id

IGNORED = 13, 25  # SIGPIPE and SIGXFSZ: Python ignores them, and would pass that on


def main() -> None:
    control, ports, *command = sys.argv[1:]
    can_supervise = connect_filter.is_available()
    broker = socket_broker.hand_over(
        int(control), [int(port) for port in ports.split(",")], can_supervise=can_supervise
    )
    notify_fd = connect_filter.install(gvisor=True) if can_supervise else -1
    try:
        pid = os.posix_spawn(command[0], command, os.environ, setsigdef=IGNORED)
    except OSError as problem:
        sys.exit(f"{command[0]} can't be started: {problem.strerror}")
    os.close(int(control))
    runsc = os.pidfd_open(pid)
    poller = select.poll()
    for fd in (broker.fd, runsc, notify_fd):
        if fd >= 0:
            poller.register(fd, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poller.poll()}
        if runsc in ready:
            os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
        if broker.fd in ready:
            kind = broker.answer()
            if not kind:
                poller.unregister(broker.fd)
            elif kind == b"L" and notify_fd >= 0:
                poller.unregister(notify_fd)
                broker.send(b"L", [notify_fd])
                os.close(notify_fd)
                notify_fd = -1
        elif notify_fd in ready:
            continue_syscall(notify_fd)


def continue_syscall(notify_fd: int) -> None:
    """Let the kernel carry out the call that it notifies of next."""
    notification = bytearray(NOTIF_BYTES)
    try:
        fcntl.ioctl(notify_fd, NOTIF_RECV, notification)
        fcntl.ioctl(notify_fd, NOTIF_SEND, bytes(notification[:8]) + CONTINUE)
    except OSError:
        pass  # the thread is dead


if __name__ == "__main__":
    main()
