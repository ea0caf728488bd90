"""System calls against the kernel itself, and Landlock. Each attack fails on a sound sandbox and succeeds on one
without that wall."""

from __future__ import annotations

import ctypes
import json
import platform
from collections.abc import Iterator
from errno import EAFNOSUPPORT, ENOSYS, EPERM
from pathlib import Path

import pytest

from tests.drivers.boxes import Boxes, Weakness
from tests.drivers.test_seccomp import number_of

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers and machine code are those of x86_64")


@pytest.fixture(scope="module")
def unfiltered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boxes]:
    made = Boxes(tmp_path_factory.mktemp("unfiltered"), Weakness(unfiltered=True))
    yield made
    made.stop()


# -- calls that the filter refuses, and what the kernel would make of them ------------------------------------------

# A call that reaches the kernel is one that it serves or whose arguments it finds fault with. Each is made by a process
# of its own. What only a capability opens isn't here: an unfiltered kernel refuses it in the same words.
CALLS = {
    "io_uring_setup": "1, buffer",
    "io_uring_enter": "-1, 0, 0, 0, 0, 0",
    "io_uring_register": "-1, 0, 0, 0",
    "bpf": "99, 0, 5000",
    "userfaultfd": "1",
    "perf_event_open": "software_clock, 0, -1, -1, 0",
    "add_key": "b'user', b'canary', b'x', 1, -3",
    "request_key": "b'user', b'canary', 0, 0",
    "keyctl": "0, -3, 1",
    "unshare": "0",
    "setns": "-1, 0",
    "mount": "1, 1, 0, 0, 0",
    "umount2": "b'/', 0x10000",
    "open_tree": "-100, b'/', 0x10",
    "fsconfig": "-1, 0, 0, 0, 0",
    "mount_setattr": "-100, b'/', 1, 0, 0",
    "ptrace": "0, 0, 0, 0",
    "process_vm_readv": "os.getpid(), vector, 1, vector, 1, 0",
    "process_vm_writev": "os.getpid(), vector, 1, vector, 1, 0",
    "kcmp": "os.getpid(), os.getpid(), 1, 0, 0",
    "pidfd_getfd": "os.pidfd_open(os.getpid()), 0, 0",
    "name_to_handle_at": "-100, b'/', buffer, buffer, 0",
    "fanotify_init": "0x200, 0",
    "fanotify_mark": "-1, 0, 0, 0, 0",
    "modify_ldt": "0, buffer, 0",
    "iopl": "0",
    "ioperm": "0, 0, 0",
    "quotactl": "255, 0, 0, 0",
    "quotactl_fd": "-1, 0, 0, 0",
    "clock_settime": "99, buffer",
    "settimeofday": "1, 0",
    "adjtimex": "buffer",
    "clock_adjtime": "99, buffer",
    "mbind": "0, 0, 99, 0, 0, 0",
    "set_mempolicy": "99, 0, 0",
    "get_mempolicy": "0, 0, 0, 0, 0",
    "move_pages": "0, 0, 0, 0, 0, 0",
    "clone3": "new_user_namespace, 88",
    "clone": "0x10000011, 0, 0, 0, 0",
    "personality": "0x40000",
    "prlimit64": "os.getppid(), 7, 0, buffer",
    "socket": "40, 1, 0",
    "socketpair": "40, 1, 0, buffer",
    "ioctl": "99, 0x5412, b'x'",
}
MORE = {  # calls that are let through with other arguments
    "TIOCLINUX": ("ioctl", "99, 0x541c, buffer"),
    "TIOCSTI with a bit that the kernel ignores": ("ioctl", "99, 1 << 32 | 0x5412, b'x'"),
    "generic netlink": ("socket", "16, 3, 16"),
    "SCTP": ("socket", "2, 1, 132"),
    "chmod of set-user-id": ("chmod", "file, 0o4755"),
    "fchmodat of set-group-id": ("fchmodat", "-100, file, 0o2755"),
    "creat of set-user-id": ("creat", "b'/workspace/made', 0o4755"),
    "mknod of a device": ("mknod", "b'/workspace/null', 0o20666, 0x103"),
}
ATTEMPTS = {**{name: (name, arguments) for name, arguments in CALLS.items()}, **MORE}

MAKES_CALLS = """
import ctypes, json, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
buffer = ctypes.create_string_buffer(4096)
vector = struct.pack('PP', ctypes.addressof(buffer), 8)
software_clock = struct.pack('IIQQQQQ', 1, 112, 1, 0, 0, 0, 0x61) + bytes(64)
new_user_namespace = struct.pack('8Q', 0x10000000, 0, 0, 0, 17, 0, 0, 0) + bytes(24)
file = b'/workspace/file'
open(file, 'w').close()

def call(number, *arguments):
    as_long = [value if isinstance(value, bytes | ctypes.Array) else ctypes.c_long(value) for value in arguments]
    answer = libc.syscall(ctypes.c_long(number), *as_long)
    return 0 if answer >= 0 else ctypes.get_errno()

told = {}
ATTEMPTS = {
%s
}
for name, attempt in ATTEMPTS.items():
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, b'%%d' %% attempt())
        os._exit(0)
    os.close(write)
    told[name] = int(os.read(read, 10))
    os.close(read)
    os.waitpid(pid, 0)
print(json.dumps(told))
"""


def _answers(boxes: Boxes) -> dict[str, int]:
    """The errno of each attempt, 0 where it succeeded."""
    attempts = "\n".join(
        f"    {name!r}: lambda: call({number_of(call)}, {arguments}),"
        for name, (call, arguments) in ATTEMPTS.items()
        if number_of(call) >= 0
    )
    box = boxes.make()
    told = boxes.run(box, MAKES_CALLS % attempts)
    boxes.close(box)
    assert told.ended.exit_code == 0, told.stderr
    answers: dict[str, int] = json.loads(told.stdout)
    return answers


def _host_has_sockets(family: int, protocol: int) -> bool:
    libc = ctypes.CDLL(None)
    return bool(libc.socket(family, 1 if family != 16 else 3, protocol) >= 0)


def test_the_filter_answers_before_the_kernel_does(boxes: Boxes) -> None:
    answers = _answers(boxes)
    refused = {name for name, errno in answers.items() if errno in (EPERM, ENOSYS, EAFNOSUPPORT)}
    assert refused == set(answers) - {"SCTP"}
    assert answers["SCTP"] == 93  # EPROTONOSUPPORT


def test_without_the_filter_the_kernel_is_reached(unfiltered: Boxes) -> None:
    answers = _answers(unfiltered)
    unknown = {"SCTP", "iopl", "ioperm"}  # a kernel built without them answers in the same words
    if Path("/proc/sys/kernel/io_uring_disabled").read_text() != "0\n":
        unknown.add("io_uring_setup")
    if not _host_has_sockets(40, 0):
        unknown |= {"socket", "socketpair"}
    refused = {name for name, errno in answers.items() if errno in (EPERM, ENOSYS, EAFNOSUPPORT)}
    assert refused - unknown == set(), answers


# int 0x80 with getpid's number among 32-bit calls: push rbx; mov eax, 20; int 0x80; pop rbx; ret
CALLS_AS_32_BIT = """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex('53b814000000cd805bc3'))
run = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
print(run())
"""


def test_calls_of_32_bit_programs_are_not_there(boxes: Boxes, unfiltered: Boxes) -> None:
    assert boxes.run(boxes.make(), CALLS_AS_32_BIT).stdout == f"{-ENOSYS}\n"
    told = unfiltered.run(unfiltered.make(), CALLS_AS_32_BIT)
    if told.ended.exit_code == 139:
        pytest.skip("this kernel has no 32-bit calls to show the attack with")
    assert int(told.stdout) > 1
