"""PID 1 of gVisor's container: it divides that into two PID namespaces, one for runs and one for processes.

Theory of operation
===================

Nothing of the host's can enter a container of gVisor's as it enters a sandbox of bubblewrap's (namespace_entry.py): its
namespaces are the sentry's. So who makes them has to be inside from the start, and where the supervisor of runs can't
reach it: its `kill(-1)` at the end of a run kills all that is below it. So the container's first process is this one.
It forks the supervisor of runs into a PID namespace of its own, and that of processes, when the host wants it, into
another. Neither supervisor, and nothing that they start, sees the other's processes or this one.

For that it has two capabilities in the container, to make namespaces and to give up capabilities for good. Both
supervisors have given up all before they do anything else. From the host comes nothing but control sockets: it reads no
byte of a session's.

Wire format: bytes over a stream socket.

  host to guest:  S  with a descriptor, the control socket: start the supervisor of processes
                  K  kill it
  guest to host:  E  it has ended, and so has everything that it had started; or it can't be started
"""

from __future__ import annotations

import _socket  # not socket, which takes as long to import as all the rest
import os
import select
import signal

from namespace_entry import give_up_privileges, load, make_mounts_private, mount_proc, mount_terminals, receive

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    from typing import Any

CONTROL = 3


def divide(config: dict[str, Any]) -> dict[str, Any]:
    """Returns only in supervisors, each in a PID namespace of its own: its configuration. `config` is that of the
    supervisor of runs, with that of the other one (`second`), the descriptor of the socket for this one (`division`)
    and a filter of system calls for both (`filter`, hexadecimal)."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, config["division"])
    instructions = bytes.fromhex(config["filter"])
    runs = _fork_apart(instructions)
    if not runs:
        sock.close()
        return config
    os.close(config["control"])
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    poller = select.poll()
    poller.register(woken, select.POLLIN)
    poller.register(sock, select.POLLIN)
    processes = 0
    while True:
        ready = {fd for fd, _ in poller.poll()}
        if sock.fileno() in ready:
            message, fds = receive(sock, 1)
            if not message:
                poller.unregister(sock)  # the host is about to end all
            elif message == b"K" and processes:
                os.kill(processes, signal.SIGKILL)
            elif message == b"S" and fds:
                try:
                    processes = _fork_apart(instructions)
                except OSError:  # a run has taken all processes that there may be, and goes on
                    os.close(fds[0])
                    sock.send(b"E")
                    continue
                if not processes:
                    os.dup2(fds[0], CONTROL)
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    sock.close()
                    second: dict[str, Any] = config["second"]
                    return {**second, "control": CONTROL}
                os.close(fds[0])
        if woken in ready:
            os.read(woken, 1 << 12)
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)  # there is always the supervisor of runs
            if pid and os.WIFSTOPPED(status):
                os.kill(pid, signal.SIGKILL)  # a program has stopped its supervisor, which can end no run now
            elif pid == runs:
                os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
            elif not pid:
                break
            elif pid == processes:
                processes = 0
                sock.send(b"E")


def _fork_apart(instructions: bytes) -> int:
    """Fork a PID 1 of a new PID namespace, with mounts of its own, without any capability, under a filter of system
    calls (`instructions`). Returns its pid, 0 there. Raises OSError."""
    told, tell = os.pipe2(os.O_CLOEXEC)
    try:
        middle = os.fork()
    except OSError:
        os.close(told)
        os.close(tell)
        raise
    if not middle:
        try:
            os.unshare(os.CLONE_NEWPID | os.CLONE_NEWNS)
            pid = os.fork()
            if pid:
                os.write(tell, b"%d" % pid)
                os._exit(0)
            make_mounts_private()
            mount_proc([])
            mount_terminals(None)  # they are gVisor's own, of which it has enough
            give_up_privileges()
            load([instructions])
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(70)
        os.close(told)
        os.close(tell)
        return 0
    os.close(tell)
    pid = int(os.read(told, 16) or b"0")
    os.close(told)
    os.waitpid(middle, 0)
    if not pid:
        raise OSError("there can be no namespace for a supervisor")
    return pid
