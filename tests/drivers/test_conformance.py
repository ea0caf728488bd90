"""One suite for all drivers: how a sandbox behaves, whatever makes it.

Where a driver is known to fall short stands in KNOWN, with the reason. Such a test must fail: one that passes after all
is an error, so that the table stays true.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from era.drivers.guest import GUEST_LISTENERS
from era.errors import SandboxFailed
from tests.conftest import cgroups, eventually
from tests.drivers.boxes import LIMITS
from tests.drivers.elsewhere import opened, traces

ROOT = os.geteuid() == 0

DRIVERS = ["fake", "bubblewrap", "bubblewrap as a user", "gvisor", "gvisor as a user"]

NO_WALLS = "the fake driver has no isolation"

KNOWN: dict[tuple[str, str], str] = {
    **{
        (behaviour, "fake"): NO_WALLS
        for behaviour in (
            "test_the_working_directory",
            "test_there_is_no_network",
            "test_tmp_is_fresh_in_each_run",
            "test_other_processes_are_invisible",
            "test_system_files_are_the_sandbox_s_own",
        )
    },
}
KNOWN["test_output_before_an_exit_of_node_s_is_not_cut", "fake"] = "its pipes have the usual size"
KNOWN["test_how_out_of_memory_looks", "gvisor"] = (
    "the host kills what stands for the program's process, which gVisor takes for an exit with 1"
)
KNOWN["test_how_out_of_memory_looks", "gvisor as a user"] = (
    "gVisor's memory file can't grow, and the program gets SIGSEGV when it touches what it was promised"
)
for driver in ("gvisor", "gvisor as a user"):
    KNOWN["test_the_supervisor_can_t_be_killed", driver] = "gVisor does not protect PID 1 as Linux does"
    KNOWN["test_dev_can_t_be_changed", driver] = (
        "a read-only /dev in gVisor has read-only devices: the sandbox goes instead"
    )
NEVER: dict[tuple[str, str], str] = {
    ("test_how_out_of_memory_looks", "fake"): "it would be the host's memory",
    ("test_dev_can_t_be_changed", "fake"): "it would be the host's /dev",
    ("test_the_supervisor_can_t_be_killed", "fake"): "it would be the host's init",
    ("test_out_of_memory", "fake"): "it would be the host's memory",
    ("test_a_daemon_does_not_outlive_the_run", "fake"): "it would outlive the tests",
    ("test_too_many_processes", "fake"): "they would be the host's processes",
}
"""What isn't even to be tried."""

for test in (
    "test_a_guest_listener_leads_to_the_host_while_that_listens",
    "test_connections_to_a_guest_listener_are_whole",
    "test_a_connection_that_stands_still_holds_up_no_other",
    "test_the_end_of_a_run_is_the_end_of_its_connections",
    "test_many_connections_at_a_time",
    "test_the_host_can_connect_to_a_port_inside",
):
    NEVER[test, "fake"] = "it has no network of its own, and so no guest_listener"


@pytest.fixture(scope="module", params=DRIVERS)
def boxes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with opened(request.param, tmp_path_factory.mktemp("boxes")) as made:
        yield made


@pytest.fixture(autouse=True)
def known(request: pytest.FixtureRequest) -> None:
    test, driver = request.node.originalname, request.node.callspec.params["boxes"]
    if reason := NEVER.get((test, driver)):
        pytest.xfail(reason)
    if reason := KNOWN.get((test, driver)):
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))


@pytest.fixture
def box(boxes: Any) -> Any:
    """A sandbox that other tests have used, for those that don't care."""
    return _shared(boxes, "python")


def _shared(boxes: Any, language: str) -> Any:
    found = boxes.shared.get(language)
    if found is None or not _alive(boxes, found):
        found = boxes.shared[language] = boxes.make(language)
    return found


def _alive(boxes: Any, box: Any) -> bool:
    return bool(boxes.alive(box) if boxes.far else box.alive)


def _says(boxes: Any, box: Any, code: str, **more: Any) -> str:
    told = boxes.run(box, code, **more)
    assert (told.ended.exit_code, told.ended.cause) == (0, "exit"), told.stdout + told.stderr
    return str(told.stdout)


# -- what a program is ----------------------------------------------------------------------------------------------


def test_output_on_both_streams_each_in_order(boxes: Any, box: Any) -> None:
    code = "import sys\nfor i in range(200):\n    print('out', i)\n    print('err', i, file=sys.stderr)"
    told = boxes.run(box, code)
    assert told.stdout.splitlines() == [f"out {i}" for i in range(200)]
    assert told.stderr.splitlines() == [f"err {i}" for i in range(200)]


@pytest.mark.parametrize(
    ("code", "exit_code", "cause"),
    [
        ("import sys; sys.exit(7)", 7, "exit"),
        ("import os; print('no flush', end=''); os._exit(3)", 3, "exit"),
        ("import os; os.kill(os.getpid(), 9)", 137, "signal"),
        ("import os; os.kill(os.getpid(), 15)", 143, "signal"),
        ("import ctypes; ctypes.string_at(0)", 139, "signal"),
    ],
)
def test_how_it_ended(boxes: Any, box: Any, code: str, exit_code: int, cause: str) -> None:
    ended = boxes.run(box, code).ended
    assert (ended.exit_code, ended.cause, ended.sandbox_alive) == (exit_code, cause, True)


def test_an_exception_names_the_program_s_file_only(boxes: Any, box: Any) -> None:
    told = boxes.run(box, "def f():\n    raise ValueError('mine')\nf()\n")
    assert told.ended.exit_code == 1
    lines = told.stderr.splitlines()
    assert (lines[0], lines[-1]) == ("Traceback (most recent call last):", "ValueError: mine")
    files = [line.strip() for line in lines if "File " in line]
    assert len(files) == 2
    assert all("main.py" in line for line in files)


def test_stdin_is_empty(boxes: Any, box: Any) -> None:
    assert _says(boxes, box, "import sys; print(repr(sys.stdin.read()))") == "''\n"


def test_arguments(boxes: Any, box: Any) -> None:
    assert _says(boxes, box, "import sys; print(sys.argv, __name__, __file__.endswith('main.py'))") == (
        "['main.py'] __main__ True\n"
    )


def test_the_working_directory(boxes: Any, box: Any) -> None:
    assert _says(boxes, box, "import os; print(os.getcwd())") == "/workspace\n"


def test_env_is_seen_by_its_own_run_only(boxes: Any, box: Any) -> None:
    code = "import os; print(os.environ.get('COLOUR'))"
    assert _says(boxes, box, code, env={"COLOUR": "grün"}) == "grün\n"
    assert _says(boxes, box, code) == "None\n"
    assert _says(boxes, box, code, env={"COLOUR": "red", "PYTHONHASHSEED": "0"}) == "red\n"
    assert _says(boxes, box, "import os; print(os.environ['HOME'], 'ERA_GUEST' in os.environ)") == "/tmp False\n"


def test_exit_handlers_run_and_files_are_flushed(boxes: Any, box: Any) -> None:
    code = "import atexit\natexit.register(print, 'bye')\nf = open('unflushed', 'w')\nf.write('all of it')\nprint('hi')"
    assert _says(boxes, box, code) == "hi\nbye\n"
    assert (box.workspace / "unflushed").read_text() == "all of it"


def test_unicode(boxes: Any, box: Any) -> None:
    code = "open('żółw 🐢', 'w').write('日本'); print('żółw 🐢', open('żółw 🐢').read())"
    assert _says(boxes, box, code) == "żółw 🐢 日本\n"
    assert (box.workspace / "żółw 🐢").read_text() == "日本"


def test_processes_and_threads(boxes: Any, box: Any) -> None:
    code = """
import multiprocessing, os, subprocess, threading
def square(n):
    return n * n
if __name__ == "__main__":
    pid = os.fork()
    if pid == 0:
        os._exit(5)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    done = []
    threads = [threading.Thread(target=done.append, args=(n,)) for n in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    print(sorted(done))
    with multiprocessing.Pool(2) as pool:
        print(pool.map(square, range(4)))
    print(subprocess.run(["sh", "-c", "echo shell"], capture_output=True, text=True).stdout, end="")
"""
    assert _says(boxes, box, code) == "5\n[0, 1, 2, 3, 4, 5, 6, 7]\n[0, 1, 4, 9]\nshell\n"


def test_devices(boxes: Any, box: Any) -> None:
    code = """
import os, subprocess
with open('/dev/null', 'w') as null: null.write('x')
subprocess.run(['true'], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
print(len(open('/dev/urandom', 'rb').read(8)), open('/dev/zero', 'rb').read(2), open('/dev/null').read() == '')
try:
    with open('/dev/full', 'w') as full: full.write('x')
except OSError as error: print(error.errno)
print(os.readlink('/dev/fd'), open('/dev/stdin').read() == '')
"""
    assert _says(boxes, box, code) == "8 b'\\x00\\x00' True\n28\n/proc/self/fd True\n"


def test_sqlite(boxes: Any, box: Any) -> None:
    code = """
import sqlite3
db = sqlite3.connect("mine.sqlite")
print(db.execute("PRAGMA journal_mode = wal").fetchone()[0])
db.execute("CREATE TABLE IF NOT EXISTS t (n)")
db.execute("INSERT INTO t VALUES (1)")
db.commit()
print(db.execute("SELECT count(*) FROM t").fetchone()[0])
db.close()
"""
    (box.workspace / "mine.sqlite").unlink(missing_ok=True)
    assert _says(boxes, box, code) == "wal\n1\n"
    assert _says(boxes, box, code) == "wal\n2\n"


# -- state and files ------------------------------------------------------------------------------------------------

STATE = "import json, os\npath = '.session_data.json'\n"


def test_the_state_goes_in_and_out(boxes: Any, box: Any) -> None:
    code = STATE + "data = json.load(open(path)); data['n'] += 1; json.dump(data, open(path, 'w'))"
    assert json.loads(boxes.run(box, code, state=b'{"n": 41}').ended.state) == {"n": 42}
    assert boxes.run(box, "pass", state=b'{"as": "it was"}').ended.state == b'{"as": "it was"}'


def test_a_state_that_is_gone(boxes: Any, box: Any) -> None:
    ended = boxes.run(box, STATE + "os.unlink(path)", state=b'{"n": 1}').ended
    assert (ended.state, ended.state_problem) == (None, None)


@pytest.mark.parametrize("how", ["os.symlink('/etc/passwd', path)", "os.mkfifo(path)", "os.mkdir(path)"])
def test_a_state_that_can_t_be_read(boxes: Any, box: Any, how: str) -> None:
    ended = boxes.run(box, STATE + f"os.unlink(path); {how}").ended
    assert ended.state is None
    assert ended.state_problem


def test_files_stay_and_the_host_s_are_seen(boxes: Any, box: Any) -> None:
    """Between runs the host may write whatever it likes: what the sandbox saw before doesn't count."""
    look = "import os\nprint(sorted(n for n in os.listdir('.') if n[0] == '_'), open('_a').read())"
    first = "open('_a', 'w').write('one'); open('_gone', 'w').close(); os.mkdir('_d')\n"
    assert _says(boxes, box, "import os\n" + first + look) == "['_a', '_d', '_gone'] one\n"
    assert (box.workspace / "_a").read_text() == "one"
    assert _says(boxes, box, look) == "['_a', '_d', '_gone'] one\n"

    (box.workspace / "_a").write_text("two, and longer")
    (box.workspace / "_gone").unlink()
    (box.workspace / "_d").rename(box.workspace / "_e")
    (box.workspace / "_new").write_text("new")
    (box.workspace / "_e" / "below").write_text("deep")
    for path in ("_a", "_new", "_e/below"):
        os.chown(box.workspace / path, box.uid if box.uid is not None else boxes_uid(boxes), -1)
    assert _says(boxes, box, look + "\nprint(open('_new').read(), open('_e/below').read())") == (
        "['_a', '_e', '_new'] two, and longer\nnew deep\n"
    )
    (box.workspace / "_a").write_text("TWO, AND LONGER")  # the same size
    assert _says(boxes, box, "print(open('_a').read()); open('_a', 'a').write('!')") == "TWO, AND LONGER\n"
    replacement = box.workspace / "_b"
    replacement.write_text("other")
    replacement.rename(box.workspace / "_a")
    assert _says(boxes, box, "print(open('_a').read())") == "other\n"


def boxes_uid(boxes: Any) -> int:
    return int(boxes.uid if boxes.far else os.getuid())


def test_files_are_the_sandbox_s_own(boxes: Any, box: Any) -> None:
    code = "import os\nopen('mine', 'w').close(); os.chmod('mine', 0o600)\nprint(os.stat('mine').st_uid == os.getuid())"
    assert _says(boxes, box, code) == "True\n"
    assert (box.workspace / "mine").stat().st_uid == (box.uid if box.uid is not None else boxes_uid(boxes))


def test_files_given_with_a_run(boxes: Any, box: Any) -> None:
    assert _says(boxes, box, "import given.it; print(given.it.x)", files={"given/it.py": b"x = 5"}) == "5\n"


def test_ephemeral_leaves_nothing(boxes: Any) -> None:
    box = boxes.make()
    boxes.run(box, "import os; os.makedirs('a/b'); open('a/b/c', 'w').close()", ephemeral=True)
    assert eventually(lambda: not os.listdir(box.workspace))
    boxes.close(box)


# -- guest listeners --

HOST = (
    f"import socket\nHOST = ('127.0.0.1', {GUEST_LISTENERS['storage']})\n"
    + """
def through(sock):
    parts = []
    while part := sock.recv(1 << 16): parts.append(part)
    return b"".join(parts)
"""
)


def test_a_guest_listener_leads_to_the_host_while_that_listens(boxes: Any) -> None:
    box = boxes.make()
    code = HOST + "with socket.create_connection(HOST, 5) as s: s.sendall(b'ehello'); s.shutdown(1); print(through(s))"
    for _ in range(2):
        assert "ConnectionRefusedError" in boxes.run(box, code).stderr
        for _ in range(2):
            told = boxes.run(box, code, guest_listener=True)
            assert (told.stdout, told.connections) == ("b'hello'\n", ["e ended"]), told.stderr
    boxes.close(box)


def test_connections_to_a_guest_listener_are_whole(boxes: Any, box: Any) -> None:
    """Large, both ways at once, ended on one side before the other, and broken off."""
    code = (
        HOST
        + """
import hashlib, os, threading
data = os.urandom(1 << 16) * 64
def send(sock):
    sock.sendall(b"e" + data)
    sock.shutdown(socket.SHUT_WR)
with socket.create_connection(HOST, 10) as sock:
    sender = threading.Thread(target=send, args=(sock,)); sender.start()
    heard = through(sock); sender.join()
    print(len(heard), hashlib.sha256(heard).digest() == hashlib.sha256(data).digest())
with socket.create_connection(HOST, 10) as sock:
    sock.sendall(b"w")
    print(len(through(sock)))
with socket.create_connection(HOST, 10) as sock:
    sock.sendall(b"r")
    try: print(sock.recv(1))
    except ConnectionResetError: print(b"")
    try:
        for _ in range(1000): sock.sendall(bytes(1 << 16))
        print("nobody minds")
    except OSError as error: print(type(error).__name__)
"""
    )
    told = boxes.run(box, code, guest_listener=True)
    lines = told.stdout.splitlines()
    assert lines[:3] == [f"{1 << 22} True", f"{1 << 20}", "b''"], told.stderr
    assert lines[3] in ("BrokenPipeError", "ConnectionResetError")
    assert told.connections == ["e ended", "r ended", "w ended"]


def test_a_connection_that_stands_still_holds_up_no_other(boxes: Any, box: Any) -> None:
    code = (
        HOST
        + """
import time
stuck = [socket.create_connection(HOST, 5) for _ in range(8)]
written = 0
for sock in stuck:
    sock.sendall(b"s")
    sock.setblocking(False)
still = time.monotonic() + 1
while time.monotonic() < still:
    for sock in stuck:
        try:
            written += sock.send(bytes(1 << 16))
            still = time.monotonic() + 1
        except BlockingIOError: pass
    assert written < 1 << 29, "there is no end to what it takes"
    time.sleep(0.01)
with socket.create_connection(HOST, 5) as sock:
    sock.sendall(b"ehello"); sock.shutdown(socket.SHUT_WR)
    print(through(sock))
"""
    )
    told = boxes.run(box, code, guest_listener=True)
    assert told.stdout == "b'hello'\n", told.stderr
    assert told.connections == ["e ended", *["s ended"] * 8]


def test_the_end_of_a_run_is_the_end_of_its_connections(boxes: Any, box: Any) -> None:
    code = (
        HOST
        + """
import os, time
held = [socket.create_connection(HOST, 5) for _ in range(3)]
for sock, kind in zip(held, (b"e", b"s", b"e")):
    sock.sendall(kind + b"x" * 100)
assert held[0].recv(1) == b"x"
if os.fork() == 0:
    os.setsid()
    while True: time.sleep(10)
"""
    )
    for _ in range(2):
        told = boxes.run(box, code, guest_listener=True)
        assert told.ended.exit_code == 0, told.stderr
        assert sorted(one[0] for one in told.connections) == ["e", "e", "s"]


def test_many_connections_at_a_time(boxes: Any, box: Any) -> None:
    code = (
        HOST
        + """
import threading
heard = []
def ask(n):
    with socket.create_connection(HOST, 20) as sock:
        sock.sendall(b"e%d" % n); sock.shutdown(socket.SHUT_WR)
        heard.append(int(through(sock)))
for wave in range(8):
    threads = [threading.Thread(target=ask, args=(wave * 16 + n,)) for n in range(16)]
    for one in threads: one.start()
    for one in threads: one.join()
print(sorted(heard) == list(range(128)))
"""
    )
    told = boxes.run(box, code, guest_listener=True, timeout=60)
    assert told.stdout == "True\n", told.stderr
    assert told.connections == ["e ended"] * 128


def test_the_host_can_connect_to_a_port_inside(boxes: Any) -> None:
    box = boxes.make()
    code = """
import os, socket
with socket.create_server(("127.0.0.1", 0)) as server:
    os.write(1, b"%d\\n" % server.getsockname()[1])
    sock, _ = server.accept()
    heard = b""
    while part := sock.recv(100): heard += part
    sock.sendall(heard.upper() * 100_000)
    sock.close()
"""
    for _ in range(2):
        told = boxes.run(box, code, meanwhile="to")
        assert [(len(one), set(one.split("FROM "))) for one in told.connections] == [(1_200_000, {"", "OUTSIDE"})]
        told = boxes.run(box, "import os, time; os.write(1, b'9\\n')", meanwhile="to")
        assert told.connections == ["refused"]
    boxes.close(box)


# -- bounds ---------------------------------------------------------------------------------------------------------


def test_the_deadline(boxes: Any, box: Any) -> None:
    """SIGTERM first, so that a program may tidy up; what it had printed before is not lost."""
    code = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit('tidied'))
print('before')
for _ in range(1000): time.sleep(0.1)
"""
    begun = time.monotonic()
    told = boxes.run(box, code, timeout=0.5)
    assert (told.stdout, told.stderr) == ("before\n", "tidied\n")
    assert (told.ended.exit_code, told.ended.cause) == (124, "timeout")
    assert 0.5 <= time.monotonic() - begun < 2.5
    assert told.ended.sandbox_alive


def test_a_run_can_be_killed(boxes: Any, box: Any) -> None:
    told = boxes.run(box, "import os, time; os.write(1, b'up\\n'); time.sleep(60)", meanwhile="kill")
    assert (told.stdout, told.ended.cause, told.ended.exit_code) == ("up\n", "killed", 137)
    assert told.ended.duration < 10
    assert _says(boxes, box, "print('well')") == "well\n"


def test_output_is_bounded(boxes: Any, box: Any) -> None:
    told = boxes.run(
        box, "import sys\nfor _ in range(48): sys.stdout.write('x' * (1 << 16))\nprint('end', file=sys.stderr)"
    )
    assert told.stdout == "x" * LIMITS.output_bytes
    assert (told.ended.stdout_truncated, told.ended.stderr_truncated) == (True, False)
    assert (told.stderr, told.ended.exit_code) == ("end\n", 0)


def test_much_output_on_both_streams(boxes: Any, box: Any) -> None:
    size = 10_000
    code = (
        "import sys\nfor i in range(80):\n"
        f"    sys.stdout.write(chr(65 + i % 26) * {size}); sys.stderr.write('e' * {size})"
    )
    told = boxes.run(box, code)
    assert told.stdout == "".join(chr(65 + i % 26) * size for i in range(80))
    assert told.stderr == "e" * (80 * size)
    assert not told.ended.stdout_truncated


def test_a_daemon_does_not_outlive_the_run(boxes: Any, box: Any) -> None:
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
    told = boxes.run(box, code)
    assert (told.ended.exit_code, told.ended.reaped >= 1) == (0, True)
    size = (box.workspace / "alive").stat().st_size
    time.sleep(0.1)
    assert (box.workspace / "alive").stat().st_size == size


HEAP = "kept = []\nwhile True: kept.append(bytearray(1 << 20))"


def test_out_of_memory(boxes: Any) -> None:
    box = boxes.make()
    told = boxes.run(box, HEAP)
    assert told.ended.exit_code != 0
    assert told.ended.cause == "oom" or not box.enforced["cgroup"]
    assert _says(boxes, box if _alive(boxes, box) else _shared(boxes, "python"), "print('well')") == "well\n"
    boxes.close(box)


def test_how_out_of_memory_looks(boxes: Any) -> None:
    """With a control group the kernel kills, without one the program is told so."""
    box = boxes.make()
    told = boxes.run(box, HEAP)
    boxes.close(box)
    if box.enforced["cgroup"]:
        assert told.ended.exit_code == 137
    else:
        assert (told.ended.exit_code, told.stderr.splitlines()[-1]) == (1, "MemoryError")


def test_too_many_processes(boxes: Any, box: Any) -> None:
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
    assert 30 < int(_says(boxes, box, code)) <= LIMITS.pids
    assert _says(boxes, box, "print('well')") == "well\n"


# -- walls ----------------------------------------------------------------------------------------------------------


def test_there_is_no_network(boxes: Any, box: Any) -> None:
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
        assert _says(boxes, box, code) == "['lo']\n"


def test_tmp_is_fresh_in_each_run(boxes: Any, box: Any) -> None:
    code = """
import os
for d in ('/tmp', '/dev/shm'):
    print(os.listdir(d))
    os.makedirs(d + '/era-test/b')
    open(d + '/era-test/c', 'w').close()
"""
    try:
        assert _says(boxes, box, code) == "[]\n[]\n"
        assert _says(boxes, box, code) == "[]\n[]\n"
    finally:
        for directory in ("/tmp/era-test", "/dev/shm/era-test"):
            shutil.rmtree(directory, ignore_errors=True)  # of the fake driver


def test_other_processes_are_invisible(boxes: Any, box: Any) -> None:
    pids = _says(boxes, box, "import os; print(*filter(str.isdigit, os.listdir('/proc')), os.getppid())").split()
    assert len(pids) <= 3
    assert pids[-1] == "1"
    assert _says(boxes, box, "import os; print(os.getuid() == os.geteuid(), os.getgroups() in ([], [os.getgid()]))")


def test_system_files_are_the_sandbox_s_own(boxes: Any, box: Any) -> None:
    code = """
import os
print([name for name in ('/root', '/home', '/var', '/etc/shadow', '/sys/kernel/security') if os.path.exists(name)])
for path in ('/', '/usr', '/etc', '/etc/passwd', '/era', '/opt/node'):
    try: os.close(os.open(path + '/x' if os.path.isdir(path) else path, os.O_WRONLY | os.O_CREAT)); print('wrote', path)
    except OSError: pass
print(open('/proc/self/status').read().split('CapEff:')[1].split()[0])
"""
    told = _says(boxes, box, code).splitlines()
    assert told[0] == "[]"
    assert int(told[1], 16) == 0, told


@pytest.mark.parametrize("number", [9, 15])
def test_the_supervisor_can_t_be_killed(boxes: Any, number: int) -> None:
    box = boxes.make()
    code = f"import os\ntry: os.kill(1, {number})\nexcept PermissionError: pass\nprint('on')"
    told = boxes.run(box, code, timeout=5)
    boxes.close(box)
    assert (told.stdout, told.ended.sandbox_alive) == ("on\n", True)


def test_dev_can_t_be_changed(boxes: Any) -> None:
    box = boxes.make()
    told = boxes.run(box, "open('/dev/mine', 'w')")
    boxes.close(box)
    assert told.ended.exit_code == 1


# -- the sandbox itself ---------------------------------------------------------------------------------------------


def test_a_dead_sandbox_says_so_before_a_run(boxes: Any) -> None:
    box = boxes.make()
    boxes.murder(box)
    with pytest.raises(SandboxFailed):
        boxes.run(box, "open('ran', 'w').close()")
    assert not _alive(boxes, box)
    assert not (box.workspace / "ran").exists()
    boxes.close(box)


@pytest.mark.parametrize("how", ["murder", "close"])
def test_a_sandbox_that_dies_under_a_run(boxes: Any, how: str) -> None:
    box = boxes.make()
    told = boxes.run(box, "import os, time; os.write(1, b'up\\n'); time.sleep(60)", meanwhile=how)
    assert (told.stdout, told.ended.sandbox_alive) == ("up\n", False)
    assert not _alive(boxes, box)
    boxes.close(box)


def test_nothing_is_left_of_a_closed_sandbox(boxes: Any) -> None:
    def seen() -> Any:
        return boxes.traces() if boxes.far else traces(boxes)

    _shared(boxes, "python")
    before = seen()
    box = boxes.make()
    boxes.run(box, "import os\nos.makedirs('a/' * 50)\nos.chmod('a', 0)")
    boxes.close(box)
    boxes.close(box)
    assert seen() == before
    assert not box.workspace.parent.exists()
    assert [group for group in cgroups(boxes.cgroup_name) if box.id in group] == []
    with pytest.raises(SandboxFailed):
        boxes.run(box, "print('no')")


def test_output_before_an_exit_of_node_s_is_not_cut(boxes: Any) -> None:
    told = boxes.run(_shared(boxes, "node"), "console.log('x'.repeat(500000)); process.exit(0)")
    assert len(told.stdout) == 500_001
