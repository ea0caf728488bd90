"""The filter of system calls, interpreted: its verdict on every call there could be. What a kernel makes of it is in
test_walls.py."""

from __future__ import annotations

import asyncio
import ctypes
import os
import platform
from collections.abc import Sequence
from errno import EAFNOSUPPORT, EINVAL, ENOSYS, EOPNOTSUPP, EPERM, EPROTONOSUPPORT
from pathlib import Path

import pytest

from era.drivers import seccomp
from era.drivers.bubblewrap import BubblewrapDriver
from era.errors import NoIsolation
from tests.drivers.bpf import verdict
from tests.drivers.sandboxes import LIMITS

NATIVE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[platform.machine()]
I386, ARM, X32 = 0x40000003, 0x40000028, 0x40000000
HIGH = 1 << 32
KEEP = 0xFFFFFFFF  # an owner that is to stay as it is
"""The lowest bit of a register that the kernel ignores where it takes an int."""

_library = ctypes.CDLL("libseccomp.so.2")
_library.seccomp_syscall_resolve_num_arch.restype = ctypes.c_char_p


def number_of(call: str) -> int:
    return int(_library.seccomp_syscall_resolve_name(call.encode()))


def name_of(number: int) -> str:
    name = _library.seccomp_syscall_resolve_num_arch(ctypes.c_uint32(NATIVE), number)
    return name.decode() if name else ""


@pytest.fixture(scope="module")
def filters() -> Sequence[bytes]:
    return seccomp.filters()


def test_no_call_stands_twice() -> None:
    names = seccomp.ALLOWED + seccomp.REFUSED
    assert sorted(names) == sorted(set(names))


def test_each_call_gets_its_answer(filters: Sequence[bytes]) -> None:
    """Every number of a call, and many that no call has."""
    answers = dict.fromkeys(seccomp.ALLOWED, 0) | dict.fromkeys(seccomp.REFUSED, EPERM)
    wrong = {}
    for number in [*range(1024), 5000, 0x3FFFFFFF]:
        name = name_of(number)
        # Those that no filter of arguments refuses.
        given = {"socket": (1,), "socketpair": (1,), "ioprio_set": (1,), "fallocate": (0, 3)}
        arguments = (0, *[KEEP] * 3) if "chown" in name else given.get(name, ())
        got = verdict(filters, number, arguments, NATIVE)
        if got != answers.get(name, ENOSYS):
            wrong[number, name] = got
    assert wrong == {}


@pytest.mark.parametrize("architecture", [I386, ARM, 0, 0xFFFFFFFF])
def test_calls_of_other_machines_are_not_there(filters: Sequence[bytes], architecture: int) -> None:
    assert {verdict(filters, number, (), architecture) for number in range(1024)} == {ENOSYS}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x32 is an ABI of x86_64")
def test_calls_of_x32_are_not_there(filters: Sequence[bytes]) -> None:
    assert {verdict(filters, X32 + number, (), NATIVE) for number in range(1024)} == {ENOSYS}


SIGCHLD, THREAD = 17, 0x3D0F00
TIOCSTI, TIOCLINUX, TCGETS = 0x5412, 0x541C, 0x5401
RESERVE = (0x40305828, 0x4030582A, 0x40305839)
RESERVE_IN_XFS = (0x4030580A, 0x4030580B, 0x40305824, 0x40305825, 0x401C5820)
UNTOLD = (0xC028660F, 0xC0C0586D, 0x40285881, 0x40585883, 0xC020F509, 0x4018F514, 0xF501, 0xF503, 0xF519)
SUBVOLUMES = (0x50009401, 0x5000940E, 0x50009417, 0x50009418, 0x4008941A)
LOADING = (0x5423, 0x8940, 0x8941, 0x8982, 0x8983, 0x89A0, 0x89A1)
CLONING_AND_FLAGS = (0x40049409, 0x4020940D, 0xC0189436, 0x801C581F, 0x40086602, 0x8912, 0x8913)
SOCKETS = ("socket", "socketpair")
SCHEDULE = ("sched_setaffinity", "sched_setattr", "sched_setparam", "sched_setscheduler")
MAKE_NODE = (("mknod", (0,)), ("mknodat", (0, 0)))
CHANGE_MODE = (("chmod", (0,)), ("fchmod", (0,)), ("fchmodat", (0, 0)), ("fchmodat2", (0, 0)), ("creat", (0,)))

# A call, its arguments, the errno that it gets.
ARGUMENTS = [
    ("clone", (SIGCHLD,), 0),
    ("clone", (THREAD,), 0),
    *(("clone", (SIGCHLD | flag,), EPERM) for flag in (1 << 17, *(1 << bit for bit in range(25, 31)))),
    ("clone", (HIGH | 1 << 28,), EPERM),
    ("ioctl", (0, TCGETS), 0),
    *(("ioctl", (0, TIOCSTI | high), EPERM) for high in (0, HIGH, 0xFFFFFFFF << 32)),
    *(("ioctl", (0, TIOCLINUX | high), EPERM) for high in (0, HIGH, 0xFFFFFFFF << 32)),
    *(("ioctl", (3, request | high), EPERM) for request in (*SUBVOLUMES, *LOADING) for high in (0, HIGH)),
    *(("ioctl", (3, request), 0) for request in CLONING_AND_FLAGS),
    *(("prctl", (option,), EINVAL if option & 0xFFFFFFFF == 62 else 0) for option in (4, 15, 22, 38, 62, HIGH | 62)),
    *(("renameat2", (3, 0, 3, 0, flags), EPERM if flags & 4 else 0) for flags in (0, 1, 2, 4, 5, HIGH | 4)),
    *(("fallocate", (3, mode), EOPNOTSUPP) for mode in (0, 0x1, 0x10, 0x11, 0x40, 0x41, HIGH, HIGH | 0x2 << 32)),
    *(("fallocate", (3, mode), 0) for mode in (0x3, 0x8, 0x20, HIGH | 0x3)),
    *(("ioctl", (3, high | request), EOPNOTSUPP) for request in RESERVE + RESERVE_IN_XFS for high in (0, HIGH)),
    *(("ioctl", (3, high | request), EOPNOTSUPP) for request in UNTOLD for high in (0, HIGH)),
    ("prlimit64", (0, 7), 0),
    ("prlimit64", (1, 7), EPERM),
    *((call, (pid,), EPERM if pid & 0xFFFFFFFF == 1 else 0) for call in SCHEDULE for pid in (0, 1, 2, 77, HIGH | 1)),
    *(
        (call, (high | which, who), 0 if which == process and who & 0xFFFFFFFF != 1 and not high else EPERM)
        for call, process in (("setpriority", 0), ("ioprio_set", 1))
        for which in (0, 1, 2, 3)
        for who in (0, 1, 2, 77, HIGH | 1)
        for high in (0, HIGH)
    ),
    *(("personality", (value,), 0) for value in (0, 8, 0x20000, 0x20008, 0xFFFFFFFF, -1)),
    *(("personality", (value,), ENOSYS) for value in (0x40000, 0x400000, 6, HIGH | 0x40000)),
    *((call, (family,), 0) for call in SOCKETS for family in (1, 2, 10, 16)),
    *(
        (call, (high | family,), EAFNOSUPPORT)
        for call in SOCKETS
        for family in {*range(48), 0xFFFFFFFF} - {1, 2, 10, 16}
        for high in (0, HIGH)
    ),
    *(("socket", (16, 3, protocol), EAFNOSUPPORT) for protocol in (4, 9, 12, 15, 16)),
    *(("socket", (2, 1, protocol), 0) for protocol in (0, 1, 6, 17)),
    *(
        ("socket", (2, 1, high | protocol), EPROTONOSUPPORT)
        for protocol in (33, 115, 132, 136, 256)
        for high in (0, HIGH)
    ),
    *(
        (call, (*before, high | user, high | group), 0 if {user, group} <= {1000, KEEP} else EPERM)
        for call, before in (("chown", (0,)), ("lchown", (0,)), ("fchown", (0,)), ("fchownat", (0, 0)))
        for user in (0, 999, 1000, 1001, KEEP - 1, KEEP)
        for group in (0, 1000, 65_534, KEEP)
        for high in (0, HIGH)
    ),
    *((call, (*before, kind | 0o644), 0) for call, before in MAKE_NODE for kind in (0, 0o010000, 0o100000, 0o140000)),
    *((call, (*before, kind | 0o600), EPERM) for call, before in MAKE_NODE for kind in (0o020000, 0o060000)),
    *(
        (call, (*before, mode), EPERM if mode & 0o6000 else 0)
        for call, before in CHANGE_MODE
        for mode in (0o755, 0o1777, 0o4755, 0o2755, 0o6000, HIGH | 0o4000)
    ),
    *(
        (call, (*before, flags | high, mode), EPERM if flags & ~2 and mode & 0o6000 else 0)
        for call, before in (("open", (0,)), ("openat", (0, 0)))
        for flags in (0, 2, os.O_CREAT | 2, os.O_TMPFILE | 2)
        for mode in (0, 0o644, 0o4755, 0o2755, HIGH | 0o6755)
        for high in (0, HIGH)
    ),
]


def test_arguments_decide(filters: Sequence[bytes]) -> None:
    wrong = []
    for call, arguments, answer in ARGUMENTS:
        if number_of(call) >= 0:
            got = verdict(filters, number_of(call), arguments, NATIVE)
            if got != answer:
                wrong.append((call, arguments, got))
    assert wrong == []


@pytest.mark.parametrize("call", sorted({call for call, _, _ in seccomp.RULES}))
def test_without_its_rule_a_use_is_let_through(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    if number_of(call) < 0:
        pytest.skip(f"this machine has no {call}")
    refused = [arguments for name, arguments, answer in ARGUMENTS if name == call and answer]
    monkeypatch.setattr(seccomp, "RULES", [rule for rule in seccomp.RULES if rule[0] != call])
    weak = seccomp.filters()
    assert refused
    assert {verdict(weak, number_of(call), arguments, NATIVE) for arguments in refused} == {0}


def test_without_the_library_nothing_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(seccomp, "_LIBRARY", "libseccomp-that-is-not-there.so.2")
    driver = BubblewrapDriver(tmp_path, LIMITS, cgroup_name="era-test-no-seccomp")

    async def start_and_stop() -> None:
        try:
            await driver.start()
        finally:
            await driver.stop()

    with pytest.raises(NoIsolation, match="libseccomp-that-is-not-there") as refusal:
        asyncio.run(start_and_stop())
    assert "apt-get install libseccomp2" in str(refusal.value.hint)
    assert not list(Path(tmp_path).glob("live/*"))
