"""Random system calls with random arguments, from inside. Their effects stay in their own run."""

from __future__ import annotations

import os
import random
import socket
import time
from pathlib import Path

import pytest

from era.errors import SandboxFailed
from tests.conftest import descendants, is_running, mounts
from tests.drivers.sandboxes import Sandboxes

# Children make the calls, since some end or block a process; what blocks is killed. They count in memory that they
# share. A number is mostly one that exists, an argument mostly something that a call may take for meant.
FUZZ = """
import ctypes, mmap, os, random, signal, time
SEED, WANTED = {seed}, {wanted}
made = mmap.mmap(-1, 4096)
libc = ctypes.CDLL(None)
libc.syscall.argtypes = [ctypes.c_long] * 7
buffer = ctypes.create_string_buffer(1 << 16)
place = ctypes.addressof(buffer)
paths = [ctypes.create_string_buffer(path) for path in (
    b'/', b'.', b'/workspace', b'/tmp/a', b'/dev/null', b'/proc/1/mem', b'/proc/sys/kernel/core_pattern',
    b'/etc/passwd')]
interesting = [0, 1, 2, 3, 4, 8, 16, 100, 0xffff, -1, -100, 1 << 28, 1 << 31, (1 << 32) - 1, 1 << 62, place,
               place + 100, *map(ctypes.addressof, paths)]

def argument(chance):
    kind = chance.random()
    if kind < 0.7: return chance.choice(interesting)
    if kind < 0.85: return chance.randrange(0, 300)
    if kind < 0.95: return 1 << chance.randrange(63)
    return chance.randrange(-1 << 63, 1 << 63)

def fuzz(seed):
    for number in SIGNALS: signal.signal(number, signal.SIG_DFL)
    chance = random.Random(seed)
    for fd in range(3): os.dup2(os.open('/dev/null', os.O_RDWR), fd)
    for _ in range(60):
        number = chance.randrange(470) if chance.random() < 0.97 else chance.randrange(1 << 31)
        arguments = [argument(chance) for _ in range(6)]
        buffer[0:64] = chance.randbytes(64)
        count = int.from_bytes(made[:8], 'little') + 1
        made[:8] = count.to_bytes(8, 'little')
        libc.syscall(number, *arguments)

SIGNALS = signal.valid_signals() - {{signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}}
for number in SIGNALS: signal.signal(number, signal.SIG_IGN)
turn = 0
while int.from_bytes(made[:8], 'little') < WANTED:
    turn += 1
    pid = os.fork()
    if pid == 0:
        try: fuzz(SEED * 1_000_003 + turn)
        finally: os._exit(0)
    deadline = time.monotonic() + 0.03
    while time.monotonic() < deadline and os.waitpid(pid, os.WNOHANG) == (0, 0): time.sleep(0.001)
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ChildProcessError, ProcessLookupError): pass
    print(int.from_bytes(made[:8], 'little'), flush=True)
"""

WATCHED = ("core_pattern", "hostname", "domainname", "pid_max", "printk", "randomize_va_space")


def _host() -> dict[str, object]:
    """The state of the host that an escape would most likely change."""
    return {
        **{name: Path(f"/proc/sys/kernel/{name}").read_text() for name in WATCHED},
        "name": socket.gethostname(),
        "mounts": mounts(),
        "swaps": Path("/proc/swaps").read_text(),
        "limits": Path("/proc/self/limits").read_text(),
    }


def fuzz(sandboxes: Sandboxes, canary: Path, calls: int, seed: int, *, lives: bool = True, timeout: float = 20) -> None:
    """Run `calls` random calls, in runs of at most `timeout` seconds. With `lives`, no sandbox may die of them."""
    print(f"seed {seed}")
    canary.write_text("untouched")
    canary.chmod(0o666)
    before, clock, bystander = _host(), time.time() - time.monotonic(), sandboxes.make()
    made = 0
    while made < calls:
        sandbox = sandboxes.make()
        wanted = min(calls - made, 2500)
        result = sandboxes.run(sandbox, FUZZ.format(seed=seed, wanted=wanted), timeout=timeout)
        seed += 1
        made += int(result.stdout.split()[-1]) if result.stdout else 1
        assert result.ended.sandbox_alive or not lives
        try:
            well = sandboxes.run(sandbox, "print('well')")
            assert (well.stdout, well.stderr, well.ended.cause) == ("well\n", "", "exit"), f"seed {seed - 1}: {well}"
        except SandboxFailed:
            assert not lives
        inside = [sandbox._init_pid, *descendants(sandbox._init_pid)]
        sandboxes.close(sandbox)
        assert [pid for pid in inside if is_running(pid)] == []
    assert sandboxes.run(bystander, "print('well')").stdout == "well\n"
    sandboxes.close(bystander)
    assert _host() == before
    assert abs(time.time() - time.monotonic() - clock) < 1
    assert canary.read_text() == "untouched"
    assert canary.stat().st_mode & 0o7777 == 0o666


def test_ten_thousand_random_system_calls_stay_inside(sandboxes: Sandboxes, tmp_path: Path) -> None:
    fuzz(sandboxes, tmp_path / "canary", 10_000, int(os.environ.get("ERA_TEST_SEED", random.randrange(1 << 32))))


@pytest.mark.soak
def test_very_many_random_system_calls_stay_inside(sandboxes: Sandboxes, tmp_path: Path) -> None:
    fuzz(sandboxes, tmp_path / "canary", 300_000, int(os.environ.get("ERA_TEST_SEED", random.randrange(1 << 32))))
