"""The template: an interpreter that has loaded all that a supervisor needs, and of which supervisors are forked.

Theory of operation
===================

*What it saves.* Starting Python and importing costs more than all the rest of making a sandbox. A fork of a process
that has done it costs a tenth, and shares its memory until either writes to it.

*Clean.* The template is started like any supervisor: with an empty environment, on the same read-only files, with a
configuration that says nothing about any session. What it is asked, it doesn't read: with each request comes a socket,
and only the child reads what stands there. So nothing of one sandbox is in its memory when the next is forked.

*Walls first.* bubblewrap makes a sandbox's namespaces and its mounts, with a process of the system's in there that does
nothing (`cat`). A child of the template enters them (namespace_entry.py says how), and puts up every other wall before
it becomes the supervisor, which has no descriptor of the template's. So what is in force at the first program is what
bubblewrap would have put into force. A test compares the two, line by line (tests/drivers/test_templates.py).

*Where there is none.* The supervisor of processes always moves into a sandbox that is there already. Where supervisors
aren't forked from a template, its place is taken by a process that has loaded nothing: this module as a program. What
enters a sandbox from there is a plain Python of the sandbox's, started once all walls are up but Landlock.

*Ending.* PID 1 is a child of the template, and dies with it; the template dies with the service. One that makes no more
supervisors ends with the last that it has made.
"""

from __future__ import annotations

import _socket  # not socket, which takes as long to import as all the rest
import json
import os
import resource
import signal
import sys

from namespace_entry import (
    PR_SET_CHILD_SUBREAPER,
    PR_SET_DUMPABLE,
    PR_SET_PDEATHSIG,
    become,
    control_process,
    enter_new,
    enter_used,
    give_up_privileges,
    has_ended,
    load,
    mount_proc,
    mount_terminals,
    receive,
    set_capabilities,
    wait_for_end,
)

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    from typing import Any

_MESSAGE_BYTES = 1 << 17
NAMESPACES = 5
"""So many are given for a sandbox that is in use: those of mounts, network, IPC, host name and users."""

_KEPT_CAPABILITIES = 1 << 5 | 1 << 6 | 1 << 7  # CAP_KILL, CAP_SETGID, CAP_SETUID


def serve(config: dict[str, Any]) -> dict[str, Any]:
    """Fork supervisors, as the service asks for them. Returns only in a process that is to be one: its configuration.
    `config` is the template's: descriptors of its socket (`template`) and of the `filters` of system calls."""
    filters = [_content(fd) for fd in config["filters"]]
    control_process(PR_SET_PDEATHSIG, signal.SIGKILL, "pdeathsig")
    control_process(PR_SET_CHILD_SUBREAPER, 1, "subreaper")
    control_process(PR_SET_DUMPABLE, 0, "dumpable")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    template = os.pidfd_open(os.getpid())
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, config["template"])
    sock.send(b"Y")
    while True:
        _, fds = receive(sock, 1)
        if not fds:
            _end()
        try:
            pid = os.fork()
        except OSError:  # no memory, or too many processes: whoever asks finds the socket closed, and others live on
            pid = -1
        if pid == 0:
            sock.close()
            return _become_supervisor(fds[0], template, filters)
        os.close(fds[0])


def _end() -> None:
    """The service wants no more supervisors: wait for the end of all that there are."""
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        os._exit(0)


def _become_supervisor(asking: int, template: int, filters: list[bytes]) -> dict[str, Any]:
    """Go into the sandbox that is described on the socket `asking`. Returns in its PID 1, with the supervisor's
    configuration. `template` is a pidfd."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, asking)
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        message, fds = receive(sock, _MESSAGE_BYTES)
        request = json.loads(message)
        control, log, *others = fds
        is_second = request["holder"] is None
        """Whether another supervisor is in there, and code of the session's."""

        entered = NAMESPACES if is_second else 1
        become(request["uid"], others[entered:])
        inner = enter_used(others[:entered]) if is_second else enter_new(request["holder"], others[0])
        parent = os.pidfd_open(os.getpid())
        os.unshare(os.CLONE_NEWPID)
        pid = os.fork()
        if pid:
            try:
                rights = os.pidfd_open(pid).to_bytes(4, sys.byteorder)
                sock.sendmsg([b"Y%d" % pid], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
            except BaseException:
                os.kill(pid, signal.SIGKILL)  # nobody would ever end it
                raise
            os._exit(0)
    except BaseException as problem:
        sock.send(b"E" + str(problem).encode())
        os._exit(70)
    sock.close()
    os.dup2(log, 2)
    mount_proc(request["read_only_proc"])
    mount_terminals()
    if inner >= 0:
        os.setns(inner, os.CLONE_NEWUSER)
    give_up_privileges()
    wait_for_end(parent)
    # From here on the template is our parent.
    control_process(PR_SET_PDEATHSIG, signal.SIGKILL, "pdeathsig")
    if has_ended(template):
        os._exit(0)
    os.setsid()
    os.chdir(request["workspace"])
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    descriptors = request["descriptors"]
    os.dup2(control, 3, inheritable=False)
    os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    load(filters)
    control_process(PR_SET_DUMPABLE, 1, "dumpable")  # or it couldn't look at itself; nobody else is here
    config: dict[str, Any] = request["config"]
    config = {**config, "control": 3}
    if command := request.get("command"):
        os.set_inheritable(3, True)
        variables: dict[str, str] = request["environment"]
        os.execve(command[0], command, {**variables, "ERA_GUEST": json.dumps(config)})
    return config


def _content(fd: int) -> bytes:
    """All that can be read from a descriptor, which is closed then."""
    content = b""
    while part := os.read(fd, 1 << 16):
        content += part
    os.close(fd)
    return content


if __name__ == "__main__":
    if os.geteuid() == 0:
        set_capabilities(_KEPT_CAPABILITIES)
    serve(json.loads(sys.argv[1]))
