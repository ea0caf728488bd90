"""The filter of system calls (seccomp(2)) for everything in a sandbox, the supervisor included.

Theory of operation
===================

Three filters are made when a driver starts, two of them by libseccomp, and the kernel lets a call through only if all
do.

*Which calls.* An allowlist. Calls that are refused on purpose fail with EPERM. All others, known today or not, fail
with ENOSYS as on a kernel that lacks them, so that programs fall back to an older call. `clone3` and `openat2` are
among these: their arguments are in memory, which no filter can read.

*Which arguments.* Some calls are useful in most uses and harmful in one: that use is refused. It's a filter of its own
because it is a denylist, while the first is an allowlist. The kernel takes an `int` from the low half of a register and
ignores the high half. So must the filter, or a bit set there would hide the value.

*The native ABI only.* Calls of 32-bit programs and of x32 have other numbers; all of them fail with ENOSYS.

*Cost.* The kernel knows which calls pass whatever their arguments are, and doesn't run the filters for these. The
others run through compiled code that finds a number in a binary tree.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import struct
import sys
from collections.abc import Callable, Sequence
from errno import EAFNOSUPPORT, EINVAL, ENOSYS, EOPNOTSUPP, EPERM, EPROTONOSUPPORT

from era.drivers import guest
from era.errors import NoIsolation

_LIBRARY = "libseccomp.so.2"
_NAMES = re.compile(r"\w+")

ALLOWED = _NAMES.findall("""
    read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 sendfile splice tee copy_file_range
    open openat creat close close_range dup dup2 dup3 fcntl flock lseek pipe pipe2 ioctl
    stat fstat lstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat getdents getdents64
    truncate ftruncate fallocate fadvise64 readahead fsync fdatasync sync syncfs sync_file_range cachestat
    mkdir mkdirat rmdir mknod mknodat link linkat symlink symlinkat unlink unlinkat rename renameat renameat2
    chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat umask chdir fchdir getcwd
    utime utimes futimesat utimensat
    getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr
    setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr
    inotify_init inotify_init1 inotify_add_watch inotify_rm_watch

    mmap munmap mprotect mremap brk madvise mincore msync mlock mlock2 munlock mlockall munlockall mseal memfd_create
    remap_file_pages pkey_alloc pkey_free pkey_mprotect map_shadow_stack membarrier

    clone fork vfork execve execveat exit exit_group wait4 waitid pidfd_open pidfd_send_signal
    getpid getppid gettid getpgrp getpgid setpgid getsid setsid set_tid_address restart_syscall
    getuid geteuid getgid getegid getgroups getresuid getresgid setuid setgid setreuid setregid setresuid setresgid
    setgroups setfsuid setfsgid capget capset
    prctl arch_prctl personality seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self
    futex futex_wait futex_wake futex_waitv futex_requeue set_robust_list get_robust_list rseq
    sched_yield sched_getaffinity sched_setaffinity sched_getparam sched_setparam sched_getscheduler sched_setscheduler
    sched_getattr sched_setattr sched_get_priority_max sched_get_priority_min sched_rr_get_interval
    getpriority setpriority ioprio_get ioprio_set getcpu
    getrlimit setrlimit prlimit64 getrusage times sysinfo uname getrandom

    rt_sigaction rt_sigprocmask rt_sigpending rt_sigtimedwait rt_sigsuspend rt_sigreturn rt_sigqueueinfo
    rt_tgsigqueueinfo sigaltstack kill tkill tgkill pause alarm signalfd signalfd4
    nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time getitimer setitimer
    timer_create timer_settime timer_gettime timer_getoverrun timer_delete
    timerfd_create timerfd_settime timerfd_gettime eventfd eventfd2

    poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2
    socket socketpair bind listen accept accept4 connect shutdown getsockname getpeername getsockopt setsockopt
    sendto recvfrom sendmsg recvmsg sendmmsg recvmmsg
    shmget shmat shmdt shmctl semget semop semtimedop semctl msgget msgsnd msgrcv msgctl
""")

REFUSED = _NAMES.findall("""
    io_uring_setup io_uring_enter io_uring_register bpf userfaultfd perf_event_open
    add_key request_key keyctl
    unshare setns chroot pivot_root mount umount2 fsopen fsconfig fspick fsmount move_mount open_tree mount_setattr
    ptrace process_vm_readv process_vm_writev process_madvise kcmp pidfd_getfd
    name_to_handle_at open_by_handle_at lookup_dcookie fanotify_init fanotify_mark
    kexec_load kexec_file_load init_module finit_module delete_module create_module query_module get_kernel_syms
    reboot swapon swapoff quotactl quotactl_fd acct syslog vhangup nfsservctl _sysctl sethostname setdomainname
    iopl ioperm modify_ldt
    clock_settime clock_adjtime settimeofday adjtimex
    mbind set_mempolicy get_mempolicy migrate_pages move_pages
""")

type Condition = tuple[int, int, int, int]
"""The index of an argument, the comparison, and the two values to compare with, as in libseccomp's
`struct scmp_arg_cmp`."""

_NOT_EQUAL, _ABOVE, _MASKED_EQUAL = 1, 6, 7
_INT = 0xFFFFFFFF


def _is(argument: int, value: int) -> Condition:
    """The argument, an `int`, equals `value`."""
    return argument, _MASKED_EQUAL, _INT, value


def _has(argument: int, bit: int) -> Condition:
    """The argument has this bit set."""
    return argument, _MASKED_EQUAL, bit, bit


def _is_not(argument: int, value: int) -> Condition:
    """The argument differs from `value`, in either half. (If only in the high half, the call is refused needlessly.)"""
    return argument, _NOT_EQUAL, value, 0


def _is_above(argument: int, value: int) -> Condition:
    """The argument is larger than `value`, as 64 bits: any bit in the high half makes it so."""
    return argument, _ABOVE, value, 0


_NEW_NAMESPACES = (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_ALLOCATES_NOTHING = 0x02 | 0x08 | 0x20  # fallocate(2) that makes a hole, or takes or puts one in
_RESERVE = (
    *(0x40305828, 0x4030582A, 0x40305839, 0x4030580A, 0x4030580B, 0x40305824, 0x40305825),
    0x401C5820,
)
"""ioctls that are fallocate by another name, four of them XFS's only; by the last, XFS takes room ahead of writes."""

_SUBVOLUMES = (0x50009401, 0x5000940E, 0x50009417, 0x50009418, 0x4008941A)
"""ioctls that make subvolumes and snapshots of btrfs, and change them. To others these are file systems of their own:
what is in one isn't measured, and it isn't removed as a directory is. A snapshot has all files of the volume."""

_UNTOLD = (0xC028660F, 0xC0C0586D, 0x40285881, 0x40585883, 0xC020F509, 0x4018F514, 0xF501, 0xF503, 0xF519)
"""ioctls that change what is in files, or take a change back, and may leave their times as they were, by which a scan
(core/trees/trees.py) finds changes: MOVE_EXT of ext4; SWAPEXT, EXCHANGE_RANGE and COMMIT_RANGE of XFS; MOVE_RANGE of
F2FS, SEC_TRIM_FILE, which erases blocks of a file, and what begins its atomic and volatile writes."""

_LOADING = (0x5423, 0x8940, 0x8941, 0x8982, 0x8983, 0x89A0, 0x89A1)
"""ioctls for which the kernel loads a module before it asks for a capability: line disciplines, VLANs, bridges."""

_SCHED_CORE = 62  # by prctl(2): nobody else's threads run beside one's own on a core, whatever processors one has
_WHITEOUT = 4  # by renameat2(2): it leaves a device file
_UNIX, _INET, _INET6, _NETLINK = 1, 2, 10, 16
_ROUTE = 0  # the protocol of AF_NETLINK by which programs list their interfaces
_LOADED_PROTOCOLS = (33, 115, 132, 136, 256)  # DCCP, L2TP, SCTP, UDP-Lite, SMC: asking for one loads a kernel module
_S_IFMT, _DEVICES = 0o170000, (0o020000, 0o060000)
_SET_ID = (0o4000, 0o2000)
_TAKE_MODE = (
    ("chmod", 1),
    ("fchmod", 1),
    ("fchmodat", 2),
    ("fchmodat2", 2),
    ("mknod", 1),
    ("mknodat", 2),
    ("creat", 1),
)
_CREATING = (0o100, 0o20000000)  # O_CREAT, O_TMPFILE
_SUPERVISOR = 1
"""Its pid. How it is scheduled is inherited by all later runs."""

_SCHEDULING = ("sched_setaffinity", "sched_setattr", "sched_setparam", "sched_setscheduler")
_PRIORITY = (("setpriority", 0), ("ioprio_set", 1))
"""With the first argument that means one process. Others mean a group or a user, whose the supervisor is, too."""

_PERSONALITIES = (0, 0x8, 0x20000, 0x20008, _INT)  # Linux, its 32-bit uname, its version 2.6 uname; which one is it?

type Rule = tuple[str, int, tuple[Condition, ...]]
"""A call, the errno that it fails with, and the conditions for that, all of which have to hold."""

NO_ALLOCATION: list[Rule] = [
    ("fallocate", EOPNOTSUPP, ((1, _MASKED_EQUAL, _ALLOCATES_NOTHING, 0),)),
    *(("ioctl", EOPNOTSUPP, (_is(1, request),)) for request in _RESERVE),
]
"""It takes a moment, however much of the disk it takes: more than is seen in time (core/trees/allowance.py), and behind
the ends of files, where it isn't seen. The C library writes zeros instead."""

NO_SET_ID: list[Rule] = [
    *((call, EPERM, (_has(argument, bit),)) for call, argument in _TAKE_MODE for bit in _SET_ID),
    *(
        (call, EPERM, (_has(argument - 1, creating), _has(argument, bit)))
        for call, argument in (("open", 2), ("openat", 3))
        for creating in _CREATING  # without it there is no mode, and its register holds anything
        for bit in _SET_ID
    ),
]
"""No file gets set-user-id or set-group-id. The working directory is on the host's disk, where such a file would run as
the sandbox's user."""

_NO_FOREIGN_LIMITS: Rule = ("prlimit64", EPERM, (_is_not(0, 0),))
"""No limits (getrlimit(2)) of other processes: later runs inherit those of PID 1."""

INSIDE_GVISOR: list[Rule] = [
    *NO_SET_ID,
    _NO_FOREIGN_LIMITS,
    *((call, ENOSYS, ()) for call in ("mq_open", "mq_unlink")),
]
"""System calls that gVisor refuses to its programs. Set-id modes are among them: where gVisor's gofer may not set a
mode, gVisor reports success. POSIX message queues would stay after a run: gVisor has no list of them by which a
supervisor could remove them. Sandboxes of bubblewrap have none either (`ALLOWED`)."""

RULES: list[Rule] = [
    *NO_ALLOCATION,
    *(("clone", EPERM, (_has(0, flag),)) for flag in _NEW_NAMESPACES),
    *(("ioctl", EPERM, (_is(1, request),)) for request in (_TIOCSTI, _TIOCLINUX, *_SUBVOLUMES, *_LOADING)),
    *(("ioctl", EOPNOTSUPP, (_is(1, request),)) for request in _UNTOLD),
    ("prctl", EINVAL, (_is(0, _SCHED_CORE),)),
    ("renameat2", EPERM, (_has(4, _WHITEOUT),)),
    _NO_FOREIGN_LIMITS,
    *((call, EPERM, (_is(0, _SUPERVISOR),)) for call in _SCHEDULING),
    *((call, EPERM, (_is(0, process), _is(1, _SUPERVISOR))) for call, process in _PRIORITY),
    *((call, EPERM, (_is_not(0, process),)) for call, process in _PRIORITY),
    *(
        (call, EAFNOSUPPORT, condition)
        for call in ("socket", "socketpair")
        for condition in (
            *((_is(0, family),) for family in range(_NETLINK) if family not in (_UNIX, _INET, _INET6)),
            (_is_above(0, _NETLINK),),
            (_is(0, _NETLINK), _is_not(2, _ROUTE)),
        )
    ),
    *(("socket", EPROTONOSUPPORT, (_is(2, protocol),)) for protocol in _LOADED_PROTOCOLS),
    *(
        (call, EPERM, ((argument, _MASKED_EQUAL, _S_IFMT, kind),))
        for call, argument in (("mknod", 1), ("mknodat", 2))
        for kind in _DEVICES
    ),
    *NO_SET_ID,
]

_TAKE_OWNER = (("chown", 1), ("lchown", 1), ("fchown", 1), ("fchownat", 2))
"""Calls that give a file an owner, and the index of that argument; the group follows it."""

_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # instructions of BPF
_ARGUMENTS = 16  # their offset in struct seccomp_data
_ALLOW = 0x7FFF0000
_ACT_BADARCH, _CTL_OPTIMIZE = 2, 8
_BINARY_TREE = 2


def _errno(number: int) -> int:
    """The action that fails a call with this errno (SECCOMP_RET_ERRNO)."""
    return 0x00050000 | number


class _Comparison(ctypes.Structure):
    """libseccomp's `struct scmp_arg_cmp`."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


class _Builder:
    """Builds one filter with libseccomp. Its methods raise OSError."""

    def __init__(self, library: ctypes.CDLL, default: int) -> None:
        """`default` is the action for calls without a rule. Raises OSError."""
        self._library = library
        self._context = library.seccomp_init(default)
        if not self._context:
            raise OSError("seccomp_init failed")
        self._check(library.seccomp_attr_set(self._context, _ACT_BADARCH, _errno(ENOSYS)))
        library.seccomp_attr_set(self._context, _CTL_OPTIMIZE, _BINARY_TREE)  # an old library only does it slower

    def add(self, call: str, action: int, conditions: tuple[Condition, ...] = ()) -> None:
        """Add a rule. A call that this machine lacks, or the library doesn't know, gets the default action."""
        number = self._library.seccomp_syscall_resolve_name(call.encode())
        if number >= 0:
            array = (_Comparison * len(conditions))(*(_Comparison(*condition) for condition in conditions))
            self._check(self._library.seccomp_rule_add_array(self._context, action, number, len(conditions), array))

    def compiled(self) -> bytes:
        """The filter as BPF instructions, each a `struct sock_filter`."""
        with open(os.memfd_create("era-seccomp"), "rb") as file:
            self._check(self._library.seccomp_export_bpf(self._context, file.fileno()))
            file.seek(0)
            return file.read()

    def release(self) -> None:
        self._library.seccomp_release(self._context)

    @staticmethod
    def _check(result: int) -> None:
        """Raise the OSError that a function of libseccomp returns as a negative errno."""
        if result < 0:
            raise OSError(-result, os.strerror(-result))


def filters() -> tuple[bytes, ...]:
    """The filters of owners, of arguments and of calls, for the kernel to load in this order. Raises NoIsolation."""
    return _made(lambda library: (_owners(library), _arguments(library, RULES), _calls(library)))


def outer_filters() -> tuple[bytes, ...]:
    """The filter for a sandbox in which another kernel answers the calls of programs, and makes its own for them.
    Raises NoIsolation."""
    return _made(lambda library: (_arguments(library, [*NO_ALLOCATION, *NO_SET_ID]),))


@functools.cache
def filter_inside_gvisor() -> bytes:
    """Compile, once, the filter that gVisor applies to its programs. Raises NoIsolation."""
    return _made(lambda library: (_arguments(library, INSIDE_GVISOR),))[0]


def _made(make: Callable[[ctypes.CDLL], tuple[bytes, ...]]) -> tuple[bytes, ...]:
    """What `make` makes with libseccomp. Raises NoIsolation."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise NoIsolation(
            f"System calls can't be filtered: there is no {_LIBRARY}.",
            hint="Install libseccomp: `apt-get install libseccomp2` (Debian, Ubuntu), "
            "`dnf install libseccomp` (Fedora), `apk add libseccomp` (Alpine).",
        ) from error
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_release.argtypes = (ctypes.c_void_p,)
    library.seccomp_attr_set.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32)
    library.seccomp_rule_add_array.argtypes = (
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.POINTER(_Comparison),
    )
    library.seccomp_export_bpf.argtypes = (ctypes.c_void_p, ctypes.c_int)
    try:
        return make(library)
    except OSError as error:
        raise NoIsolation(
            f"libseccomp can't make the filter of system calls: {error}.", hint="Install libseccomp 2.5 or newer."
        ) from error


def _owners(library: ctypes.CDLL) -> bytes:
    """The filter that lets a file be given to nobody else.

    Others don't exist in a sandbox's user namespace. The kernel says so, by EINVAL, and programs that expect to be
    forbidden this, by EPERM, don't know what to do then. libseccomp compares an argument once in a rule: it can't say
    "neither this nor that", so the instructions are written here.
    """
    low = 0 if sys.byteorder == "little" else 4  # of an argument's two halves
    program = []
    for call, owner in _TAKE_OWNER:
        number = library.seccomp_syscall_resolve_name(call.encode())
        program += [
            (_LOAD, 0, 0, 0),  # the call's number
            (_JUMP_IF_EQUAL, 0, 8, number & _INT),
            (_LOAD, 0, 0, _ARGUMENTS + 8 * owner + low),
            (_JUMP_IF_EQUAL, 1, 0, guest.UID),
            (_JUMP_IF_EQUAL, 0, 4, _INT),  # -1: it stays as it is
            (_LOAD, 0, 0, _ARGUMENTS + 8 * (owner + 1) + low),
            (_JUMP_IF_EQUAL, 1, 0, guest.UID),
            (_JUMP_IF_EQUAL, 0, 1, _INT),
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, _errno(EPERM)),
        ]
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _arguments(library: ctypes.CDLL, rules: Sequence[Rule]) -> bytes:
    """The filter that refuses harmful arguments."""
    builder = _Builder(library, _ALLOW)
    try:
        for call, number, conditions in rules:
            builder.add(call, _errno(number), conditions)
        return builder.compiled()
    finally:
        builder.release()


def _calls(library: ctypes.CDLL) -> bytes:
    """The filter that allows the calls of ALLOWED."""
    builder = _Builder(library, _errno(ENOSYS))
    try:
        for call in ALLOWED:
            if call != "personality":
                builder.add(call, _ALLOW)
        for value in _PERSONALITIES:
            builder.add("personality", _ALLOW, (_is(0, value),))
        for call in REFUSED:
            builder.add(call, _errno(EPERM))
        return builder.compiled()
    finally:
        builder.release()
