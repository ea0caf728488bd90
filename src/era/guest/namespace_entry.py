"""Entering a sandbox's namespaces from outside, and giving up for good what that takes.

Theory of operation
===================

bubblewrap makes a sandbox's namespaces and mounts. A process of the service's own goes there in two steps, for each of
the two supervisors that a sandbox can have:

  The first child moves itself into the control group, becomes the sandbox's uid, enters the user namespace that owns
  the others (as its owner it has every capability there), then those others, and forks into a new PID namespace.
  The second child is PID 1 of that. It mounts the /proc of its PID namespace over the one that is there, enters the
  inner user namespace, from which no further ones can be made, and gives up every capability, may gain no privileges
  any more, and loads the filters of system calls. Only then it becomes a supervisor, which puts Landlock on itself.

*With hostile code around.* When the supervisor of runs moves in, no code of a session's has ever been in there. When
that of processes does (process_supervisor.py), programs may be running that know of it and would like to have its
capabilities, which are those over their own sandbox: to mount, and so to uncover what is read-only. What they can do
about it:

- Nothing by its pid. It is in the PID namespace of whoever started it, then PID 1 of a new one. No process of the
  session's is in either, and neither has a /proc that one can see. Signals, ptrace, pidfds and /proc/PID need a pid.
- Nothing by its memory or descriptors. It shares none, and opens no sockets, no shared memory, no System V objects,
  though it is in the namespaces of these.
- Nothing by paths. While it has capabilities it opens and mounts on `/proc`, `/dev/pts` and what is below the /proc
  that it has just mounted, by their absolute names. They lie in the root, a read-only tmpfs, and in /dev, another;
  programs have no capability to mount, so they can't have put anything there. It never looks into the working
  directory, /tmp, /dev/shm or packages of the session's, nor imports or executes anything of there.
- Its mounts are its own: it has a copy of the mount namespace, private, so nothing that it mounts reaches programs.
- Nothing by its control group: it can be killed for want of memory, or be refused a fork. Then the service gets an
  error and no supervisor. (Programs are killed before it: oom_score_adj.)
"""

from __future__ import annotations

import _socket  # not socket, which takes as long to import as all the rest
import ctypes
import errno
import fcntl
import os
import select
import sys

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36
_PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 22, 24, 38, 47
_AMBIENT_CLEAR_ALL, _SECCOMP_MODE_FILTER = 4, 2
_CAPABILITY_VERSION_3 = 0x20080522

_ENTERED = os.CLONE_NEWNS | os.CLONE_NEWNET | os.CLONE_NEWIPC | os.CLONE_NEWUTS
_OWNER = 0xB701  # NS_GET_USERNS: the user namespace that owns a namespace

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC = 1, 2, 4, 8, 0x20, 0x1000, 0x4000
_MS_PRIVATE = 1 << 18

TERMINALS = 128
"""Of a session's runs at a time, and of its processes; the machine has 3,072 for all together."""

_MOST_DESCRIPTORS = 16

_libc = ctypes.CDLL(None, use_errno=True)


class _Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.c_char_p))


class _CapabilityHeader(ctypes.Structure):
    """struct __user_cap_header_struct."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def become(uid: int | None, groups: list[int]) -> None:
    """Enter these control groups, and become the sandbox's uid where that isn't ours. Raises OSError."""
    for group in groups:
        os.write(group, b"0")
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def enter_new(pid: int, pidfd: int) -> int:
    """Enter the namespaces of a process in which no code of a session's has run, but for the inner one of users.
    Returns a descriptor of that, -1 where there is none. Raises OSError."""
    mounts, inner = (os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY) for name in ("mnt", "user"))
    owner = fcntl.ioctl(mounts, _OWNER)
    if has_ended(pidfd):
        raise OSError("the process that holds the namespaces has ended")  # and another one may have its pid
    os.setns(owner, os.CLONE_NEWUSER)
    os.setns(pidfd, _ENTERED)
    os.unshare(os.CLONE_NEWCGROUP)  # it has for its root where its maker is
    return -1 if os.path.sameopenfile(owner, inner) else inner


def enter_used(namespaces: list[int]) -> int:
    """Enter a sandbox's namespaces, given those of mounts, network, IPC, host name and users, but for the last. That of
    mounts is copied: what is mounted from here on nobody else sees. Returns as `enter_new` does. Raises OSError."""
    mounts, *others, inner = namespaces
    owner = fcntl.ioctl(mounts, _OWNER)
    os.setns(owner, os.CLONE_NEWUSER)
    for namespace in (mounts, *others):
        os.setns(namespace)
    os.unshare(os.CLONE_NEWCGROUP | os.CLONE_NEWNS)
    make_mounts_private()
    return -1 if os.path.sameopenfile(owner, inner) else inner


def make_mounts_private() -> None:
    """Let nothing that is mounted from here on appear in other namespaces. Raises OSError."""
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)


def mount_proc(read_only: list[str]) -> None:
    """Mount the /proc of this PID namespace over the other one; `read_only` are names in there. Raises OSError."""
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _mount("proc", "/proc", "proc", flags)
    for path in (f"/proc/{name}" for name in read_only):
        if os.path.exists(path):
            _mount(path, path, None, _MS_BIND | _MS_REC)
            _mount(None, path, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | flags)


def mount_terminals(most: int | None = TERMINALS) -> None:
    """Mount a devpts of our own over the other one, so that nobody there can open a terminal of ours, and with so many
    terminals at most. Raises OSError."""
    options = "newinstance,ptmxmode=0666" + ("" if most is None else f",max={most}")
    _mount("devpts", "/dev/pts", "devpts", _MS_NOSUID | _MS_NOEXEC, options)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    source_, kind_, options_ = (None if text is None else text.encode() for text in (source, kind, options))
    _checked(_libc.mount(source_, target.encode(), kind_, ctypes.c_ulong(flags), options_), f"mount {target}")


def give_up_privileges() -> None:
    """Give up every capability, and the way to any. Raises OSError."""
    capability = 0
    while _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    if _libc.prctl(_PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL, 0, 0, 0) < 0 and ctypes.get_errno() != errno.EINVAL:
        raise OSError(ctypes.get_errno(), "ambient capabilities")  # gVisor may have none
    set_capabilities(0)
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def set_capabilities(mask: int) -> None:
    """Have these capabilities and no others, permitted and effective. Raises OSError."""
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    _checked(_libc.capset(ctypes.byref(header), data), "capset")


def load(filters: list[bytes]) -> None:
    """Load filters of system calls, in this order. Raises OSError."""
    for instructions in filters:
        program = _Filter(len(instructions) // 8, instructions)
        _checked(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0), "seccomp")


def control_process(option: int, value: int, what: str) -> None:
    """prctl(2) with one argument. Raises OSError."""
    _checked(_libc.prctl(option, value, 0, 0, 0), what)


def receive(sock: _socket.socket, size: int) -> tuple[bytes, list[int]]:
    """One message and its descriptors."""
    message, ancillary, _, _ = sock.recvmsg(size, _socket.CMSG_SPACE(4 * _MOST_DESCRIPTORS), _socket.MSG_CMSG_CLOEXEC)
    packed = b"".join(data for _, kind, data in ancillary if kind == _socket.SCM_RIGHTS)
    return message, [int.from_bytes(packed[at : at + 4], sys.byteorder) for at in range(0, len(packed), 4)]


def has_ended(pidfd: int, timeout: float = 0) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(timeout))


def wait_for_end(pidfd: int) -> None:
    while not has_ended(pidfd, 1000):
        pass


def _checked(answer: int, what: str) -> None:
    """Raise the OSError of a call that has failed."""
    if answer < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
