"""The bounds and walls of a sandbox, its start and its end."""

from __future__ import annotations

import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from era.errors import SandboxFailed
from tests.conftest import cgroups, eventually
from tests.drivers.as_user import traces
from tests.drivers.conformance.helpers import is_alive, says, shared
from tests.drivers.sandboxes import LIMITS

# -- bounds ---------------------------------------------------------------------------------------------------------


def test_the_deadline(sandboxes: Any, sandbox: Any) -> None:
    """SIGTERM first, so that a program may tidy up; what it had printed before is not lost."""
    code = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit('tidied'))
print('before')
for _ in range(1000): time.sleep(0.1)
"""
    begun = time.monotonic()
    result = sandboxes.run(sandbox, code, timeout=2)
    assert (result.stdout, result.stderr) == ("before\n", "tidied\n")
    assert (result.ended.exit_code, result.ended.cause) == (124, "timeout")
    assert 2 <= time.monotonic() - begun < 30
    assert result.ended.sandbox_alive


def test_a_run_can_be_killed(sandboxes: Any, sandbox: Any) -> None:
    result = sandboxes.run(sandbox, "import os, time; os.write(1, b'up\\n'); time.sleep(60)", meanwhile="kill")
    assert (result.stdout, result.ended.cause, result.ended.exit_code) == ("up\n", "killed", 137)
    assert result.ended.duration < 30
    assert says(sandboxes, sandbox, "print('well')") == "well\n"


def test_a_run_that_is_killed_after_its_deadline_was_out_of_time(sandboxes: Any, sandbox: Any) -> None:
    code = """
import os, signal, time
signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"out of time"))
while True:
    time.sleep(1)
"""
    result = sandboxes.run(sandbox, code, timeout=2, meanwhile="kill")
    assert result.stdout == "out of time"
    assert (result.ended.cause, result.ended.exit_code) == ("timeout", 124)


def test_output_is_bounded(sandboxes: Any, sandbox: Any) -> None:
    result = sandboxes.run(
        sandbox, "import sys\nfor _ in range(48): sys.stdout.write('x' * (1 << 16))\nprint('end', file=sys.stderr)"
    )
    assert result.stdout == "x" * LIMITS.output_bytes
    assert (result.ended.stdout_truncated, result.ended.stderr_truncated) == (True, False)
    assert (result.stderr, result.ended.exit_code) == ("end\n", 0)


def test_much_output_on_both_streams(sandboxes: Any, sandbox: Any) -> None:
    size = 10_000
    code = (
        "import sys\nfor i in range(80):\n"
        f"    sys.stdout.write(chr(65 + i % 26) * {size}); sys.stderr.write('e' * {size})"
    )
    result = sandboxes.run(sandbox, code)
    assert result.stdout == "".join(chr(65 + i % 26) * size for i in range(80))
    assert result.stderr == "e" * (80 * size)
    assert not result.ended.stdout_truncated


SCHEDULING = """
import os
print(os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0), sorted(os.sched_getaffinity(0)))
"""


def test_how_a_program_is_scheduled_is_its_own_affair(sandboxes: Any, sandbox: Any) -> None:
    """It may change that of itself and of its children. The next run is as if it hadn't, whatever it tries."""
    before = says(sandboxes, sandbox, SCHEDULING)
    code = """
import os
one = {min(os.sched_getaffinity(0))}
assert os.getppid() == 1
for number in (1, 0):
    for change in (
        lambda: os.setpriority(os.PRIO_USER, number, 5),
        lambda: os.setpriority(os.PRIO_PGRP, number, 6),
        lambda: os.setpriority(os.PRIO_PROCESS, number, 7),
        lambda: os.sched_setaffinity(number, one),
        lambda: os.sched_setscheduler(number, os.SCHED_BATCH, os.sched_param(0)),
        lambda: os.sched_setscheduler(number, os.SCHED_IDLE, os.sched_param(0)),
    ):
        try:
            change()
        except OSError:
            pass
print(os.getpriority(os.PRIO_PROCESS, 0), len(os.sched_getaffinity(0)))
"""
    assert says(sandboxes, sandbox, code) == "7 1\n"
    assert says(sandboxes, sandbox, SCHEDULING) == before


SETS_ID = """
import os
calls = {
    "chmod": lambda path: os.chmod(path, 0o6777),
    "fchmod": lambda path: os.fchmod(os.open(path, os.O_RDONLY), 0o4777),
    "fchmodat": lambda path: os.chmod(path, 0o2777, dir_fd=os.open(".", os.O_RDONLY)),
    "open": lambda path: os.open(path + "-opened", os.O_CREAT | os.O_WRONLY, 0o4777),
    "mknod": lambda path: os.mknod(path + "-made", 0o104777),
}
for name, call in calls.items():
    os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
    try: call(name); print("set by", name)
    except PermissionError: pass
os.path.isdir("mkdir") or os.mkdir("mkdir", 0o6777)
"""


def with_set_id(workspace: Path) -> list[str]:
    """The files on the host that have set-user-id or set-group-id."""
    return [path.name for path in workspace.iterdir() if path.lstat().st_mode & 0o6000]


def test_no_file_of_a_program_has_set_id(sandboxes: Any, sandbox: Any) -> None:
    assert says(sandboxes, sandbox, SETS_ID) == ""
    assert with_set_id(sandbox.workspace) == []


LIMITS_THE_SUPERVISOR = """
import resource
for name in ("NOFILE", "NPROC", "FSIZE", "AS", "CPU"):
    try: resource.prlimit(1, getattr(resource, f"RLIMIT_{name}"), (9, 9)); print("limited", name)
    except PermissionError: pass
"""


def test_no_program_sets_the_limits_of_later_runs(sandboxes: Any, sandbox: Any) -> None:
    assert says(sandboxes, sandbox, LIMITS_THE_SUPERVISOR) == ""
    assert says(sandboxes, sandbox, "print('well')") == "well\n"


MAKES_A_QUEUE = "import ctypes; print(ctypes.CDLL(None).mq_open(b'/queue', 0o{}, 0o600, None) >= 0)"


def test_no_message_queue_of_a_run_is_there_in_the_next(sandboxes: Any, sandbox: Any) -> None:
    says(sandboxes, sandbox, MAKES_A_QUEUE.format("102"))
    assert says(sandboxes, sandbox, MAKES_A_QUEUE.format("2")) == "False\n"


def test_a_daemon_does_not_outlive_the_run(sandboxes: Any, sandbox: Any) -> None:
    code = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True:
            time.sleep(0.01)
            open('alive', 'a').write('x')
    os._exit(0)
while not os.path.exists('alive'): time.sleep(0.01)
"""
    result = sandboxes.run(sandbox, code)
    assert (result.ended.exit_code, result.ended.reaped >= 1) == (0, True)
    size = (sandbox.workspace / "alive").stat().st_size
    time.sleep(0.1)
    assert (sandbox.workspace / "alive").stat().st_size == size


HEAP = "kept = []\nwhile True: kept.append(bytearray(1 << 20))"


def test_out_of_memory(sandboxes: Any) -> None:
    sandbox = sandboxes.make()
    result = sandboxes.run(sandbox, HEAP)
    assert result.ended.exit_code != 0
    assert result.ended.cause == "oom" or not sandbox.enforced["cgroup"]
    assert (
        says(sandboxes, sandbox if is_alive(sandboxes, sandbox) else shared(sandboxes, "python"), "print('well')")
        == "well\n"
    )
    sandboxes.close(sandbox)


def test_how_out_of_memory_looks(sandboxes: Any) -> None:
    """With a control group the kernel kills, without one the program gets an error. In gVisor, where who watches has no
    turn in time, it may get one before gVisor is killed, and may then have no memory left to say so."""
    sandbox = sandboxes.make()
    result = sandboxes.run(sandbox, HEAP)
    sandboxes.close(sandbox)
    lines = result.stderr.splitlines() or [""]
    look = (result.ended.cause, result.ended.exit_code, lines[-1] if result.ended.exit_code == 1 else "killed")
    if not sandbox.enforced["cgroup"]:
        assert look[1:] == (1, "MemoryError")
    elif sandbox.enforced["driver"] == "gvisor":
        assert look in {("oom", 137, "killed"), ("oom", 1, "MemoryError"), ("oom", 1, "")}
    else:
        assert look == ("oom", 137, "killed")


def test_too_many_processes(sandboxes: Any, sandbox: Any) -> None:
    code = """
import subprocess
n = 0
try:
    while n < 300:
        subprocess.Popen(['sleep', '60'])
        n += 1
except OSError: pass
print(n)
"""
    assert 30 < int(says(sandboxes, sandbox, code)) <= LIMITS.pids
    assert says(sandboxes, sandbox, "print('well')") == "well\n"


# -- walls ----------------------------------------------------------------------------------------------------------


def test_there_is_no_network(sandboxes: Any, sandbox: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        code = f"""
import socket
for family, address in ((socket.AF_INET, ('127.0.0.1', {listener.getsockname()[1]})),
                        (socket.AF_INET, ('192.0.2.1', 80)), (socket.AF_INET6, ('2001:db8::1', 80)),
                        (socket.AF_UNIX, '/run/systemd/private')):
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.settimeout(2)
        try: s.connect(address); print('connected', address)
        except OSError as error: pass
try: socket.getaddrinfo('localhost.example.com', 80); print('resolved')
except OSError: pass
print([name for _, name in socket.if_nameindex()])
"""
        assert says(sandboxes, sandbox, code) == "['lo']\n"


def test_tmp_is_fresh_in_each_run(sandboxes: Any, sandbox: Any) -> None:
    code = """
import os
for d in ('/tmp', '/dev/shm'):
    print(os.listdir(d))
    os.makedirs(d + '/era-test/b')
    open(d + '/era-test/c', 'w').close()
"""
    try:
        assert says(sandboxes, sandbox, code) == "[]\n[]\n"
        assert says(sandboxes, sandbox, code) == "[]\n[]\n"
    finally:
        for directory in ("/tmp/era-test", "/dev/shm/era-test"):
            shutil.rmtree(directory, ignore_errors=True)  # of the fake driver


def test_other_processes_are_invisible(sandboxes: Any, sandbox: Any) -> None:
    pids = says(sandboxes, sandbox, "import os; print(*filter(str.isdigit, os.listdir('/proc')), os.getppid())").split()
    assert len(pids) <= 3
    assert pids[-1] == "1"
    assert says(
        sandboxes, sandbox, "import os; print(os.getuid() == os.geteuid(), os.getgroups() in ([], [os.getgid()]))"
    )


def test_system_files_are_the_sandbox_s_own(sandboxes: Any, sandbox: Any) -> None:
    code = """
import os
print([name for name in ('/root', '/home', '/var', '/etc/shadow', '/sys/kernel/security') if os.path.exists(name)])
for path in ('/', '/usr', '/etc', '/etc/passwd', '/era', '/opt/node'):
    try: os.close(os.open(path + '/x' if os.path.isdir(path) else path, os.O_WRONLY | os.O_CREAT)); print('wrote', path)
    except OSError: pass
print(open('/proc/self/status').read().split('CapEff:')[1].split()[0])
"""
    result = says(sandboxes, sandbox, code).splitlines()
    assert result[0] == "[]"
    assert int(result[1], 16) == 0, result


@pytest.mark.parametrize("number", [9, 15])
def test_the_supervisor_can_t_be_killed(sandboxes: Any, number: int) -> None:
    sandbox = sandboxes.make()
    code = f"import os\ntry: os.kill(1, {number})\nexcept PermissionError: pass\nprint('on')"
    result = sandboxes.run(sandbox, code, timeout=5)
    sandboxes.close(sandbox)
    assert (result.stdout, result.ended.sandbox_alive) == ("on\n", True)


def test_dev_can_t_be_changed(sandboxes: Any) -> None:
    sandbox = sandboxes.make()
    result = sandboxes.run(sandbox, "open('/dev/mine', 'w')")
    sandboxes.close(sandbox)
    assert result.ended.exit_code == 1


# -- the sandbox itself ---------------------------------------------------------------------------------------------


def test_a_dead_sandbox_says_so_before_a_run(sandboxes: Any) -> None:
    sandbox = sandboxes.make()
    sandboxes.murder(sandbox)
    with pytest.raises(SandboxFailed):
        sandboxes.run(sandbox, "open('ran', 'w').close()")
    assert not is_alive(sandboxes, sandbox)
    assert not (sandbox.workspace / "ran").exists()
    sandboxes.close(sandbox)


@pytest.mark.parametrize("how", ["murder", "close"])
def test_a_sandbox_that_dies_under_a_run(sandboxes: Any, how: str) -> None:
    sandbox = sandboxes.make()
    result = sandboxes.run(sandbox, "import os, time; os.write(1, b'up\\n'); time.sleep(60)", meanwhile=how)
    assert (result.stdout, result.ended.sandbox_alive) == ("up\n", False)
    assert not is_alive(sandboxes, sandbox)
    sandboxes.close(sandbox)


def test_nothing_is_left_of_a_closed_sandbox(sandboxes: Any) -> None:
    def current_traces() -> Any:
        return sandboxes.traces() if sandboxes.far else traces(sandboxes)

    # What others share has what it needs made, but not a process more at some moment that nobody knows.
    shared(sandboxes, "python")
    sandboxes.close(sandboxes.shared.pop("python"))
    before = current_traces()
    sandbox = sandboxes.make()
    sandboxes.run(sandbox, "import os\nos.makedirs('a/' * 50)\nos.chmod('a', 0)")
    sandboxes.close(sandbox)
    sandboxes.close(sandbox)
    assert eventually(lambda: current_traces() == before), (current_traces(), before)
    assert not sandbox.workspace.parent.exists()
    assert [group for group in cgroups(sandboxes.cgroup_name) if sandbox.id in group] == []
    with pytest.raises(SandboxFailed):
        sandboxes.run(sandbox, "print('no')")
