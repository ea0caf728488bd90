"""Programs that use up a resource: only their own run ends, with the right cause."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from era.drivers import channel
from tests.conftest import descendants, eventually
from tests.drivers.sandboxes import LIMITS, WITHOUT_LANDLOCK, Sandboxes, Weakness

ROOT = os.geteuid() == 0

HEAP = "kept = []\nwhile True: kept.append(bytearray(1 << 20))"
MUCH_HEAP = "kept = [bytearray(1 << 20) for _ in range(400)]\nprint('GOT')"
MUCH_MEMFD = """
import os
for file in range(4):  # none of them over the bound of a file
    fd = os.memfd_create('m')
    for _ in range(100): os.write(fd, b'x' * (1 << 20))
print('GOT')
"""
MEMFD = "import os\nfd = os.memfd_create('m')\nwhile True: os.write(fd, b'x' * (1 << 20))"
CHILDREN = """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while True:
    try: os.fork()
    except OSError: pass
"""
THREADS = "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()"


def _still_well(sandboxes: Sandboxes, sandbox: object) -> None:
    result = sandboxes.run(sandbox, "print('well')")  # type: ignore[arg-type]  # a sandbox of this driver
    assert (result.stdout, result.ended.exit_code) == ("well\n", 0)


@pytest.mark.parametrize("code", [HEAP, MEMFD], ids=["heap", "memfd"])
def test_too_much_memory(sandboxes: Sandboxes, code: str) -> None:
    if not ROOT and code == MEMFD:
        pytest.skip("without a cgroup nothing bounds a memfd but the file size, and an ordinary user has no cgroup")
    sandbox = sandboxes.make()
    result = sandboxes.run(sandbox, code)
    if ROOT:
        assert (result.ended.cause, result.ended.exit_code) == ("oom", 137)
    else:
        assert result.ended.exit_code == 1
        assert "MemoryError" in result.stderr
    _still_well(sandboxes, sandbox)


A_CHILD_TAKES_TOO_MUCH = """
import os, sys
if not (pid := os.fork()):
    kept = []
    while True: kept.append(bytearray(1 << 20))
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_what_the_kernel_killed_in_one_run_is_not_blamed_on_the_next(sandboxes: Sandboxes) -> None:
    if not ROOT:
        pytest.skip("an ordinary user has no cgroup in which the kernel kills for want of memory")
    sandbox = sandboxes.make()
    first = sandboxes.run(sandbox, A_CHILD_TAKES_TOO_MUCH)
    assert (first.stdout, first.ended.cause, first.ended.exit_code) == ("-9\n", "exit", 0)
    ended = sandboxes.run(sandbox, "raise SystemExit(3)").ended
    assert (ended.cause, ended.exit_code) == ("exit", 3)
    ended = sandboxes.run(sandbox, A_CHILD_TAKES_TOO_MUCH + "raise SystemExit(3)").ended
    assert (ended.cause, ended.exit_code) == ("oom", 3), "it failed for want of memory"
    _still_well(sandboxes, sandbox)


@pytest.mark.parametrize("weak_sandboxes", [Weakness(limits=replace(LIMITS, memory_bytes=1 << 30))], indirect=True)
def test_with_more_memory_the_same_is_no_harm(weak_sandboxes: Sandboxes) -> None:
    """400 MiB, where sound sandboxes of these tests have 256."""
    sandbox = weak_sandboxes.make()
    assert [weak_sandboxes.run(sandbox, code).stdout for code in (MUCH_HEAP, MUCH_MEMFD)] == ["GOT\n", "GOT\n"]


@pytest.mark.parametrize("code", [MUCH_HEAP, MUCH_MEMFD], ids=["heap", "memfd"])
def test_the_same_programs_get_nothing_within_the_bound(sandboxes: Sandboxes, code: str) -> None:
    if not ROOT and code == MUCH_MEMFD:
        pytest.skip("without a cgroup nothing bounds a memfd but the file size, and an ordinary user has no cgroup")
    assert sandboxes.run(sandboxes.make(), code).stdout == ""


def test_a_fork_bomb_ends_at_the_deadline_and_leaves_nothing(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make()
    result = sandboxes.run(sandbox, CHILDREN, timeout=3)
    assert (result.ended.cause, result.ended.exit_code) == ("timeout", 124)
    assert 30 < result.ended.reaped <= 64 + 8
    _still_well(sandboxes, sandbox)
    if ROOT:
        procs = next(Path("/sys/fs/cgroup").glob(f"**/era-test-*/{sandbox.id}/cgroup.procs"))
        assert eventually(lambda: len(procs.read_text().split()) <= 3)  # bubblewrap, the supervisor, one spare


@pytest.mark.parametrize("weak_sandboxes", [Weakness(limits=replace(LIMITS, pids=400))], indirect=True)
def test_a_fork_bomb_goes_as_far_as_it_may(weak_sandboxes: Sandboxes) -> None:
    result = weak_sandboxes.run(weak_sandboxes.make(), CHILDREN, timeout=3)
    assert result.ended.reaped > 64 + 8


ORPHANS = """
import os, time

def fork():
    for _ in range(200):
        try: return os.fork()
        except BlockingIOError: time.sleep(0.05)
    raise SystemExit('there is no room for one more')

before = len([name for name in os.listdir('/proc') if name.isdigit()])
for _ in range(200):
    if not (pid := fork()):
        fork()
        os._exit(0)
    os.waitpid(pid, 0)
if not (pid := fork()): os._exit(0)
os.waitpid(pid, 0)
deadline = time.monotonic() + 30
while len([name for name in os.listdir('/proc') if name.isdigit()]) > before and time.monotonic() < deadline:
    time.sleep(0.01)  # a child of a child may still be ending
print('GOT')
"""


def test_what_has_ended_takes_no_room(sandboxes: Sandboxes) -> None:
    """Though its parent ended before it did; and it hasn't outlived the program."""
    result = sandboxes.run(sandboxes.make(), ORPHANS, timeout=60)
    assert (result.stdout, result.stderr, result.ended.reaped) == ("GOT\n", "", 0)


def test_threads_are_bounded(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make()
    result = sandboxes.run(sandbox, THREADS, timeout=3)
    assert "can't start new thread" in result.stderr
    _still_well(sandboxes, sandbox)


@pytest.mark.parametrize("directory", ["/tmp", "/dev/shm"])
def test_a_full_scratch_directory(sandboxes: Sandboxes, directory: str) -> None:
    sandbox = sandboxes.make()
    result = sandboxes.run(
        sandbox, f"f = open('{directory}/big', 'wb')\nwhile True: f.write(bytes(1 << 20)); f.flush()"
    )
    assert "No space left on device" in result.stderr
    gone = sandboxes.run(sandbox, f"import os; print(os.listdir('{directory}'))")
    assert gone.stdout == "[]\n"


FILES_WITHOUT_END = """
import itertools, os
os.chdir({directory!r})
for turn in {turns}: open(str(turn), 'w').close()
print('GOT')
"""


@pytest.mark.parametrize("directory", ["/tmp", "/dev/shm"])
def test_empty_files_without_end(sandboxes: Sandboxes, directory: str) -> None:
    """A tmpfs bounds bytes, and empty files have none."""
    sandbox = sandboxes.make()
    begun = time.monotonic()
    result = sandboxes.run(sandbox, FILES_WITHOUT_END.format(directory=directory, turns="itertools.count()"))
    assert time.monotonic() - begun < 15
    assert (result.ended.cause, result.ended.exit_code) == ("disk_full", 137)
    assert result.ended.disk_problem == f"{directory} holds more than 10000 files"
    gone = sandboxes.run(sandbox, f"import os; print(os.listdir('{directory}'))")
    assert gone.stdout == "[]\n"


STEALS = """
import fcntl, os, termios, time
stdout, stderr = (os.open(f'/proc/self/fd/{fd}', os.O_RDONLY | os.O_NONBLOCK) for fd in (1, 2))
is_unread = lambda: fcntl.ioctl(stderr, termios.FIONREAD, bytes(4)) != bytes(4)
for turn in range(400):
    stolen, times = False, turn % 40
    while not stolen or times > 0:
        times -= 1
        os.write(1, b'x')
        try: stolen = bool(os.read(stdout, 1))
        except BlockingIOError: stolen = False
    os.write(2, b'x')
    time.sleep(0.005)
    if is_unread() and not time.sleep(0.1) and is_unread():
        break  # who would read it waits for what was stolen
"""


def test_a_program_that_reads_its_own_output_holds_up_nobody(sandboxes: Sandboxes) -> None:
    code = STEALS + FILES_WITHOUT_END.format(directory="/tmp", turns="itertools.count()")
    sandbox = sandboxes.make()
    assert sandboxes.run(sandbox, code, timeout=15).ended.cause == "disk_full"
    _still_well(sandboxes, sandbox)


def test_directories_links_and_fifos_count_as_files(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make()
    for made in ("os.mkdir(str(turn))", "os.symlink('/', str(turn))", "os.mkfifo(str(turn))"):
        code = FILES_WITHOUT_END.replace("open(str(turn), 'w').close()", made)
        result = sandboxes.run(sandbox, code.format(directory="/tmp", turns="itertools.count()"))
        assert result.ended.cause == "disk_full", made


@pytest.mark.parametrize(
    "weak_sandboxes", [Weakness(supervisor={'int = config["scratch_entries"]': "int = 1 << 40"})], indirect=True
)
def test_files_without_a_bound_go_on(weak_sandboxes: Sandboxes) -> None:
    result = weak_sandboxes.run(
        weak_sandboxes.make(), FILES_WITHOUT_END.format(directory="/tmp", turns="range(40_000)")
    )
    assert (result.stdout, result.ended.cause) == ("GOT\n", "exit")


def test_as_many_files_as_may_be_and_what_ends_first_are_no_fault(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make()
    code = FILES_WITHOUT_END + "import time; time.sleep(0.3)"
    result = sandboxes.run(sandbox, code.format(directory="/tmp", turns="range(9_900)"))
    assert (result.stdout, result.ended.cause) == ("GOT\n", "exit")


def test_a_file_over_its_bound(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make()
    result = sandboxes.run(sandbox, "open('big', 'wb').truncate(300 << 20)")
    assert "File too large" in result.stderr


def test_deep_trees_and_many_files_are_cleared_away(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make()
    code = (
        "import os\n"
        "os.chdir('/tmp')\n"
        "for i in range(2000):\n    os.mkdir('d'); os.chdir('d')\n"
        "os.chdir('/dev/shm')\n"
        "for i in range(5000): open(str(i), 'w').close()\n"
        "os.mkdir('locked'); open('locked/f', 'w').close(); os.chmod('locked', 0)\n"
    )
    result = sandboxes.run(sandbox, code)
    assert result.ended.exit_code == 0, result.stderr
    assert sandboxes.run(sandbox, "import os; print(os.listdir('/tmp'), os.listdir('/dev/shm'))").stdout == "[] []\n"


@pytest.mark.parametrize("call", ["semget(1, 1, {})", "shmget(1, 4096, {})", "msgget(1, {})"])
def test_system_v_objects_are_not_handed_on(sandboxes: Sandboxes, call: str) -> None:
    """System V objects outlive processes, but not the run."""
    sandbox = sandboxes.make()
    code = "import ctypes; print(ctypes.CDLL(None)." + call + ")"
    assert sandboxes.run(sandbox, code.format("0o1600")).stdout != "-1\n"
    assert sandboxes.run(sandbox, code.format("0o600")).stdout == "-1\n"


HEARS_NOTHING = (
    "import os, signal, time\n"
    "for number in range(1, 32):\n"
    "    if number not in (9, 19): signal.signal(number, signal.SIG_IGN)\n"
    "for _ in range(5):\n    os.fork()\n"
    "os.setsid() if os.getpid() != os.getsid(0) else None\n"
    "print('in', flush=True)\n"
    "time.sleep({seconds})\n"
)


def test_a_run_costs_no_more_than_its_deadline(sandboxes: Sandboxes) -> None:
    """SIGTERM at the deadline, SIGKILL two seconds later, whatever the program does about it."""
    sandbox = sandboxes.make()
    begun = time.monotonic()
    result = sandboxes.run(sandbox, HEARS_NOTHING.format(seconds=60), timeout=3)
    assert 4.9 < time.monotonic() - begun < 30
    assert (result.ended.cause, result.ended.exit_code) == ("timeout", 124)
    assert "in" in result.stdout
    _still_well(sandboxes, sandbox)


@pytest.mark.parametrize(
    "weak_sandboxes", [Weakness(supervisor={"deadline += GRACE": "deadline += 60"})], indirect=True
)
def test_a_run_that_is_only_asked_to_end_takes_its_time(weak_sandboxes: Sandboxes) -> None:
    begun = time.monotonic()
    weak_sandboxes.run(weak_sandboxes.make(), HEARS_NOTHING.format(seconds=4), timeout=0.5)
    assert time.monotonic() - begun >= 4


TALKS = """
import os, threading
def talk(fd):
    while True: os.write(fd, b'x' * 65536)
threading.Thread(target=talk, args=(2,)).start()
talk(1)
"""


def test_output_without_end_or_line_is_cut_off(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make()
    result = sandboxes.run(sandbox, TALKS, timeout=3)
    assert (result.ended.cause, result.ended.exit_code) == ("timeout", 124)
    assert (result.ended.stdout_truncated, result.ended.stderr_truncated) == (True, True)
    assert (len(result.stdout), len(result.stderr)) == (1 << 20, 1 << 20)
    _still_well(sandboxes, sandbox)


@pytest.mark.parametrize(
    "weak_sandboxes", [Weakness(supervisor={'b"E"}, output_limit)': 'b"E"}, 1 << 40)'})], indirect=True
)
def test_output_without_a_bound_goes_on(weak_sandboxes: Sandboxes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_has_room", lambda *_: True)  # the service's own look at it
    result = weak_sandboxes.run(weak_sandboxes.make(), TALKS, timeout=3)
    assert len(result.stdout) > 2 << 20


LEAVES = {
    "a daemon of its own session": "if os.fork() == 0: os.setsid(); quiet(); time.sleep(60)",
    "a double fork": """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: quiet(); time.sleep(60)
    os._exit(0)
os.wait()""",
    "one that holds the output open": "if os.fork() == 0: time.sleep(60)",
    "one that goes on writing": """
if os.fork() == 0:
    while True: os.write(1, b'.')""",
    "one that is stopped": "if os.fork() == 0: os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(0.1)",
    "one that ignores signals": """
if os.fork() == 0:
    for number in set(range(1, 32)) - {9, 19}: signal.signal(number, signal.SIG_IGN)
    time.sleep(60)
time.sleep(0.1)""",
}
QUIET = "import os, signal, time\ndef quiet():\n    for fd in range(3): os.close(fd)\n"


@pytest.mark.parametrize("what", LEAVES)
def test_nothing_outlives_the_program(sandboxes: Sandboxes, what: str) -> None:
    sandbox = sandboxes.make()
    begun = time.monotonic()
    result = sandboxes.run(sandbox, QUIET + LEAVES[what])
    assert time.monotonic() - begun < 15
    assert (result.ended.cause, result.ended.exit_code) == ("exit", 0)
    assert result.ended.reaped == 1
    listed = sandboxes.run(
        sandbox, "import os; print(sorted(int(name) for name in os.listdir('/proc') if name.isdigit())[0:3])"
    )
    assert listed.stdout.count(",") == 1  # the supervisor and this program
    assert len(descendants(sandbox._init_pid)) <= 1  # the spare of the next run


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
def test_a_daemon_outlives_a_program_that_nobody_clears_up_after(weak_sandboxes: Sandboxes) -> None:
    sandbox = weak_sandboxes.make()
    result = weak_sandboxes.run(sandbox, QUIET + LEAVES["a daemon of its own session"])
    assert result.ended.reaped == 0
    assert eventually(lambda: len(descendants(sandbox._init_pid)) > 1)


@pytest.mark.parametrize(
    "code",
    [
        "import time; time.sleep(60)",
        "import os; os.kill(0, 19)",
        "while True: pass",
    ],
    ids=["sleep", "stopped with all its group", "busy"],
)
def test_a_program_past_its_deadline_is_ended(sandboxes: Sandboxes, code: str) -> None:
    sandbox = sandboxes.make()
    begun = time.monotonic()
    result = sandboxes.run(sandbox, code, timeout=0.3)
    assert 0.3 <= time.monotonic() - begun < 30
    assert (result.ended.cause, result.ended.exit_code) == ("timeout", 124)
    _still_well(sandboxes, sandbox)


UNREAD = """
import socket
kept, sent = [], 0
for _ in range(200):
    with socket.create_server(('127.0.0.1', 0)) as server:
        kept += [socket.create_connection(server.getsockname()), server.accept()[0]]
    kept[-2].setblocking(False)
    try:
        while True: sent += kept[-2].send(bytes(1 << 16))
    except BlockingIOError: pass
print(sent)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user has no cgroup")
def test_what_lies_unread_in_sockets_is_bounded(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make()
    result = sandboxes.run(sandbox, UNREAD, timeout=60)
    assert 0 < int(result.stdout) < LIMITS.memory_bytes, result.stderr  # without a bound 700 MiB
    in_force = sandbox.enforced["cgroup"]
    assert in_force["version"] == 2 or in_force["socket_bytes"] == LIMITS.memory_bytes // 8


@pytest.mark.soak  # as test_standing_back.py has it, too
@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user has no cgroup")
def test_a_long_run_gives_way_and_the_next_does_not(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make()
    assert sandbox._group is not None
    idle = sandbox._group.directories["cpu"] / "cpu.idle"
    if not idle.exists():
        pytest.skip("this kernel has no cpu.idle (Linux 5.15)")
    assert idle.read_text() == "0\n"
    long = threading.Thread(target=sandboxes.run, args=(sandbox, "import time\nwhile time.process_time() < 1.5: pass"))
    long.start()
    assert eventually(lambda: idle.read_text() == "1\n")
    long.join()
    assert idle.read_text() == "0\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user has no cgroup")
def test_writing_to_disk_is_bounded(sandboxes: Sandboxes) -> None:
    """Bounded by the kernel, and reported as it is read back; what that does to others is measured by bench/."""
    sandbox = sandboxes._runner.run(sandboxes.driver.create("python", replace(LIMITS, write_bytes_per_second=8 << 20)))
    bounds = {name: value for name, value in sandbox.enforced["cgroup"].items() if "write" in name}
    if not bounds:
        pytest.skip("what the tests write to is no disk whose writes can be bounded")
    what = "synced" if sandbox.enforced["cgroup"]["version"] == 1 else "disk"
    assert bounds == {f"{what}_write_bytes_per_second": 8 << 20}
    code = """
import os, time
began = time.time()
with open('f', 'wb') as file:
    file.write(bytes(24 << 20)); os.fsync(file.fileno())
print(time.time() - began)
"""
    bounded, free = (float(sandboxes.run(which, code).stdout) for which in (sandbox, sandboxes.make()))
    assert bounded > 1.5
    assert free < bounded
