"""Attacks on gVisor sandboxes, each also on one with the matching wall taken out, where it must get through. And
programs that use up a resource. Canaries only."""

from __future__ import annotations

import os
import random
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from era.core.models import JsonObject
from era.drivers import processes
from era.errors import SandboxFailed
from tests.conftest import assert_nothing_left, descendants, mounts
from tests.drivers.conformance.test_sandboxes import LIMITS_THE_SUPERVISOR
from tests.drivers.sandboxes import Sandboxes, Weakness, with_more
from tests.drivers.test_attacks import (
    ALLOCATES,
    CALLS,
    CANARY,
    CONNECTS,
    READS,
    ROOT,
    SECRETS,
    WRITES,
    Attack,
    canaries,
    replaced,
)
from tests.drivers.test_syscall_fuzz import fuzz

__all__ = ["canaries"]

pytestmark = pytest.mark.skipif(shutil.which("runsc") is None, reason="runsc is not installed")

type Specification = JsonObject


@pytest.fixture(scope="module")
def sandboxes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandboxes]:
    before, processes = mounts(), set(descendants(os.getpid()))
    directory = tmp_path_factory.mktemp("gvisor")
    made = Sandboxes(directory, Weakness(), "gvisor")
    yield made
    running = [pid for pid in descendants(os.getpid()) if pid not in processes]
    made.stop()
    assert_nothing_left(before, running, directory, made.cgroup_name)


@pytest.fixture
def weak_sandboxes(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Sandboxes]:
    made = Sandboxes(tmp_path / "weak", request.param, "gvisor", self_tested=())
    yield made
    made.stop()


def mount(destination: str, options: list[str]) -> Callable[[Specification], Specification]:
    """Changes the options of one mount of the container."""

    def weaken(specification: Specification) -> Specification:
        changed = [
            {**mount, "options": options} if mount["destination"] == destination else mount
            for mount in specification["mounts"]
        ]
        assert changed != specification["mounts"]
        return {**specification, "mounts": changed}

    return weaken


def process(**fields: Any) -> Callable[[Specification], Specification]:
    return lambda specification: {**specification, "process": {**specification["process"], **fields}}


def more_environment(*more: str) -> Callable[[Specification], Specification]:
    return lambda specification: process(env=[*specification["process"]["env"], *more])(specification)


def writable_root(specification: Specification) -> Specification:
    return {**specification, "root": {"path": "/", "readonly": False}}


KEPT = {"            give_up_privileges()": "            pass"}


def capable(*names: str) -> Weakness:
    """With these capabilities, and those that the container's first process needs."""
    return Weakness(
        specification=process(
            capabilities={
                kind: [*names, "CAP_SETPCAP", "CAP_SYS_ADMIN"]
                for kind in ("bounding", "effective", "permitted", "inheritable")
            }
        ),
        supervisor=KEPT,
    )


UNFILTERED_INSIDE = Weakness(supervisor={"            load([instructions])": "            pass"})

WRITABLE_ROOT = Weakness(
    supervisor=KEPT,
    flags=replaced(("--overlay2=none",), ("--overlay2=root:memory",)),
    specification=lambda specification: writable_root(capable("CAP_DAC_OVERRIDE").specification(specification)),
)

ATTACKS = [
    Attack(
        "a file of the host",
        READS.format(path="{secret_file}", canary=CANARY),
        Weakness(lambda options: with_more("--ro-bind", SECRETS["directory"], SECRETS["directory"])(options)),
    ),
    Attack(
        "a process of the host",
        READS.format(path="/*/[0-9]*/cmdline", canary=CANARY),
        Weakness(
            with_more("--ro-bind", "/proc", "/hostproc"),
            flags=replaced(("--file-access=exclusive",), ("--file-access=shared",)),
        ),
    ),
    Attack(
        "a listener on the host's loopback",
        CONNECTS.replace("{family}", "AF_INET")
        .replace("{address!r}", "('127.0.0.1', {port})")
        .format(canary=CANARY, port="{port}"),
        Weakness(with_more("--share-net")),
    ),
    Attack("the root directory", WRITES.format(path="/mine", size=1), WRITABLE_ROOT),
    Attack("/usr", WRITES.format(path="/usr/mine-{canary}", size=1), WRITABLE_ROOT),
    Attack("/etc", WRITES.format(path="/etc/mine-{canary}", size=1), WRITABLE_ROOT),
    Attack(
        "more of /tmp than there should be",
        WRITES.format(path="/tmp/big", size=20 << 20),
        Weakness(specification=mount("/tmp", ["mode=1777"])),
    ),
    Attack(
        "the service's environment",
        READS.format(path="/proc/*/environ", canary=CANARY),
        Weakness(specification=more_environment(f"X={CANARY}")),
    ),
    Attack(
        "the supervisor's memory",
        "try:\n    open('/proc/1/mem', 'rb').close(); print('GOT')\nexcept OSError as problem: print(problem)",
        capable("CAP_SYS_PTRACE"),
    ),
    Attack(
        "a descriptor of the supervisor's",
        "import os, stat\n"
        "for fd in range(3, 64):\n"
        "    try:\n"
        "        if stat.S_ISSOCK(os.fstat(fd).st_mode): print('GOT')\n"
        "    except OSError: pass",
        Weakness(
            supervisor={
                "            os.dup2(go, 3)\n": "            os.dup(3)\n            os.dup2(go, 3)\n",
                "            os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n            _prctl": (
                    "            _prctl"
                ),
            }
        ),
    ),
    Attack("much of the disk in a moment", ALLOCATES, Weakness(unfiltered=True)),
    Attack("limits of later runs", LIMITS_THE_SUPERVISOR.replace("limited", "GOT"), UNFILTERED_INSIDE),
    Attack(
        "a message queue for later runs",
        CALLS.format(call="libc.mq_open(b'/queue', 0o102, 0o600, None)"),
        UNFILTERED_INSIDE,
    ),
    Attack("a mount", CALLS.format(call="libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)"), capable("CAP_SYS_ADMIN")),
    Attack("another root", CALLS.format(call="libc.chroot(b'/tmp')"), capable("CAP_SYS_CHROOT")),
    Attack("another user", CALLS.format(call="libc.setuid(12345)"), capable("CAP_SETUID")),
    Attack("another host name", CALLS.format(call="libc.sethostname(b'me', 2)"), capable("CAP_SYS_ADMIN")),
    Attack(
        "a raw socket",
        CALLS.format(call="libc.socket(2, 3, 1)"),
        Weakness(
            flags=lambda options: [*options, "--net-raw"],
            specification=capable("CAP_NET_RAW").specification,
            supervisor=KEPT,
        ),
    ),
    Attack(
        "a setting of the host's kernel",
        "for path in ('/proc', '/hostproc'):\n"
        "    try:\n"
        "        path += '/sys/kernel/printk_ratelimit'\n"
        "        value = open(path).read()\n"  # which goes back as it is
        "        open(path, 'w').write(value)\n"
        "        print('GOT')\n"
        "    except OSError as problem: print(problem)",
        Weakness(with_more("--bind", "/proc", "/hostproc"), as_root=True, specification=writable_root),
        needs_root=True,
    ),
]


def _filled(attack: Attack, canaries: dict[str, str]) -> str:
    code = attack.code
    for name, value in canaries.items():
        code = code.replace(f"{{{name}}}", value)
    return code


@pytest.fixture(scope="module")
def sound(sandboxes: Sandboxes) -> Any:
    return sandboxes.make()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_a_sound_sandbox_holds(sandboxes: Sandboxes, sound: Any, canaries: dict[str, str], attack: Attack) -> None:
    result = sandboxes.run(sound, _filled(attack, canaries))
    assert result.ended.exit_code == 0, result.stderr
    assert "GOT" not in result.stdout


@pytest.mark.parametrize(
    ("attack", "weak_sandboxes"),
    [(attack, attack.weakness) for attack in ATTACKS if ROOT or not attack.needs_root],
    indirect=["weak_sandboxes"],
    ids=[attack.name for attack in ATTACKS if ROOT or not attack.needs_root],
)
def test_the_attack_bites_without_the_wall(weak_sandboxes: Sandboxes, canaries: dict[str, str], attack: Attack) -> None:
    result = weak_sandboxes.run(weak_sandboxes.make(), _filled(attack, canaries))
    assert "GOT" in result.stdout, result.stdout + result.stderr


def _reaches_a_socket_of_the_host(sandboxes: Sandboxes) -> str:
    """The host's socket lies in the working directory itself, so that its place is no wall."""
    sandbox = sandboxes.make()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        here = os.open(sandbox.workspace, os.O_DIRECTORY)
        listener.bind(f"/proc/self/fd/{here}/socket")
        os.close(here)
        (sandbox.workspace / "socket").chmod(0o777)
        listener.listen()
        code = "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('socket')\nprint('GOT')"
        return sandboxes.run(sandbox, code).stdout


def test_a_socket_of_the_host_is_out_of_reach(sandboxes: Sandboxes) -> None:
    assert _reaches_a_socket_of_the_host(sandboxes) == ""


@pytest.mark.parametrize(
    "weak_sandboxes",
    [Weakness(flags=replaced(("--host-uds=none",), ("--host-uds=open",)))],
    indirect=True,
)
def test_a_socket_of_the_host_could_be_reached(weak_sandboxes: Sandboxes) -> None:
    assert "GOT" in _reaches_a_socket_of_the_host(weak_sandboxes)


@pytest.mark.parametrize(
    "call", ["io_uring_setup", "bpf", "userfaultfd", "perf_event_open", "kexec_load", "init_module", "setns"]
)
def test_calls_that_gvisor_has_not_or_refuses(sandboxes: Sandboxes, sound: Any, call: str) -> None:
    """They would end in gVisor in any case: no call of a program reaches the host's kernel."""
    number = {
        "io_uring_setup": 425,
        "bpf": 321,
        "userfaultfd": 323,
        "perf_event_open": 298,
        "kexec_load": 246,
        "init_module": 175,
        "setns": 308,
    }[call]
    result = sandboxes.run(sound, CALLS.format(call=f"libc.syscall({number}, 1, 0, 0, 0)"))
    assert "GOT" not in result.stdout


def test_devices_are_gvisor_s_own(sandboxes: Sandboxes, sound: Any) -> None:
    """Whoever makes a device file gets a device of gVisor's by it, or none."""
    code = """
import os
for kind, major, minor in ((0o020000, 1, 3), (0o020000, 1, 1), (0o020000, 1, 11), (0o060000, 8, 0), (0o060000, 7, 0)):
    try:
        os.mknod('/tmp/d', kind | 0o666, os.makedev(major, minor))
        os.close(os.open('/tmp/d', os.O_RDWR)); print('opened', major, minor)
    except OSError: pass
    finally: os.path.lexists('/tmp/d') and os.unlink('/tmp/d')
for kind in (0o020000, 0o060000):
    try: os.mknod('d', kind | 0o666, os.makedev(1, 3)); print('made in the working directory')
    except OSError: pass
"""
    assert sandboxes.run(sound, code).stdout == "opened 1 3\n"
    assert not (sound.workspace / "d").exists()


def test_nobody_inside_can_end_what_hands_out_the_sockets(sandboxes: Sandboxes, sound: Any) -> None:
    code = """
import os, socket, time
os.fork() or time.sleep(60)
os.kill(-1, 9)
with socket.create_server(("127.0.0.1", 0)) as server:
    os.write(1, b"%d\\n" % server.getsockname()[1])
    sock, _ = server.accept()
    while sock.recv(100): pass
    sock.sendall(b"here")
    sock.close()
"""
    for _ in range(2):
        assert sandboxes.run(sound, code, meanwhile="to").connections == ["here"]


REPLACES = """
import os
os.unlink('/dev/zero')
open('/dev/zero', 'w').write('left')
"""


def _changed_devices_are_handed_on(sandboxes: Sandboxes, code: str) -> bool:
    sandbox = sandboxes.make()
    assert sandboxes.run(sandbox, code).ended.exit_code == 0
    try:
        return (
            sandboxes.run(
                sandbox, "print('left' in open('/dev/zero').read(4) + ' '.join(__import__('os').listdir('/dev')))"
            ).stdout
            == "True\n"
        )
    except SandboxFailed:
        return False  # as it should be: the host makes another


@pytest.mark.parametrize("code", ["open('/dev/left', 'w').close()", REPLACES], ids=["more", "another"])
def test_changed_devices_cost_the_sandbox(sandboxes: Sandboxes, code: str) -> None:
    assert not _changed_devices_are_handed_on(sandboxes, code)


@pytest.mark.parametrize(
    "weak_sandboxes", [Weakness(supervisor={"if device_files() != self.devices:": "if False:"})], indirect=True
)
def test_changed_devices_would_be_handed_on(weak_sandboxes: Sandboxes) -> None:
    assert _changed_devices_are_handed_on(weak_sandboxes, REPLACES)


@pytest.mark.parametrize(
    "weak_sandboxes",
    [Weakness(supervisor={"self.scheduling.restore()\n        go, go_end": "go, go_end"})],
    indirect=True,
)
def test_a_changed_niceness_would_stay(weak_sandboxes: Sandboxes) -> None:
    """tests/drivers/conformance has the attack on sound sandboxes."""
    sandbox = weak_sandboxes.make()
    weak_sandboxes.run(sandbox, "import os; os.setpriority(os.PRIO_PROCESS, 1, 7)")
    assert weak_sandboxes.run(sandbox, "import os; print(os.getpriority(os.PRIO_PROCESS, 0))").stdout == "7\n"


def test_programs_meet_another_kernel(sandboxes: Sandboxes, sound: Any) -> None:
    result = sandboxes.run(sound, "import os; print(os.uname().release, open('/proc/version').read())")
    assert os.uname().release not in result.stdout


def test_all_of_it_is_an_ordinary_user_outside(sandboxes: Sandboxes, sound: Any) -> None:
    pids = processes.below(sound._process.pid)
    assert len(pids) >= 3
    owners = {Path(f"/proc/{pid}").stat().st_uid for pid in pids} - {0}  # undumpable ones show as root's
    real = {line.split()[1] for pid in pids for line in _status(pid) if line.startswith("Uid:")}
    expected = sound.uid if ROOT else os.getuid()
    assert real == {str(expected)}
    assert owners <= {expected}


def _status(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/status").read_text().splitlines()


def test_what_is_in_force_is_reported(sandboxes: Sandboxes, sound: Any) -> None:
    enforced = sound.enforced
    assert (enforced["driver"], enforced["platform"], enforced["seccomp"]) == ("gvisor", "systrap", "filter")
    assert enforced["namespaces"] == ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"]
    assert (enforced["capabilities"], enforced["no_new_privs"], enforced["network"]) == ("none", True, "none")
    assert "gVisor" in sandboxes.driver.isolation()["summary"]
    if ROOT:
        assert enforced["uid"] >= 1_900_000_000
        assert enforced["cgroup"]["memory_bytes"] > 256 << 20


SECRET = "open-sesame-7c1d2b"
LOOKS_FOR_SECRET = """
import glob, re
secret = re.compile(rb'(?:open-sesam[e]-7c1d2[b]){3}')  # which does not match itself
for path in glob.glob('/proc/[0-9]*/environ'):
    try:
        if secret.search(open(path, 'rb').read()): print('GOT', path)
    except OSError: pass
for line in open('/proc/self/maps'):
    span, permissions = line.split()[:2]
    if permissions.startswith('rw'):
        start, end = (int(part, 16) for part in span.split('-'))
        with open('/proc/self/mem', 'rb') as memory:
            memory.seek(start)
            try: found = secret.search(memory.read(end - start))
            except OSError: continue
            if found: print('GOT', line)
print('looked')
"""


def _two_runs(sandboxes: Sandboxes) -> str:
    sandbox = sandboxes.make()
    sandboxes.run(sandbox, "import os; print(len(os.environ['TOKEN']))", env={"TOKEN": SECRET * 50})
    return sandboxes.run(sandbox, LOOKS_FOR_SECRET).stdout


def test_env_of_a_run_is_nowhere_in_the_next(sandboxes: Sandboxes) -> None:
    assert _two_runs(sandboxes) == "looked\n"


@pytest.mark.parametrize(
    "weak_sandboxes",
    [
        Weakness(
            supervisor={
                "secret[:] = bytes(len(secret))": "LEAK.append(bytes(secret))",
                "GRACE = 2.0": "GRACE = 2.0\nLEAK = []",
            }
        )
    ],
    indirect=True,
)
def test_env_in_the_supervisor_would_be_found(weak_sandboxes: Sandboxes) -> None:
    assert "GOT" in _two_runs(weak_sandboxes)


@pytest.mark.parametrize("calls", [500, pytest.param(5_000, marks=pytest.mark.soak)])
def test_random_system_calls_stay_inside(sandboxes: Sandboxes, tmp_path: Path, calls: int) -> None:
    """A program may kill its own sandbox in gVisor, and nothing else."""
    seed = int(os.environ.get("ERA_TEST_SEED", random.randrange(1 << 32)))
    fuzz(sandboxes, tmp_path / "canary", calls, seed, lives=False, timeout=3)


# -- whatever a program uses up -------------------------------------------------------------------------------------


def _well(sandboxes: Sandboxes, sandbox: Any) -> None:
    assert sandboxes.run(sandbox, "print('well')").stdout == "well\n"


def _next_well(sandboxes: Sandboxes, sandbox: Any) -> None:
    """The sandbox works if it lives, else the next one does."""
    _well(sandboxes, sandbox if sandbox.alive else sandboxes.make())
    sandboxes.close(sandbox)


def test_a_fork_bomb(sandboxes: Sandboxes) -> None:
    """Processes are bounded; where each takes much memory that bound may come first. Either way the run ends."""
    sandbox = sandboxes.make()
    begun = time.monotonic()
    ended = sandboxes.run(
        sandbox, "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", timeout=1
    ).ended
    assert time.monotonic() - begun < 30
    assert ended.cause in ("timeout", "oom")
    assert ended.exit_code in (124, 137)
    if ended.sandbox_alive:
        assert ended.reaped <= 64
    _next_well(sandboxes, sandbox)


@pytest.mark.parametrize(
    "code",
    [
        "kept = []\nwhile True: kept.append(bytearray(1 << 20))",
        "import os\nfds = []\nwhile True:\n    fds.append(os.memfd_create('m'))\n"
        "    for _ in range(64): os.write(fds[-1], b'x' * (1 << 20))",
        "import mmap\nkept = []\nwhile True:\n"
        "    kept.append(mmap.mmap(-1, 1 << 24))\n    kept[-1].write(b'x' * (1 << 24))",
    ],
    ids=["heap", "memfd", "shared"],
)
def test_a_memory_bomb(sandboxes: Sandboxes, code: str) -> None:
    sandbox = sandboxes.make()
    ended = sandboxes.run(sandbox, code).ended
    assert ended.exit_code != 0
    if ROOT:
        assert ended.cause == "oom"
    _next_well(sandboxes, sandbox)


@pytest.mark.soak  # test_output_is_bounded, with all drivers, is quicker
def test_endless_output(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make()
    result = sandboxes.run(
        sandbox, "import os\nwhile True: os.write(1, b'x' * 4096); os.write(2, b'y' * 4096)", timeout=3
    )
    assert (result.ended.cause, result.ended.exit_code) == ("timeout", 124)
    assert (set(result.stdout), set(result.stderr)) == ({"x"}, {"y"})
    assert max(len(result.stdout), len(result.stderr)) <= 1 << 20
    _next_well(sandboxes, sandbox)


@pytest.mark.soak  # the supervisor does it, as in test_a_run_costs_no_more_than_its_deadline
def test_signals_ignored_and_stopped(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make()
    code = (
        "import os, signal, time\n"
        "for number in range(1, 32):\n"
        "    if number not in (9, 17, 19): signal.signal(number, signal.SIG_IGN)\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(60)\n"
        "else: print('in', flush=True)\n"
        "while True: os.kill(os.getpid(), 19)\n"
    )
    begun = time.monotonic()
    result = sandboxes.run(sandbox, code, timeout=3)
    assert 4.9 < time.monotonic() - begun < 30
    assert (result.stdout, result.ended.cause, result.ended.exit_code) == ("in\n", "timeout", 124)
    assert result.ended.sandbox_alive
    assert result.ended.reaped >= 2
    _next_well(sandboxes, sandbox)


def test_who_kills_the_supervisor_loses_the_sandbox(sandboxes: Sandboxes) -> None:
    """gVisor doesn't protect PID 1 of a container as Linux does that of a PID namespace."""
    sandbox = sandboxes.make()
    ended = sandboxes.run(sandbox, "import os, time; os.kill(1, 9); time.sleep(60)").ended
    assert (ended.cause, ended.sandbox_alive, ended.state) == ("killed", False, None)
    _next_well(sandboxes, sandbox)


@pytest.mark.parametrize("directory", ["/tmp", "/dev/shm"])
def test_a_full_scratch_directory(sandboxes: Sandboxes, sound: Any, directory: str) -> None:
    result = sandboxes.run(sound, f"f = open('{directory}/big', 'wb')\nwhile True: f.write(bytes(1 << 20)); f.flush()")
    assert "No space left on device" in result.stderr
    assert sandboxes.run(sound, f"import os; print(os.listdir('{directory}'))").stdout == "[]\n"


@pytest.mark.parametrize("call", ["semget(1, 1, {})", "shmget(1, 4096, {})", "msgget(1, {})"])
def test_system_v_objects_are_not_handed_on(sandboxes: Sandboxes, sound: Any, call: str) -> None:
    code = "import ctypes; print(ctypes.CDLL(None)." + call + ")"
    assert sandboxes.run(sound, code.format("0o1600")).stdout != "-1\n"
    assert sandboxes.run(sound, code.format("0o600")).stdout == "-1\n"
