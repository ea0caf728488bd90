"""PID 1 of the sandbox around gVisor: it hands out that one's sockets, and starts and watches `runsc`.

Theory of operation
===================

A socket of a program in gVisor is one of the host's kernel, made by gVisor in the network of the sandbox around it. So
guest listeners, broker and gate are here what they are without gVisor, but they can't be handed out from within. That's
done here, out of programs' reach.

*The filter of the gate* can be put on `runsc` only before it starts, and stays for as long as the sandbox lives. So the
kernel asks before the first run, and whether a run has the internet or not. Until the host wants to be asked, which is
when the first run with internet begins, the answer is given here, and always the same: go on. There is nothing but
loopback to connect to.

Arguments: the control socket's descriptor, the guest listeners' ports with commas between them, and the command.
"""

from __future__ import annotations

import fcntl
import os
import select
import sys

import connect_filter
import socket_broker

RECEIVE, ANSWER, QUESTION_BYTES = 0xC0502100, 0xC0182101, 80
GO_ON = bytes(12) + (1).to_bytes(4, sys.byteorder)

IGNORED = 13, 25  # SIGPIPE and SIGXFSZ: Python ignores them, and would pass that on


def main() -> None:
    control, ports, *command = sys.argv[1:]
    can_ask = connect_filter.is_known()
    ours = socket_broker.hand_over(int(control), [int(port) for port in ports.split(",")], gate=can_ask)
    listener = connect_filter.enter(gvisor=True) if can_ask else -1
    try:
        pid = os.posix_spawn(command[0], command, os.environ, setsigdef=IGNORED)
    except OSError as problem:
        sys.exit(f"{command[0]} can't be started: {problem.strerror}")
    os.close(int(control))
    end = os.pidfd_open(pid)
    poller = select.poll()
    for fd in (ours.fd, end, listener):
        if fd >= 0:
            poller.register(fd, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poller.poll()}
        if end in ready:
            os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
        if ours.fd in ready:
            asked = ours.answer()
            if not asked:
                poller.unregister(ours.fd)
            elif asked == b"L" and listener >= 0:
                poller.unregister(listener)
                ours.send(b"L", [listener])
                os.close(listener)
                listener = -1
        elif listener in ready:
            go_on(listener)


def go_on(listener: int) -> None:
    """Let the kernel do what it asks about."""
    question = bytearray(QUESTION_BYTES)
    try:
        fcntl.ioctl(listener, RECEIVE, question)
        fcntl.ioctl(listener, ANSWER, bytes(question[:8]) + GO_ON)
    except OSError:
        pass  # whoever asked is dead


if __name__ == "__main__":
    main()
