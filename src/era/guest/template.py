"""The template: an interpreter that has loaded all that a supervisor needs, and of which supervisors are forked.

Theory of operation
===================

*What it saves.* Starting Python and importing costs more than all the rest of making a sandbox. A fork of a process
that has done it costs a tenth, and shares its memory until either writes to it.

*Clean.* The template is started like any supervisor: with an empty environment, on the same read-only files, with a
configuration that says nothing about any session. What it is asked, it doesn't read: with each request comes a socket,
and only the child reads what stands there. So nothing of one sandbox is in its memory when the next is forked.

*Walls first.* bubblewrap makes a sandbox's namespaces and its mounts, with a process of the system's in there that does
nothing (`cat`), and no code of a session's has ever run in them. A child of the template goes there in two steps.

  The first child moves itself into the control group, becomes the sandbox's uid, enters the user namespace that owns
  the others (as its owner it has every capability there), then those others, and forks into a new PID namespace.
  The second child is PID 1 of that. It mounts the /proc of its PID namespace over that of bubblewrap's, read-only
  where bubblewrap had it so, enters the inner user namespace, from which no further ones can be made, and gives up
  every capability, may gain no privileges any more, and loads the filters of system calls. Only then it becomes the
  supervisor, which has no descriptor of the template's, and puts Landlock on itself.

So what is in force at the first program is what bubblewrap would have put into force. A test compares the two, line by
line (tests/drivers/test_templates.py).

*Ending.* PID 1 is a child of the template, and dies with it; the template dies with the service. One that makes no more
supervisors ends with the last that it has made.
"""

from __future__ import annotations

import _socket  # not socket, which takes as long to import as all the rest
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import sys

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    from typing import Any

_MESSAGE_BYTES, _MOST_DESCRIPTORS = 1 << 17, 16
_ENTERED = os.CLONE_NEWNS | os.CLONE_NEWNET | os.CLONE_NEWIPC | os.CLONE_NEWUTS
_OWNER = 0xB701  # NS_GET_USERNS: the user namespace that owns a namespace

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 4, 22, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 36, 38, 47
_AMBIENT_CLEAR_ALL, _SECCOMP_MODE_FILTER = 4, 2
_CAPABILITY_VERSION_3 = 0x20080522

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC = 1, 2, 4, 8, 0x20, 0x1000, 0x4000

_libc = ctypes.CDLL(None, use_errno=True)


class _Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.c_char_p))


class _CapabilityHeader(ctypes.Structure):
    """struct __user_cap_header_struct."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def serve(config: dict[str, Any]) -> dict[str, Any]:
    """Fork supervisors, as the service asks for them. Returns only in a process that is to be one: its configuration.
    `config` is the template's: descriptors of its socket (`template`) and of the `filters` of system calls."""
    filters = [_content(fd) for fd in config["filters"]]
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "pdeathsig")
    _checked(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "subreaper")
    _checked(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    template = os.pidfd_open(os.getpid())
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, config["template"])
    sock.send(b"Y")
    while True:
        _, fds = _receive(sock, 1)
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
        message, fds = _receive(sock, _MESSAGE_BYTES)
        request = json.loads(message)
        control, log, holder, *groups = fds
        inner = _enter_namespaces(request, holder, groups)
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
    _mount_proc(request["read_only_proc"])
    if inner >= 0:
        os.setns(inner, os.CLONE_NEWUSER)
    _give_up_privileges()
    _wait_for_end(parent)
    # From here on the template is our parent.
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "pdeathsig")
    if _has_ended(template):
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
    _load(filters)
    _checked(
        _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "dumpable"
    )  # or it couldn't look at itself; nobody else is here
    config: dict[str, Any] = request["config"]
    return {**config, "control": 3}


def _enter_namespaces(request: dict[str, Any], holder: int, groups: list[int]) -> int:
    """Enter the control groups, become the sandbox's uid, and enter its namespaces, but for the inner one of users.
    That of control groups is made here, since it has for its root where its maker is. Returns a descriptor of the inner
    user namespace, -1 where there is none. Raises OSError."""
    for group in groups:
        os.write(group, b"0")
    uid = request["uid"]
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    directory = f"/proc/{request['holder']}/ns"
    mounts, inner = (os.open(f"{directory}/{name}", os.O_RDONLY) for name in ("mnt", "user"))
    owner = fcntl.ioctl(mounts, _OWNER)
    if _has_ended(holder):
        raise OSError("the process that holds the namespaces has ended")  # and another one may have its pid
    os.setns(owner, os.CLONE_NEWUSER)
    os.setns(holder, _ENTERED)
    os.unshare(os.CLONE_NEWCGROUP)
    return -1 if os.path.sameopenfile(owner, inner) else inner


def _mount_proc(read_only: list[str]) -> None:
    """Mount the /proc of this PID namespace over the other one; `read_only` are names in there. Raises OSError."""
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _mount("proc", "/proc", "proc", flags)
    for path in (f"/proc/{name}" for name in read_only):
        if os.path.exists(path):
            _mount(path, path, None, _MS_BIND | _MS_REC)
            _mount(None, path, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | flags)


def _mount(source: str | None, target: str, kind: str | None, flags: int) -> None:
    source_, kind_ = (None if text is None else text.encode() for text in (source, kind))
    _checked(_libc.mount(source_, target.encode(), kind_, ctypes.c_ulong(flags), None), f"mount {target}")


def _give_up_privileges() -> None:
    """Give up every capability, and the way to any. Raises OSError."""
    capability = 0
    while _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    _checked(_libc.prctl(_PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL, 0, 0, 0), "ambient capabilities")
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    _checked(_libc.capset(ctypes.byref(header), (ctypes.c_uint32 * 6)()), "capset")
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def _load(filters: list[bytes]) -> None:
    """Load filters of system calls, in this order. Raises OSError."""
    for instructions in filters:
        program = _Filter(len(instructions) // 8, instructions)
        _checked(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0), "seccomp")


def _receive(sock: _socket.socket, size: int) -> tuple[bytes, list[int]]:
    """One message and its descriptors."""
    message, ancillary, _, _ = sock.recvmsg(size, _socket.CMSG_SPACE(4 * _MOST_DESCRIPTORS), _socket.MSG_CMSG_CLOEXEC)
    packed = b"".join(data for _, kind, data in ancillary if kind == _socket.SCM_RIGHTS)
    return message, [int.from_bytes(packed[at : at + 4], sys.byteorder) for at in range(0, len(packed), 4)]


def _content(fd: int) -> bytes:
    """All that can be read from a descriptor, which is closed then."""
    content = b""
    while part := os.read(fd, 1 << 16):
        content += part
    os.close(fd)
    return content


def _has_ended(pidfd: int, timeout: float = 0) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(timeout))


def _wait_for_end(pidfd: int) -> None:
    while not _has_ended(pidfd, 1000):
        pass


def _checked(answer: int, what: str) -> None:
    """Raise the OSError of a call that has failed."""
    if answer < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
