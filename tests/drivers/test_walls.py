"""System calls against the kernel itself, and Landlock. Each attack fails on a sound sandbox and succeeds on one
without that wall."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
from collections.abc import Iterator
from errno import EAFNOSUPPORT, ENOSYS, EPERM
from pathlib import Path
from typing import Any

import pytest

from era.core.models import Language
from era.drivers import seccomp
from tests.drivers.as_user import opened
from tests.drivers.conftest import BOTH_WAYS
from tests.drivers.sandboxes import WITHOUT_LANDLOCK, Sandboxes, Weakness, without
from tests.drivers.test_attacks import OPEN_SUPERVISOR, replaced
from tests.drivers.test_seccomp import number_of

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers and machine code are those of x86_64")


@pytest.fixture(scope="module")
def unfiltered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandboxes]:
    made = Sandboxes(tmp_path_factory.mktemp("unfiltered"), Weakness(unfiltered=True))
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
    "a line discipline": ("ioctl", "99, 0x5423, buffer"),
    **{
        f"{request:#x} for a bridge or VLAN": ("ioctl", f"99, {request}, buffer")
        for request in (0x8940, 0x8982, 0x89A0)
    },
    "a subvolume of btrfs": ("ioctl", "99, 0x5000940e, buffer"),
    "renaming that leaves a device": ("renameat2", "-100, file, -1, b'moved', 4"),
    "generic netlink": ("socket", "16, 3, 16"),
    "SCTP": ("socket", "2, 1, 132"),
    "chmod of set-user-id": ("chmod", "file, 0o4755"),
    "fchmodat of set-group-id": ("fchmodat", "-100, file, 0o2755"),
    "creat of set-user-id": ("creat", "b'/workspace/made', 0o4755"),
    "open of set-user-id": ("open", "b'/workspace/opened', 0o102, 0o4755"),
    "openat of set-group-id": ("openat", "-100, b'/workspace/opened at', 0o102, 0o2755"),
    "a nameless file of set-user-id": ("openat", "-100, b'/workspace', 0o20200002, 0o4755"),
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

result = {}
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
    result[name] = int(os.read(read, 10))
    os.close(read)
    os.waitpid(pid, 0)
print(json.dumps(result))
"""


def _answers(sandboxes: Sandboxes) -> dict[str, int]:
    """The errno of each attempt, 0 where it succeeded."""
    attempts = "\n".join(
        f"    {name!r}: lambda: call({number_of(call)}, {arguments}),"
        for name, (call, arguments) in ATTEMPTS.items()
        if number_of(call) >= 0
    )
    sandbox = sandboxes.make()
    result = sandboxes.run(sandbox, MAKES_CALLS % attempts)
    sandboxes.close(sandbox)
    assert result.ended.exit_code == 0, result.stderr
    answers: dict[str, int] = json.loads(result.stdout)
    return answers


def _host_has_sockets(family: int, protocol: int) -> bool:
    libc = ctypes.CDLL(None)
    return bool(libc.socket(family, 1 if family != 16 else 3, protocol) >= 0)


@BOTH_WAYS
def test_the_filter_answers_before_the_kernel_does(sandboxes: Sandboxes) -> None:
    answers = _answers(sandboxes)
    refused = {name for name, errno in answers.items() if errno in (EPERM, ENOSYS, EAFNOSUPPORT)}
    assert refused == set(answers) - {"SCTP"}
    assert answers["SCTP"] == 93  # EPROTONOSUPPORT


def test_without_the_filter_the_kernel_is_reached(unfiltered: Sandboxes) -> None:
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


def test_calls_of_32_bit_programs_are_not_there(sandboxes: Sandboxes, unfiltered: Sandboxes) -> None:
    assert sandboxes.run(sandboxes.make(), CALLS_AS_32_BIT).stdout == f"{-ENOSYS}\n"
    result = unfiltered.run(unfiltered.make(), CALLS_AS_32_BIT)
    if result.ended.exit_code == 139:
        pytest.skip("this kernel has no 32-bit calls to show the attack with")
    assert int(result.stdout) > 1


# -- the walls as seen from inside ----------------------------------------------------------------------------------

LOOKS_AROUND = """
import json, os, stat
status = dict(line.rstrip('\\n').split(':\\t', 1) for line in open('/proc/self/status'))
mounts = {}
for line in open('/proc/self/mountinfo'):
    fields = line.split()
    mounts[fields[4]] = fields[5].split(',')
writable = []
for top in ('/proc/sys', '/proc/irq', '/proc/bus', '/proc/sysrq-trigger'):
    for directory, _, names in os.walk(top) if os.path.isdir(top) else [('/proc', [], [top])]:
        for path in (os.path.join(directory, name) for name in names):
            try: os.close(os.open(path, os.O_WRONLY))
            except OSError: continue
            writable.append(path)
devices = []
for directory, _, names in os.walk('/dev'):
    devices += [path for name in names if stat.S_ISCHR(os.lstat(path := os.path.join(directory, name)).st_mode)
                or stat.S_ISBLK(os.lstat(path).st_mode)]
print(json.dumps({'status': status, 'mounts': mounts, 'writable': writable, 'devices': sorted(devices),
                  'ids': [*os.getresuid(), *os.getresgid(), *os.getgroups()], 'ttys': os.listdir('/dev/pts')}))
"""


def _check_walls(result: dict[str, Any]) -> None:
    status = result["status"]
    capabilities = {name: status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
    assert {int(value, 16) for value in capabilities.values()} == {0}, capabilities
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert set(result["ids"]) <= {1000, 65534}  # 65534 stands for groups of the service's own user that aren't mapped
    assert result["writable"] == []
    assert result["devices"] == [
        *("/dev/full", "/dev/null", "/dev/pts/ptmx", "/dev/random", "/dev/tty", "/dev/urandom", "/dev/zero")
    ]
    assert result["ttys"] == ["ptmx"]
    devices = {path for path in result["mounts"] if path.startswith("/dev/")}
    for path, options in result["mounts"].items():
        assert "nosuid" in options, path
        assert "nodev" in options or path in devices, path
        assert "ro" in options or path in devices | {"/proc", "/tmp", "/workspace", "/opt/session/layer"}, path
    assert {"/proc/sys", "/proc/irq", "/proc/bus"} <= set(result["mounts"])


@BOTH_WAYS
def test_nothing_is_left_that_should_not_be(sandboxes: Sandboxes) -> None:
    _check_walls(json.loads(sandboxes.run(sandboxes.make(), LOOKS_AROUND).stdout))


def test_nothing_is_left_for_an_ordinary_user_either(tmp_path: Path) -> None:
    """A user's sandboxes, made without root, have the same walls."""
    if os.geteuid() != 0:
        pytest.skip("this is what the test before saw")
    with opened("bubblewrap as a user", tmp_path / "user") as sandboxes:
        sandbox = sandboxes.make()
        result, enforced = sandboxes.run(sandbox, LOOKS_AROUND), sandbox.enforced
    assert result.ended.exit_code == 0, result.stderr
    _check_walls(json.loads(result.stdout))
    assert (enforced["seccomp"], enforced["capabilities"], enforced["landlock"]) == ("filter", "none", _landlock())


def _strip(options: list[str]) -> list[str]:
    """Removes the options that drop capabilities or make the kernel's settings read-only."""
    pairs = [("--cap-drop", "ALL"), *(("--ro-bind-try", f"/proc/{name}") for name in ("sys", "irq", "bus"))]
    kept = list(options)
    for name, value in pairs:
        at = next(at for at in range(len(kept)) if kept[at : at + 2] == [name, value])
        del kept[at : at + (2 if name == "--cap-drop" else 3)]
    return [option for option in kept if option != "--disable-userns"]


@pytest.mark.parametrize("weak_sandboxes", [Weakness(_strip, unfiltered=True, template_forks=0)], indirect=True)
def test_the_check_of_the_walls_notices(weak_sandboxes: Sandboxes) -> None:
    result = json.loads(weak_sandboxes.run(weak_sandboxes.make(), LOOKS_AROUND).stdout)
    with pytest.raises(AssertionError):
        _check_walls(result)


# -- what only a capability opens -----------------------------------------------------------------------------------

# With every capability of its user namespace a program may make a mount namespace, and mount there.
MOUNTS = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
for name, number, arguments in (
    ('unshare', %(unshare)d, (ctypes.c_long(0x4020000),)),
    ('mount', %(mount)d, (b'none', b'/tmp', b'tmpfs', ctypes.c_long(0), None)),
    ('fsopen', %(fsopen)d, (b'tmpfs', ctypes.c_long(0))),
    ('open_tree', %(open_tree)d, (ctypes.c_long(-100), b'/', ctypes.c_long(0x8001))),
    ('sethostname', %(sethostname)d, (b'mine', ctypes.c_long(4))),
):
    if libc.syscall(ctypes.c_long(number), *arguments) >= 0: print('GOT', name)
"""


def _all_capabilities(options: list[str]) -> list[str]:
    return without("--disable-userns")(replaced(("--cap-drop", "ALL"), ("--cap-add", "ALL"))(options))


OPENED = ("unshare", "mount", "fsopen", "open_tree", "sethostname")
has_templates = pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user has no templates")
ALL_CAPABILITIES = {
    "    give_up_privileges()\n    wait_for_end": "    control_process(38, 1, 'no_new_privs')\n    wait_for_end",
    **WITHOUT_LANDLOCK,
}
"""A `Weakness.supervisor` for sandboxes from a template."""


@pytest.mark.parametrize(
    ("weak_sandboxes", "got"),
    [
        (Weakness(_all_capabilities, WITHOUT_LANDLOCK, template_forks=0), []),
        (Weakness(_all_capabilities, WITHOUT_LANDLOCK, unfiltered=True, template_forks=0), list(OPENED)),
        pytest.param(Weakness(without("--disable-userns"), ALL_CAPABILITIES), [], marks=has_templates),
        pytest.param(
            Weakness(without("--disable-userns"), ALL_CAPABILITIES, unfiltered=True),
            list(OPENED),
            marks=has_templates,
        ),
    ],
    indirect=["weak_sandboxes"],
    ids=["the filter alone", "not even that", "the filter alone, forked", "not even that, forked"],
)
def test_the_filter_holds_without_the_other_walls(weak_sandboxes: Sandboxes, got: list[str]) -> None:
    result = weak_sandboxes.run(weak_sandboxes.make(), MOUNTS % {name: number_of(name) for name in OPENED})
    assert result.stdout.replace("GOT ", "").split() == got, result.stderr


# -- Landlock -------------------------------------------------------------------------------------------------------


def _landlock() -> int | None:
    """The Landlock ABI of this machine's kernel, None where it has none."""
    version = int(ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1))
    return version if version >= 2 else None


def test_what_is_in_force_is_reported(sandboxes: Sandboxes) -> None:
    enforced = sandboxes.make().enforced
    assert (enforced["seccomp"], enforced["landlock"]) == ("filter", _landlock())
    summary = sandboxes.driver.isolation()["summary"]
    assert "system calls filtered" in summary
    assert "Landlock" in summary


def test_a_weaker_sandbox_says_so(unfiltered: Sandboxes) -> None:
    assert unfiltered.make().enforced["seccomp"] == "none"
    assert "system calls not filtered" in unfiltered.driver.isolation()["summary"]


def test_a_kernel_without_landlock_will_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The filter stands in for such a kernel: it hides the calls."""
    allowed = [call for call in seccomp.ALLOWED if not call.startswith("landlock_")]
    monkeypatch.setattr(seccomp, "ALLOWED", allowed)
    made = Sandboxes(tmp_path / "sandboxes", Weakness())
    try:
        sandbox = made.make()
        assert sandbox.enforced["landlock"] is None
        assert "no Landlock" in made.driver.isolation()["summary"]
        assert made.run(sandbox, "print('well')").stdout == "well\n"
    finally:
        made.stop()


# -- the supervisor -------------------------------------------------------------------------------------------------

OVERWRITES_PID_1 = """
try:
    maps = [line.split() for line in open('/proc/1/maps')]
    with open('/proc/1/mem', 'r+b', buffering=0) as memory:
        for span, permissions, *_ in maps:
            if permissions.startswith('rw'):
                start, end = (int(part, 16) for part in span.split('-'))
                memory.seek(start)
                memory.write(b'\\xff' * (end - start))
    print('GOT')
except OSError as problem: print(problem)
import time; time.sleep(1)
"""


def test_the_supervisor_cannot_be_overwritten(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make()
    result = sandboxes.run(sandbox, OVERWRITES_PID_1, timeout=5)
    assert "Permission denied" in result.stdout
    assert sandboxes.run(sandbox, "print('well')").stdout == "well\n"


@pytest.mark.parametrize("weak_sandboxes", [OPEN_SUPERVISOR], indirect=True)
def test_who_breaks_the_supervisor_breaks_his_own_sandbox_only(weak_sandboxes: Sandboxes) -> None:
    """The attack on a supervisor that lets it happen: its sandbox dies, others live on."""
    broken, other = weak_sandboxes.make(), weak_sandboxes.make()
    result = weak_sandboxes.run(broken, OVERWRITES_PID_1, timeout=5)
    assert "GOT" in result.stdout or not result.ended.sandbox_alive
    assert not result.ended.sandbox_alive
    assert not broken.alive
    for sandbox in (other, weak_sandboxes.make()):
        assert weak_sandboxes.run(sandbox, "print('well')").stdout == "well\n"


# -- the environment of a run ---------------------------------------------------------------------------------------

# Each of these would change any interpreter, loader or service that it got into.
MAKES_TRAPS = """
import os
os.makedirs('traps')
for name in ('sitecustomize.py', 'supervisor.py', 'workspace.py', 'landlock.py'):
    with open(f'traps/{name}', 'w') as file: file.write("import os; print('TRAPPED', os.getpid(), flush=True)")
with open('traps/trap.cjs', 'w') as file: file.write("console.log('TRAPPED', process.pid)")
for name in ('python3', 'node', 'sh'):
    with open(f'traps/{name}', 'w') as file: file.write("#!/bin/echo TRAPPED")
    os.chmod(f'traps/{name}', 0o755)
"""
TRAPS: list[tuple[Language, dict[str, str], str]] = [
    ("python", {"PYTHONPATH": "/workspace/traps"}, "TRAPPED"),
    ("python", {"LD_PRELOAD": "/workspace/traps/none.so"}, "cannot be preloaded"),
    ("python", {"PATH": "/workspace/traps"}, "TRAPPED"),
    ("python", {"PYTHONPATH": "/era", "ERA_GUEST": "{}", "ERA_SPARE": "1"}, ""),
    ("node", {"NODE_OPTIONS": "--require /workspace/traps/trap.cjs"}, "TRAPPED"),
    ("node", {"ERA_SPARE": "1", "NODE_OPTIONS": "--require /era/node_wait.cjs"}, ""),
]
USES_TOOLS = {
    "python": "import subprocess; subprocess.run(['sh', '-c', 'exit'])",
    "node": "require('node:child_process').spawnSync('sh', ['-c', 'exit'])",
}


def _trapped(sandboxes: Sandboxes, language: Language, env: dict[str, str]) -> tuple[str, str, str]:
    """The output of a run with these variables, of the next run, and of the sandbox itself."""
    sandbox = sandboxes.make(language)
    made = sandboxes.make()
    sandboxes.run(made, MAKES_TRAPS)
    shutil.copytree(made.workspace / "traps", sandbox.workspace / "traps")
    first = sandboxes.run(sandbox, USES_TOOLS[language], env=env)
    second = sandboxes.run(sandbox, USES_TOOLS[language], env={"LANG": "C.UTF-8"})
    return first.stdout + first.stderr, second.stdout + second.stderr, sandbox.log()


@pytest.mark.parametrize(("language", "env", "sign"), TRAPS, ids=[" ".join(env) for _, env, _ in TRAPS])
def test_env_touches_its_own_run_only(sandboxes: Sandboxes, language: Language, env: dict[str, str], sign: str) -> None:
    first, second, log = _trapped(sandboxes, language, env)
    assert sign in first
    assert (second, log) == ("", "")


@pytest.mark.parametrize(
    "weak_sandboxes",
    [
        Weakness(
            supervisor={
                "secret[:] = bytes(len(secret))": (
                    "__import__('os').environ.update(__import__('json').loads(bytes(secret)))"
                ),
                "command, environment)": "command, {**environment, **os.environ})",
            }
        )
    ],
    indirect=True,
)
def test_env_that_reached_the_supervisor_would_show(weak_sandboxes: Sandboxes) -> None:
    for language, env, sign in (TRAPS[0], TRAPS[1], TRAPS[4]):
        assert sign in _trapped(weak_sandboxes, language, env)[1]
