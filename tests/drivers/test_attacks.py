"""Attacks on the sandbox. Each fails on a sound one and succeeds on one with the matching wall taken out, which proves
that the test would notice. Canaries only: files, listeners and processes that the tests made themselves."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from era.core.models import JsonObject
from era.drivers import isolation_report
from tests.drivers.conftest import BOTH_WAYS
from tests.drivers.sandboxes import WITHOUT_LANDLOCK, Sandboxes, Weakness, with_more, without

ROOT = os.geteuid() == 0

CANARY = "canary-5f3e9a"
ABSTRACT = f"\0{CANARY}-{os.getpid()}"


@dataclass(frozen=True)
class Attack:
    """A program that prints GOT if it gets through. `{…}` in its code stands for one of the fixture `canaries`."""

    name: str
    code: str
    weakness: Weakness
    needs_root: bool = False
    landlock_holds: bool = False
    """The attack fails even without the other wall, because Landlock stops it, too."""


def replaced(old: tuple[str, ...], new: tuple[str, ...]) -> Callable[[list[str]], list[str]]:
    def weaken(options: list[str]) -> list[str]:
        for at in range(len(options)):
            if tuple(options[at : at + len(old)]) == old:
                return [*options[:at], *new, *options[at + len(old) :]]
        raise AssertionError(f"no {old} among the options")

    return weaken


READS = """
import glob
for path in glob.glob({path!r}):
    try:
        if {canary!r}.encode() in open(path, 'rb').read(): print('GOT')
    except OSError as problem: print(problem)
"""

CONNECTS = """
import socket
try:
    with socket.socket(socket.{family}, socket.SOCK_STREAM) as s:
        s.settimeout(3)
        s.connect({address!r})
        print('GOT' if s.recv(100) == {canary!r}.encode() else 'nothing')
except OSError as problem: print(problem)
"""

WRITES = """
try:
    with open({path!r}, 'w') as file: file.write('x' * {size})
    print('GOT')
except OSError as problem: print(problem)
"""

CALLS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print('GOT' if {call} >= 0 else os.strerror(ctypes.get_errno()))
"""

ALLOCATES = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
fd = os.open('allocated', os.O_RDWR | os.O_CREAT)
for mode in (0, 1, 16, 17):
    if libc.fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(1 << 20)) == 0: print('GOT', mode)
    else: print(os.strerror(ctypes.get_errno()))
"""
"""More of the disk than can be written in the time."""

# The value goes back as it is: what counts is whether the write is let through.
REWRITES = """
try:
    value = open({path!r}).read()
    open({path!r}, 'w').write(value)
    print('GOT')
except OSError as problem: print(problem)
"""

SHARED_NETWORK = Weakness(with_more("--share-net"), WITHOUT_LANDLOCK)
OPEN_SUPERVISOR = Weakness(supervisor={"_libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)": "pass", **WITHOUT_LANDLOCK})
HOST_PROC = Weakness(
    replaced(("--proc", "/proc"), ("--bind", "/proc", "/proc")), {'mount_proc(request["read_only_proc"])': "pass"}
)

ATTACKS = [
    Attack(
        "a file of the host",
        READS.format(path="{secret_file}", canary=CANARY),
        Weakness(
            lambda options: with_more("--ro-bind", SECRETS["directory"], SECRETS["directory"])(options),
            WITHOUT_LANDLOCK,
        ),
        landlock_holds=True,
    ),
    Attack("a process of the host", READS.format(path="/proc/[0-9]*/cmdline", canary=CANARY), HOST_PROC),
    Attack(
        "a listener on the host's loopback",
        CONNECTS.replace("{family}", "AF_INET")
        .replace("{address!r}", "('127.0.0.1', {port})")
        .format(canary=CANARY, port="{port}"),
        SHARED_NETWORK,
    ),
    Attack(
        "an abstract socket of the host",
        CONNECTS.replace("{family}", "AF_UNIX").format(address=ABSTRACT, canary=CANARY),
        SHARED_NETWORK,
        landlock_holds=True,
    ),
    Attack(
        "a new user namespace",
        CALLS.format(call="libc.unshare(0x10000000)"),
        Weakness(without("--disable-userns"), unfiltered=True),
    ),
    Attack("much of the disk in a moment", ALLOCATES, Weakness(unfiltered=True)),
    *(
        Attack(f"how later runs are scheduled: {call}", CALLS.format(call=call), Weakness(unfiltered=True))
        for call in (
            "libc.sched_setscheduler(1, 5, b'\\0' * 4)",
            "libc.sched_setaffinity(1, 8, bytes([255] * 8))",
            "libc.setpriority(0, 1, 7)",
            "libc.setpriority(2, 0, 7)",
        )
    ),
    Attack(
        "the root directory",
        WRITES.format(path="/mine", size=1),
        Weakness(replaced(("--remount-ro", "/"), ()), WITHOUT_LANDLOCK),
        landlock_holds=True,
    ),
    Attack(
        "/dev",
        WRITES.format(path="/dev/mine", size=1),
        Weakness(replaced(("--remount-ro", "/dev"), ()), WITHOUT_LANDLOCK),
        landlock_holds=True,
    ),
    Attack(
        "/usr",
        WRITES.format(path="/usr/mine-{canary}", size=1),
        Weakness(
            lambda options: replaced(("--ro-bind", "/usr", "/usr"), ("--overlay-src", "/usr", "--tmp-overlay", "/usr"))(
                options
            ),
            WITHOUT_LANDLOCK,
        ),
        landlock_holds=True,
    ),
    Attack(
        "more of /tmp than there should be",
        WRITES.format(path="/tmp/big", size=20 << 20),
        Weakness(replaced(("--size", str(16 << 20), "--perms", "1777", "--tmpfs", "/tmp"), ("--tmpfs", "/tmp"))),
    ),
    Attack(
        "the supervisor's environment",
        READS.format(path="/proc/1/environ", canary="ERA_GUEST"),
        OPEN_SUPERVISOR,
        landlock_holds=True,
    ),
    Attack(
        "the supervisor's memory",
        "try:\n    open('/proc/1/mem', 'rb').close(); print('GOT')\nexcept OSError as problem: print(problem)",
        OPEN_SUPERVISOR,
        landlock_holds=True,
    ),
    Attack(
        "the supervisor's root and descriptors",
        "import os\nfor name in ('root', 'cwd', 'exe', 'fd/3'):\n"
        "    try: os.readlink(f'/proc/1/{name}'); print('GOT', name)\n    except OSError as problem: print(problem)",
        OPEN_SUPERVISOR,
        landlock_holds=True,
    ),
    Attack(
        "a signal to the supervisor",
        "import os\ntry:\n    os.kill(1, 0); print('GOT')\nexcept OSError as problem: print(problem)",
        Weakness(supervisor=WITHOUT_LANDLOCK),
    ),
    Attack(
        "a setting of the kernel",
        REWRITES.format(path="/proc/sys/kernel/printk_ratelimit"),
        Weakness(
            lambda options: replaced(("--ro-bind-try", "/proc/sys", "/proc/sys"), ())(HOST_PROC.options(options)),
            HOST_PROC.supervisor,
            as_root=True,
        ),
        needs_root=True,
    ),
]

SECRETS: dict[str, str] = {}

WALL_BEHIND = [attack for attack in ATTACKS if attack.landlock_holds]


@pytest.fixture(scope="module")
def canaries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A secret file, a process, and listeners that send the canary to whoever connects."""
    directory = Path(f"/var/tmp/{CANARY}-{os.getpid()}")
    directory.mkdir()
    (directory / "secret").write_text(CANARY)
    (directory / "secret").chmod(0o644)
    SECRETS["directory"] = str(directory)
    process = subprocess.Popen(["sleep", "600"], executable="/usr/bin/sleep", env={})
    named = subprocess.Popen([f"sleep-{CANARY}", "600"], executable="/usr/bin/sleep")
    listeners = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)]
    listeners[1].bind(ABSTRACT)
    listeners[1].listen()
    greeters = [_greet(listener) for listener in listeners]
    yield {
        "secret_file": str(directory / "secret"),
        "port": str(listeners[0].getsockname()[1]),
        "canary": CANARY,
    }
    for child in (process, named, *greeters):
        child.kill()
        child.wait()
    for listener in listeners:
        listener.close()
    (directory / "secret").unlink()
    directory.rmdir()


def _greet(listener: socket.socket) -> subprocess.Popen[bytes]:
    code = (
        "import socket, sys\n"
        "listener = socket.socket(fileno=int(sys.argv[1]))\n"
        "while True:\n"
        "    peer, _ = listener.accept()\n"
        f"    peer.sendall(b'{CANARY}'); peer.close()\n"
    )
    number = str(listener.fileno())
    return subprocess.Popen(["/usr/bin/python3", "-c", code, number], pass_fds=[listener.fileno()])


def _less_landlock(supervisor: Mapping[str, str] | None) -> dict[str, str]:
    return {old: new for old, new in (supervisor or {}).items() if old not in WITHOUT_LANDLOCK}


def _filled(attack: Attack, canaries: dict[str, str]) -> str:
    code = attack.code
    for name, value in canaries.items():
        code = code.replace(f"{{{name}}}", value)
    return code


@BOTH_WAYS
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_a_sound_sandbox_holds(sandboxes: Sandboxes, canaries: dict[str, str], attack: Attack) -> None:
    sandbox = sandboxes.make()
    result = sandboxes.run(sandbox, _filled(attack, canaries))
    sandboxes.close(sandbox)
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


@pytest.mark.parametrize(
    ("attack", "weak_sandboxes"),
    [
        (attack, replace(attack.weakness, supervisor=_less_landlock(attack.weakness.supervisor)))
        for attack in WALL_BEHIND
    ],
    indirect=["weak_sandboxes"],
    ids=[attack.name for attack in WALL_BEHIND],
)
def test_landlock_is_a_wall_behind_the_wall(
    weak_sandboxes: Sandboxes, canaries: dict[str, str], attack: Attack
) -> None:
    sandbox = weak_sandboxes.make()
    if sandbox.enforced["landlock"] is None:
        pytest.skip("this kernel has no Landlock")
    result = weak_sandboxes.run(sandbox, _filled(attack, canaries))
    assert result.ended.exit_code == 0, result.stderr
    assert "GOT" not in result.stdout


LOOKS_FOR_SECRET = """
import glob, re
secret = re.compile(rb'(?:open-sesam[e]-5f3e9[a]){3}')  # which does not match itself
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
            try:
                found = secret.search(memory.read(end - start))
            except OSError: continue
            if found: print('GOT', line)
"""

SECRET = "open-sesame-5f3e9a"


def _two_runs(sandboxes: Sandboxes) -> str:
    """The output of a run that looks everywhere for a secret which the run before had in its env."""
    sandbox = sandboxes.make()
    first = sandboxes.run(sandbox, "import os; print(len(os.environ['TOKEN']))", env={"TOKEN": SECRET * 50})
    assert first.stdout == f"{len(SECRET) * 50}\n"
    return sandboxes.run(sandbox, LOOKS_FOR_SECRET).stdout


@BOTH_WAYS
def test_env_of_a_run_is_nowhere_in_the_next(sandboxes: Sandboxes) -> None:
    assert _two_runs(sandboxes) == ""


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


DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.close(0); os.close(1); os.close(2)
        while True:
            for pid in filter(str.isdigit, os.listdir('/proc')):
                try:
                    if b'secret' in open(f'/proc/{pid}/environ', 'rb').read(): open('/workspace/stolen', 'w').close()
                except OSError: pass
    os._exit(0)
time.sleep(0.2)
"""

WAITS = "import subprocess, time; subprocess.run(['sleep', '0.5'])"


def _daemon_and_run(sandboxes: Sandboxes) -> bool:
    sandbox = sandboxes.make()
    sandboxes.run(sandbox, DAEMON)
    sandboxes.run(sandbox, WAITS, env={"TOKEN": "secret"})
    return (sandbox.workspace / "stolen").exists()


def test_what_an_earlier_run_left_behind_sees_no_later_run(sandboxes: Sandboxes) -> None:
    assert not _daemon_and_run(sandboxes)


@pytest.mark.parametrize(
    "weak_sandboxes",
    [
        Weakness(
            supervisor={
                "while signal_everything(signal.SIGKILL) or main is None:": "while main is None:",
                **WITHOUT_LANDLOCK,
            }
        )
    ],
    indirect=True,
)
def test_a_daemon_that_lives_on_would_see_it(weak_sandboxes: Sandboxes) -> None:
    assert _daemon_and_run(weak_sandboxes)


def test_killing_or_stopping_everything_ends_only_the_run(sandboxes: Sandboxes) -> None:
    """PID 1 gets no signal from inside, so the sandbox goes on."""
    sandbox = sandboxes.make()
    for number in (9, 15, 19):
        sandboxes.run(sandbox, f"import os; os.kill(1, {number})")
        result = sandboxes.run(sandbox, f"import os; os.kill(-1, {number}); print('still here')", timeout=2)
        assert result.ended.sandbox_alive
    assert sandboxes.run(sandbox, "print('well')").stdout == "well\n"


def test_a_sandbox_sees_its_own_files_only(sandboxes: Sandboxes) -> None:
    first, second = sandboxes.make(), sandboxes.make()
    sandboxes.run(first, f"open('mine', 'w').write('{CANARY}')")
    look = (
        "import os\n"
        "for top, _, names in os.walk('/'):\n"
        "    if top.startswith(('/proc', '/usr')): continue\n"
        "    for name in names:\n"
        "        if name == 'mine': print('GOT', top)\n"
    )
    assert sandboxes.run(second, look).stdout == ""
    assert "GOT" in sandboxes.run(first, look).stdout
    if ROOT:
        assert first.uid != second.uid


EXCHANGES_BLOCKS = """
import errno, fcntl, os, struct, time
for name in ("file", "donor"):
    with open(name, "wb") as file:
        file.write(name.encode() * 2000)
        os.fsync(file.fileno())
def seen():
    status = os.stat("donor")
    return status.st_ino, status.st_size, status.st_mode, status.st_mtime_ns, status.st_ctime_ns
before = seen()
time.sleep(0.1)
file, donor = (os.open(name, os.O_RDWR) for name in ("file", "donor"))
def drop():
    for fd in (file, donor): os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
drop()
try: fcntl.ioctl(file, 0xC028660F, bytearray(struct.pack("IIQQQQ", 0, donor, 0, 0, 1, 0)))
except OSError as problem: print(errno.errorcode[problem.errno])
drop()
print(open("donor", "rb").read() == b"donor" * 2000, seen() == before)
"""
"""By ext4's ioctl for defragmenting: a file's content is another one then, and nothing else of it has changed, so that
a look at the session's files would take it for unchanged."""


def test_blocks_of_files_are_not_exchanged(sandboxes: Sandboxes) -> None:
    result = sandboxes.run(sandboxes.make(), EXCHANGES_BLOCKS)
    assert result.stdout == "ENOTSUP\nTrue True\n", result.stderr


@pytest.mark.parametrize("weak_sandboxes", [Weakness(unfiltered=True)], indirect=True)
def test_without_the_filter_they_are(weak_sandboxes: Sandboxes, tmp_path: Path) -> None:
    outside = subprocess.run([sys.executable, "-c", EXCHANGES_BLOCKS], cwd=tmp_path, capture_output=True, text=True)
    if outside.stdout.endswith("\nTrue True\n"):
        # Not ext4, the only kernel code that has this call; or the machine is itself in a sandbox that refuses it.
        pytest.skip(f"outside of a sandbox the kernel answers {outside.stdout.split()[0]}, too")
    result = weak_sandboxes.run(weak_sandboxes.make(), EXCHANGES_BLOCKS)
    assert result.stdout == "False True\n", result.stderr


_CAP_SYS_RESOURCE = 1 << 24
SPARES_ITSELF = """
import os
score = os.open('/proc/self/oom_score_adj', os.O_RDWR)
print(int(os.read(score, 10)))
try: os.pwrite(score, b'0', 0)
except OSError as problem: print(problem.strerror)
"""


@BOTH_WAYS
def test_where_memory_is_out_programs_go_first_and_their_supervisors_next(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make()
    assert Path(f"/proc/{sandbox._init_pid}/oom_score_adj").read_text() == "500\n"
    score, *refused = sandboxes.run(sandbox, SPARES_ITSELF).stdout.splitlines()
    assert score == "1000"
    capabilities = int(Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0], 16)
    assert refused == (["Permission denied"] if capabilities & _CAP_SYS_RESOURCE else [])


def test_the_network_of_the_machine_is_reported() -> None:
    own = {name: os.readlink(f"/proc/self/ns/{name}") for name in ("net", "pid")}
    report: JsonObject = {"namespaces": own, "NoNewPrivs": "1", "Seccomp": "2", "landlock": None}
    networks = [isolation_report.of_sandbox("bubblewrap", 1, None, {}, report)["network"]]
    report["namespaces"] = {"net": "net:[1]"}
    networks.append(isolation_report.of_sandbox("bubblewrap", 1, None, {}, report)["network"])
    assert networks == ["host", "none"]


def test_what_is_in_force_is_reported(sandboxes: Sandboxes) -> None:
    enforced = sandboxes.make().enforced
    assert enforced["namespaces"] == ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"]
    assert (enforced["capabilities"], enforced["no_new_privs"], enforced["network"]) == ("none", True, "none")
    if ROOT:
        assert enforced["uid"] >= 1_900_000_000
        assert enforced["cgroup"]["memory_bytes"] == 256 << 20
    else:
        assert enforced["uid"] == os.getuid()
